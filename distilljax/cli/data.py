"""``distilljax data CONFIG``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilljax._checks import check_count
from distilljax.cli.overrides import make_parser, parse, plan

DESCRIPTION = """\
Show the data of a config before anything is trained on it. For text: how many documents
and tokens there are, how long they are, how many were dropped and why, how much of them
is learnt, how full the packed rows are, and a few examples, in which what counts in the
loss is green (or between [[ and ]], where the output is no terminal). Documents are
encoded if nobody has done so yet; training then finds their tokens in the cache. For
other sources: the number of examples, what is in one, and the classes.

  distilljax data configs/digits/teacher.py
  distilljax data CONFIG --data.context=2048 --html data.html
"""


SPLITS = ("data", "validation", "test")


def main(argv: Sequence[str]) -> int:
    """Print what is in each split, and write it as a page if asked to."""
    parser = make_parser("data", DESCRIPTION, workdir=False)
    parser.add_argument("--arm", help="the arm whose data is shown")
    parser.add_argument(
        "--examples",
        type=int,
        default=10,
        metavar="N",
        help="how many examples are shown (default: 10)",
    )
    parser.add_argument("--html", metavar="FILE", help="write a page as well")
    args, experiment, overrides = parse(parser, argv)
    seeds, arms = [args.seed or 0], [args.arm] if args.arm else None
    (run,) = plan(experiment, overrides, seeds=seeds, arms=arms, parser=parser)
    from rich.console import Console

    from distilljax.data.text.report import as_html

    console = Console(soft_wrap=True, highlight=False, markup=False)
    check_count("data", "--examples", args.examples, 0)
    splits = {name: getattr(run.config, name) for name in SPLITS}
    for name, part in (run.config.other_tests or {}).items():
        splits[f"other_tests, {name}"] = part
    summaries = {}
    for name, part in splits.items():
        if part is not None:
            summaries |= _show(console, name, part(), args.examples)
    if args.html:
        Path(args.html).write_text(as_html(summaries))
        console.print(args.html)
    return 0


def _show(
    console: Any, name: str, source: Any, num_examples: int, chosen: Any = None
) -> dict[str, Any]:
    """Print a split, and the parts of a mixture; return the summaries of texts.

    Args:
      console: Where it is printed.
      name: Of the split.
      source: Its source.
      num_examples: How many examples are shown.
      chosen: The rows of the source that the split has; None: all of them.
    """
    from distilljax.data.describe import describe
    from distilljax.data.sources import Subset
    from distilljax.data.text.mixture import MixedRows
    from distilljax.data.text.packed import PackedRows
    from distilljax.data.text.padded import PaddedRows
    from distilljax.data.text.report import summarize

    whole = source
    while isinstance(whole, Subset):
        chosen = whole.chosen if chosen is None else whole.chosen[chosen]
        whole = whole.source
    if isinstance(whole, MixedRows):
        found = {}
        shares = whole.shares / whole.shares.sum()
        for (part, rows), share in zip(whole.parts.items(), shares, strict=True):
            title = f"{name}: {part}, {100 * share:.1f} % of the rows"
            of_part = None if chosen is None else whole.rows_of(part, chosen)
            found |= _show(console, title, rows, num_examples, of_part)
        return found
    summary = None
    if isinstance(whole, PackedRows | PaddedRows):
        summary = summarize(whole, num_examples, chosen=chosen)
    console.print(name, style="bold")
    for title, text in summary.lines() if summary else describe(source):
        console.print(f"  {title:14}{text}")
    for number, shown in enumerate(summary.shown if summary else (), start=1):
        console.print(f"\n  {number}. {shown.where}", style="bold")
        console.print(_coloured(shown, console.is_terminal))
    console.print()
    return {name: summary} if summary else {}


def _coloured(shown: Any, is_terminal: bool) -> Any:
    from rich.text import Text

    text = Text()
    for part, learnt in shown.parts:
        if is_terminal:
            text.append(part, style="green" if learnt else "dim")
        else:
            text.append(f"[[{part}]]" if learnt else part)
    if shown.num_more:
        text.append(f" ... {shown.num_more:,} more", style="italic")
    return text
