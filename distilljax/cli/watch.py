"""``distilljax watch W...``."""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distilljax.watching import Status, find_statuses

DESCRIPTION = """\
Show how runs are doing: one in detail, several (arms, seeds) in a table. Reads what
they write, from any process on any machine that sees the folder, and touches nothing.
Ends when all are finished, or with Ctrl-C.
"""

# What is no term of the loss, and is shown elsewhere or not at all.
_NO_TERM = ("step", "seconds", "split", "loss", "goodput", "mfu")
_NO_TERM_BEGINS = ("share_", "flops_", "memory_", "examples_", "tokens_")
# Columns that are left out where there is no room, the first one first.
_LESS_IMPORTANT = ("MFU", "speed", "validation", "loss")
_NAME_WIDTH = 12
_COLORS = {"running": "green", "finished": "cyan", "stopped": "yellow"}


def main(argv: Sequence[str]) -> int:
    """Show runs until they are finished."""
    parser = ArgumentParser(
        prog="distilljax watch",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workdirs", nargs="+", metavar="W", help="folders with runs")
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    parser.add_argument(
        "--every-secs",
        type=float,
        default=2.0,
        metavar="S",
        help="between two looks (default: 2)",
    )
    args = parser.parse_args(argv)
    console = Console()
    found = find_statuses(args.workdirs)
    if args.once:
        console.print(view(found, console.width))
        return 0
    with Live(view(found, console.width), console=console, auto_refresh=False) as live:
        try:
            while not found or any(run.state != "finished" for run in found):
                time.sleep(args.every_secs)
                found = find_statuses(args.workdirs)
                live.update(view(found, console.width), refresh=True)
        except KeyboardInterrupt:
            pass
    return 0


def view(runs: Sequence[Status], width: int) -> RenderableType:
    """A frame: what is known of one run, or a table of several."""
    if not runs:
        return Text("no run here yet")
    return _detail(runs[0]) if len(runs) == 1 else _table(runs, width)


def _table(runs: Sequence[Status], width: int) -> Table:
    columns: dict[str, Callable[[Status], RenderableType]] = {
        "state": _state,
        "step": lambda run: f"{run.step}/{run.steps}",
        "loss": lambda run: _number(run.train.get("loss")),
        "validation": _validation,
        "speed": lambda run: _speed(run, short=True),
        "MFU": lambda run: _percent(run.train.get("mfu")),
        "left": lambda run: _duration(run.seconds_left) * (run.state == "running"),
    }
    cells = {name: [show(run) for run in runs] for name, show in columns.items()}
    cells = _fitting(cells, width - _NAME_WIDTH - 3)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=_NAME_WIDTH)
    for name in cells:
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    root = os.path.commonpath([run.path.parent for run in runs])
    for run, *row in zip(runs, *cells.values(), strict=True):
        table.add_row(os.path.relpath(run.path, root), *row)
    return table


def _fitting(cells: dict[str, list[Any]], width: int) -> dict[str, list[Any]]:
    """Columns that have a value; without the less important ones if they are too wide.

    Example:
      >>> _fitting({"loss": ["0.1234"], "speed": ["123 tok/s"], "MFU": [""]}, 18)
      {'loss': ['0.1234']}
    """
    found = {name: column for name, column in cells.items() if any(column)}
    for name in _LESS_IMPORTANT:
        widths = (max(map(len, (x, *column))) + 2 for x, column in found.items())
        if sum(widths) > width:
            found.pop(name, None)
    return found


def _detail(run: Status) -> Panel:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column()
    left = _duration(run.seconds_left) if run.state == "running" else ""
    bar = ProgressBar(total=max(run.steps, 1), completed=run.step, width=30)
    rows.add_row("progress", Text(f"{run.step}/{run.steps}  {left and left + ' left'}"))
    rows.add_row("", bar)
    rows.add_row("loss", _number(run.train.get("loss")))
    terms = {k: x for k, x in run.train.items() if _is_term(k, x)}
    for name, value in terms.items():
        rows.add_row(f"  {name}", _number(value))
    if run.validation:
        rows.add_row(
            "validation", f"{_validation(run)}  (step {run.validation['step']})"
        )
    rows.add_row("speed", _speed(run))
    if (flops := run.train.get("flops_per_second_per_chip")) is not None:
        mfu = run.train.get("mfu")
        share = "" if mfu is None else f"  MFU {_percent(mfu)}"
        rows.add_row("", f"{_si(flops)}FLOP/s per chip{share}")
    if (memory := run.train.get("memory_peak_bytes")) is not None:
        rows.add_row("memory", f"{memory / 2**30:.2f} GiB at most")
    shares = {
        name.removeprefix("share_"): share
        for name, share in run.train.items()
        if name.startswith("share_")
    }
    if shares:
        shown = "  ".join(f"{name} {_percent(x)}" for name, x in shares.items())
        rows.add_row("time", shown)
    rows.add_row("goodput", _percent(run.train.get("goodput")))
    if run.checkpoint is not None:
        ago = f"step {run.checkpoint}, {_duration(run.checkpoint_secs)} ago"
        rows.add_row("checkpoint", ago)
    restarts = f", {run.restarts} restarts" if run.restarts else ""
    quiet = f"last line {_duration(run.silent_secs)} ago{restarts}"
    return Panel(
        Group(rows, Text(quiet, style="dim")),
        title=Text.assemble(f"{run.name}  ", _state(run)),
        subtitle=str(run.path),
    )


def _is_term(name: str, value: object) -> bool:
    hidden = name in _NO_TERM or name.startswith(_NO_TERM_BEGINS)
    return isinstance(value, int | float) and not hidden


def _state(run: Status) -> Text:
    return Text(run.state, style=_COLORS.get(run.state, "red"))


def _validation(run: Status) -> str:
    for name in ("accuracy", "nll", "kl_to_teacher"):
        if (value := run.validation.get(name)) is not None:
            return f"{name} {_number(value)}"
    return ""


def _speed(run: Status, *, short: bool = False) -> str:
    for unit in ("tokens", "examples"):
        if (rate := run.train.get(f"{unit}_per_second")) is not None:
            return f"{rate:,.0f} {unit[:3] if short else unit}/s"
    return ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _si(value: float) -> str:
    """A number with a prefix for its size.

    Example:
      >>> _si(1.5e14), _si(2e6)
      ('150 T', '2 M')
    """
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _duration(seconds: float | None) -> str:
    """Seconds as a clock shows them.

    Example:
      >>> _duration(75.0), _duration(3 * 3600 + 60.0), _duration(2.2)
      ('1:15', '3:01:00', '2 s')
    """
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
