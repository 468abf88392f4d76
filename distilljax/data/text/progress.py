"""What is shown while documents are encoded: nothing, where it takes no time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# Called with a title and a total, it gives a function that is told what is done.
Progress = Callable[..., AbstractContextManager[Callable[[int], None]]]

_PATIENCE_SECS = 2.0
_WIDTH = 30


@contextlib.contextmanager
def show_progress(
    title: str, total: int, what: str = "documents"
) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and a line each minute in a log; after two seconds.

    Args:
      title: What is done.
      total: How many there are of what is counted.
      what: What that is, in the plural.

    Example:
      >>> with show_progress("tokenizing", 3) as advance:
      ...     advance(3)    # quick: says nothing
    """
    start = last = time.monotonic()
    bar = sys.stderr.isatty()
    between, shown = (0.1, False) if bar else (60.0, False)

    def advance(done: int) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if now - start < _PATIENCE_SECS or (shown and now - last < between):
            return
        last, shown = now, True
        left = (now - start) * (total - done) / max(done, 1)
        filled = "#" * (_WIDTH * done // total)
        text = f"{title} {done:,} of {total:,} {what}, {left:.0f} s left"
        if bar:
            text = f"\r[{filled:{_WIDTH}}] {text}\033[K"
        print(text, end="" if bar else "\n", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if shown:
            took = f"{title} took {time.monotonic() - start:.0f} s"
            print(f"\r{took}\033[K" if bar else took, file=sys.stderr, flush=True)
