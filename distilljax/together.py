"""What several processes decide together: to save, to stop, which file is good."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(flag: bool) -> bool:
    """What process 0 says, for all of them; they ask together.

    Example:
      >>> agreed(True)    # alone
      True
    """
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


class Clock:
    """Whether so many seconds have passed, at the same step for all processes.

    It runs on the monotonic clock, which no correction of the date moves. One process
    knows at any step. With several, the clock of process 0 counts, and to hear of it
    they wait for each other: they ask only where they wait anyway.

    Args:
      seconds: After how many it is due; None is never.

    Example:
      >>> clock = Clock(0.0)
      >>> clock.due(), Clock(None).due(), Clock(3600.0).due()
      (True, False, False)
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._since = time.monotonic()

    def due(self, waiting: bool = True) -> bool:
        """True if the time is over.

        Args:
          waiting: Whether the processes wait for each other at this step.
        """
        if self._seconds is None or not (waiting or jax.process_count() == 1):
            return False
        return agreed(time.monotonic() - self._since >= self._seconds)


# Preemption is agreed on by a number that all processes count alike, over all runs.
_SYNC_POINTS = itertools.count(1)


class StopSignal:
    """Whether SIGTERM has asked this program to save and go.

    In one process a handler of our own sets a flag, which the loop reads between two
    steps. With several, the signal may reach only some of them: JAX's preemption
    service tells all, and lets them see it at the same step.

    Example:
      >>> with StopSignal() as stop:
      ...     before = stop.reached()
      ...     signal.raise_signal(signal.SIGTERM)
      ...     before, stop.reached()
      (False, True)
    """

    def __init__(self):
        self._flag = threading.Event()
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        """Listen, if this is the main thread of a single process."""
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signal back to who had it."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @property
    def requested(self) -> bool:
        """True once `reached` was, or the signal came since."""
        return self._flag.is_set()

    def reached(self) -> bool:
        """True from the step on at which to save and go; ask once in each step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            next(_SYNC_POINTS)
        ):
            self._flag.set()
        return self._flag.is_set()
