"""What is in the data: how much, how long, how much is learnt, and some examples."""

from __future__ import annotations

import html
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from distilljax.data.hashing import derive_key, random_bits
from distilljax.data.text.packed import PackedRows
from distilljax.data.text.padded import PaddedRows
from distilljax.data.text.store import TokenStore

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_TOKENS_SHOWN = 160
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
    """Numbers and examples of rows of text, as `summarize` finds them.

    Attributes:
      documents: How many documents there are, in all splits.
      of_split: How many of them belong to the split.
      kept: How many of these are in the rows.
      drops: How many are not, by the reason.
      copies: How many of the kept have the text of another one.
      tokens: Of the kept documents.
      num_bytes: Of their text, in UTF-8.
      lengths: Tokens of a document at each of `QUANTILES`.
      rows: Rows of an epoch.
      context: Tokens of a row.
      used: Places of all rows that are not padding.
      more: What else is to be said: names, and texts.
      shown: A few pieces, decoded.
    """

    documents: int
    of_split: int
    kept: int
    drops: dict[str, int]
    copies: int
    tokens: int
    num_bytes: int
    lengths: tuple[int, ...]
    rows: int
    context: int
    used: int
    more: tuple[tuple[str, str], ...]
    shown: tuple[Shown, ...]

    @property
    def fill(self) -> float:
        """The share of the rows' places that is not padding."""
        return self.used / (self.rows * self.context)

    def lines(self) -> list[tuple[str, str]]:
        """The numbers as text: names, and what is to be said of each."""
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.drops.items())
        documents = f"{self.kept:,} of {self.of_split:,}; dropped: {dropped or 'none'}"
        if self.of_split < self.documents:
            documents += f" ({self.documents:,} with the other split)"
        quantiles = zip(_NAMES, self.lengths, strict=True)
        bytes_each = self.num_bytes / self.tokens
        return [
            ("documents", documents),
            ("copies", f"{self.copies:,} documents have the text of another one"),
            ("tokens", f"{self.tokens:,}, of {bytes_each:.2f} bytes on average"),
            ("per document", ", ".join(f"{name} {n:,}" for name, n in quantiles)),
            (
                "rows",
                f"{self.rows:,} of {self.context:,} tokens, {_percent(self.fill)} full",
            ),
            *self.more,
        ]


def summarize(
    source: PackedRows | PaddedRows,
    num_examples: int = 10,
    *,
    chosen: Int[np.ndarray, " chosen"] | None = None,
) -> TextSummary:
    """Numbers and examples of rows of text; no document is encoded again.

    Args:
      source: What a `Packed` or a `Padded` returns.
      num_examples: How many pieces are decoded, drawn by hash: the same each time.
      chosen: The rows that are read, such as those of a `data.Slice`; None: all of
        them. The numbers are of all; a line says how many are chosen, and the examples
        are of these.

    Example:
      >>> summary = TextSummary(
      ...     documents=2, of_split=2, kept=2, drops={}, copies=0, tokens=10,
      ...     num_bytes=40, lengths=(4, 4, 4, 5, 6, 6, 6), rows=1, context=10, used=8,
      ...     more=(), shown=(),
      ... )
      >>> dict(summary.lines())["rows"]
      '1 of 10 tokens, 80.0 % full'
    """
    store, kept = source.store, source.kept
    lengths = store.lengths[kept]
    of: Any = _of_packed if isinstance(source, PackedRows) else _of_padded
    used, more, shown = of(source, num_examples, chosen)
    if chosen is not None:
        share = _percent(len(chosen) / len(source))
        more = (*more, ("chosen", f"{len(chosen):,} of these rows, {share}"))
    at = np.quantile(lengths, QUANTILES, method="nearest")
    return TextSummary(
        documents=len(store),
        of_split=len(kept) + sum(source.drops.values()),
        kept=len(kept),
        drops=source.drops,
        copies=len(kept) - len(np.unique(store.hashes[kept])),
        tokens=int(lengths.sum()),
        num_bytes=int(store.num_bytes[kept].sum()),
        lengths=tuple(int(n) for n in at),
        rows=len(source),
        context=source.config.context,
        used=used,
        more=more,
        shown=shown,
    )


def _of_packed(source: PackedRows, num_examples: int, chosen: Any) -> Any:
    """Places that are used, what is learnt in them, and pieces with their mask."""
    store, pieces = source.store, source.plan.pieces
    used = int(pieces.places.sum())
    learnt = int(store.num_learnt[source.kept].sum())
    more = (
        ("segments", f"{len(pieces) / len(source):.1f} in a row"),
        ("supervised", f"{_percent(learnt / used)} of {used:,} predictions"),
    )
    documents = source.config.text.documents()
    shown, among = [], np.arange(len(pieces))
    if chosen is not None:
        which = [among[:0], *(source.units(int(i))[0] for i in chosen)]
        among = np.unique(np.concatenate(which))
    for piece in _drawn(among, num_examples):
        document, start = int(pieces.document[piece]), int(pieces.start[piece])
        stop = start + int(pieces.places[piece]) + 1
        where = f"{documents.where(document)}, tokens {start:,} to {stop:,}"
        where += f" of {int(store.lengths[document]):,}"
        shown.append(_shown(store, document, start, stop, where))
    return used, more, tuple(shown)


def _of_padded(source: PaddedRows, num_examples: int, chosen: Any) -> Any:
    """Places that are used, the classes, and documents with theirs."""
    store, context = source.store, source.config.context
    lengths = store.lengths[source.kept]
    cut = int((lengths > context).sum())
    more = [("cut", f"{cut:,} documents are longer than a row")]
    names = source.class_names
    if source.labels is not None:
        counts = np.bincount(source.labels)
        order = np.argsort(-counts, kind="stable")
        named = [names[k] if names else str(k) for k in order]
        each = zip(named, counts[order].tolist(), strict=True)
        more.append(("classes", ", ".join(f"{name} {n:,}" for name, n in each if n)))
    documents = source.config.text.documents()
    shown = []
    among = np.arange(len(source)) if chosen is None else np.unique(chosen)
    for row in _drawn(among, num_examples):
        document = int(source.kept[row])
        where = documents.where(document)
        if source.labels is not None:
            label = int(source.labels[row])
            where += f": {names[label] if names else label}"
        stop = min(int(lengths[row]), context)
        shown.append(_shown(store, document, 0, stop, where, masked=False))
    return int(np.minimum(lengths, context).sum()), tuple(more), tuple(shown)


def _drawn(among: Int[np.ndarray, " among"], count: int) -> list[int]:
    """Some of these, by hash."""
    bits = random_bits(derive_key(0, "report"), among)
    return among[np.argsort(bits)[:count]].tolist()


def _shown(
    store: TokenStore,
    document: int,
    start: int,
    stop: int,
    where: str,
    *,
    masked: bool = True,
) -> Shown:
    end = min(stop, start + _TOKENS_SHOWN)
    tokens = store.tokens(document, start, end)
    learnt = store.learnt(document, start, end) & masked
    learnt[:1] = False  # nothing in its row predicts it
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
