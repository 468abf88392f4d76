"""Traces of some steps for XProf: chosen before the run, or asked for while it runs."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from distilljax.patience import is_passing, note

# How many steps a trace has, unless they were named.
NUM_STEPS = 10
# On storage of a network, looking for a file takes longer than a small step.
LOOK_EVERY_SECS = 1.0

Steps = bool | tuple[int, int]
Trace = Callable[[int, Any], contextlib.AbstractContextManager]


def steps_to_trace(steps: Steps, start: int, stop: int) -> range:
    """Which steps are traced.

    Args:
      steps: First and last; True: 10, from the 11th on, or what a short run has.
      start: The step before the first one.
      stop: The last step.

    Example:
      >>> steps_to_trace(True, 0, 100), steps_to_trace((30, 32), 0, 100)
      (range(11, 21), range(30, 33))
      >>> steps_to_trace(True, 0, 4), len(steps_to_trace(False, 0, 100))
      (range(1, 5), 0)
    """
    if isinstance(steps, tuple):
        return range(max(steps[0], start + 1), min(steps[1], stop) + 1)
    if not steps:
        return range(0)
    first = start + max(min(NUM_STEPS + 1, stop - start - NUM_STEPS + 1), 1)
    return range(first, min(first + NUM_STEPS, stop + 1))


@contextlib.contextmanager
def trace_steps(
    directory: Path,
    start: int,
    stop: int,
    steps: Steps = False,
    *,
    ask: Path | None = None,
) -> Iterator[Trace]:
    """Trace some steps, and on demand the next 10: by a file, or by SIGUSR1.

    Args:
      directory: Where the traces go.
      start: The step before the first one.
      stop: The last step.
      steps: Which are traced without being asked for; see `steps_to_trace`.
      ask: A file whose appearance asks for a trace; it is removed then.

    Yields:
      `trace(step, state)`: a context for each step, which is given the state before it.
    """
    wanted = steps_to_trace(steps, start, stop)
    running = False
    with _Asked(ask) as asked:

        def at(step: int, state: Any) -> contextlib.AbstractContextManager:
            nonlocal running, wanted
            if not running and step not in wanted and asked.now():
                wanted = range(step, step + NUM_STEPS)
            if running != (step in wanted):
                jax.block_until_ready(state)  # whole steps, from the first to the last
                if running:
                    jax.profiler.stop_trace()
                else:
                    jax.profiler.start_trace(str(directory))
                running = not running
            if not running:
                return contextlib.nullcontext()
            return jax.profiler.StepTraceAnnotation("train", step_num=step)

        try:
            yield at
        finally:
            if running:
                jax.profiler.stop_trace()


class _Asked:
    """Whether somebody wants a trace now."""

    def __init__(self, path: Path | None):
        self._path = path
        self._flag = threading.Event()
        self._before: Any = None
        self._looked = time.monotonic()
        self._told = False

    def __enter__(self) -> _Asked:
        main = threading.current_thread() is threading.main_thread()
        if main and hasattr(signal, "SIGUSR1"):
            self._before = signal.signal(signal.SIGUSR1, lambda *_: self._flag.set())
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def now(self) -> bool:
        """True once for each time that it was asked."""
        if self._flag.is_set():
            self._flag.clear()
            return True
        if self._path is None or time.monotonic() < self._looked + LOOK_EVERY_SECS:
            return False
        self._looked = time.monotonic()
        try:
            if self._path.exists():
                self._path.unlink()
                return True
        except OSError as error:
            if not self._told and not is_passing(error):
                self._told = True
                note(f"{self._path} asks for a trace, and cannot be removed ({error}).")
        return False
