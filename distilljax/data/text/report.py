"""What is in the data: how much, how long, how much is learnt, and some examples."""

from __future__ import annotations

import html
import itertools
from dataclasses import dataclass

import numpy as np

from distilljax.data.hashing import derive_key, random_bits
from distilljax.data.text.packed import PackedRows

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_NAMES = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")


@dataclass(frozen=True)
class Shown:
    """A piece of a document, decoded.

    Attributes:
      where: Where it is from.
      parts: Its text, cut where the mask changes, each with whether it is learnt.
      num_more: How many tokens follow that are not shown.
    """

    where: str
    parts: tuple[tuple[str, bool], ...]
    num_more: int


@dataclass(frozen=True)
class TextSummary:
    """Numbers and examples of packed rows, as `summarize` finds them.

    Attributes:
      documents: How many documents the store has, of all splits.
      kept: How many of them are in the rows.
      drops: How many of the split are not, by the reason.
      copies: How many of the kept have the text of another one.
      tokens: Of the kept documents.
      num_bytes: Of their text, in UTF-8.
      lengths: Tokens of a document at each of `QUANTILES`.
      predictions: How many tokens the rows predict, learnt or not.
      learnt: How many of these count in the loss.
      rows: Rows of an epoch.
      context: Tokens of a row.
      segments: Pieces of documents in all rows.
      shown: A few pieces, decoded.
    """

    documents: int
    kept: int
    drops: dict[str, int]
    copies: int
    tokens: int
    num_bytes: int
    lengths: tuple[int, ...]
    predictions: int
    learnt: int
    rows: int
    context: int
    segments: int
    shown: tuple[Shown, ...]

    @property
    def fill(self) -> float:
        """The share of the rows' places that is not padding."""
        return self.predictions / (self.rows * self.context)

    def lines(self) -> list[tuple[str, str]]:
        """The numbers as text: names, and what is to be said of each."""
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.drops.items())
        quantiles = zip(_NAMES, self.lengths, strict=True)
        return [
            (
                "documents",
                f"{self.kept:,} of {self.documents:,}; dropped: {dropped or 'none'}",
            ),
            ("copies", f"{self.copies:,} documents have the text of another one"),
            (
                "tokens",
                f"{self.tokens:,}, {self.num_bytes / self.tokens:.2f} bytes each",
            ),
            ("per document", ", ".join(f"{name} {n:,}" for name, n in quantiles)),
            (
                "supervised",
                f"{_percent(self.learnt / self.predictions)} of "
                f"{self.predictions:,} predictions",
            ),
            (
                "rows",
                f"{self.rows:,} of {self.context:,} tokens, {_percent(self.fill)} "
                f"full, {self.segments / self.rows:.1f} segments each",
            ),
        ]


def summarize(source: PackedRows, num_examples: int = 10) -> TextSummary:
    """Numbers and examples of packed rows; no document is encoded again.

    Args:
      source: What a `Packed` returns.
      num_examples: How many pieces are decoded, drawn by hash: the same each time.

    Example:
      >>> from distilljax.data.text import report
      >>> summary = report.TextSummary(
      ...     documents=2, kept=2, drops={}, copies=0, tokens=10, num_bytes=40,
      ...     lengths=(4, 4, 4, 5, 6, 6, 6), predictions=8, learnt=6, rows=1,
      ...     context=10, segments=2, shown=(),
      ... )
      >>> dict(summary.lines())["rows"]
      '1 of 10 tokens, 80.0 % full, 2.0 segments each'
    """
    store, kept, pieces = source.store, source.kept, source.plan.pieces
    lengths = store.lengths[kept]
    chosen = np.argsort(random_bits(derive_key(0, "report"), np.arange(len(pieces))))
    documents = source.config.text.documents()
    shown = []
    for piece in chosen[:num_examples].tolist():
        document, start = int(pieces.document[piece]), int(pieces.start[piece])
        stop = start + int(pieces.places[piece]) + 1
        where = f"{documents.where(document)}, tokens {start:,} to {stop:,}"
        where += f" of {int(store.lengths[document]):,}"
        shown.append(_shown(source, document, start, stop, where))
    at = np.quantile(lengths, QUANTILES, method="nearest")
    return TextSummary(
        documents=len(store),
        kept=len(kept),
        drops=source.drops,
        copies=len(kept) - len(np.unique(store.hashes[kept])),
        tokens=int(lengths.sum()),
        num_bytes=int(store.num_bytes[kept].sum()),
        lengths=tuple(int(n) for n in at),
        predictions=int(pieces.places.sum()),
        learnt=int(store.num_learnt[kept].sum()),
        rows=len(source),
        context=source.config.context,
        segments=len(pieces),
        shown=tuple(shown),
    )


def _shown(
    source: PackedRows,
    document: int,
    start: int,
    stop: int,
    where: str,
    max_tokens: int = 160,
) -> Shown:
    store = source.store
    end = min(stop, start + max_tokens)
    tokens = store.tokens(document, start, end)
    learnt = store.learnt(document, start, end)
    learnt[0] = False  # nothing in its row predicts it
    cuts = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(tokens)]
    parts = tuple(
        (visible(store.tokenizer.decode(tokens[a:b].tolist())), bool(learnt[a]))
        for a, b in itertools.pairwise(cuts)
    )
    return Shown(where, parts, stop - end)


def visible(text: str) -> str:
    """Text that no terminal obeys: other control characters than breaks are spelt.

    Example:
      >>> visible("red: \\x1b[31m\\n")
      'red: \\\\x1b[31m\\n'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in text
    )


def as_html(summaries: dict[str, TextSummary]) -> str:
    """A page of its own with the numbers and the examples of several splits.

    Args:
      summaries: By the name of the split.

    Example:
      >>> as_html({}).splitlines()[0]
      '<!doctype html>'
    """
    body = []
    for name, summary in summaries.items():
        rows = "".join(
            f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>\n"
            for k, v in summary.lines()
        )
        body.append(f"<h2>{html.escape(name)}</h2>\n<table>\n{rows}</table>")
        for shown in summary.shown:
            text = "".join(
                f"<mark>{html.escape(part)}</mark>" if learnt else html.escape(part)
                for part, learnt in shown.parts
            )
            more = f" <i>... {shown.num_more:,} more</i>" if shown.num_more else ""
            body.append(f"<h3>{html.escape(shown.where)}</h3>\n<pre>{text}{more}</pre>")
    return _PAGE.format(body="\n".join(body))


_PAGE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>distilljax data</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; \
padding: 0 1rem; color: #222; background: #fff }}
th {{ text-align: left; padding-right: 1.5rem; vertical-align: top }}
h3 {{ font-size: 0.9rem; font-weight: 600; color: #666; margin-bottom: 0 }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 0.7rem; \
margin-top: 0.3rem }}
mark {{ background: #c9ecd0; color: inherit }}
</style>
<h1>What is in the data</h1>
<p>What counts in the loss is <mark>marked</mark>.</p>
{body}
</html>
"""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
