"""When a run started, saved and stopped, over all its restarts: `events.jsonl`.

One line per event: `start`, `first_step`, `checkpoint`, `stop`. A kill writes none, and
is seen by what follows it. From these lines comes the goodput: the share of the time
since the first start in which steps were made that were not lost again.

    {"event": "checkpoint", "step": 500, "productive": 61.3, "time": 1764374590.1,
     "monotonic": 8123.4, "boot": "5c0e..."}

`productive` counts the seconds of steps since the start of that process, without
compiling, waiting for data, evaluating and saving.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilljax.patience import append_line, patiently

Event = dict[str, Any]


class Events:
    """The events of this process, after those of the processes before it.

    Args:
      path: The file; appended to.
      step: The step from which this process goes on.
      began: When the process took the run up, on `time.monotonic`.
      **more: What else there is to say of the start.
    """

    def __init__(self, path: Path, step: int, began: float, **more: Any):
        self._path, self._began = path, began
        before = read_events(path)
        start = self._event("start", step=step, pid=os.getpid(), **more)
        late = start["monotonic"] - began
        start |= {"time": start["time"] - late, "monotonic": began}
        self._productive_before = productive_seconds(before, step)
        self._elapsed_before = elapsed_seconds([*before, start])
        torn = path.exists() and patiently(path.read_bytes)[-1:] not in (b"", b"\n")
        append_line(path, ("\n" if torn else "") + json.dumps(start))

    @staticmethod
    def _event(event: str, **more: Any) -> Event:
        clocks = {
            "time": time.time(),
            "monotonic": time.monotonic(),
            "boot": this_boot(),
        }
        return {"event": event, **more, **clocks}

    def add(self, event: str, **more: Any) -> None:
        """Append a line, with the time.

        Args:
          event: What happened.
          **more: What there is to say of it.
        """
        append_line(self._path, json.dumps(self._event(event, **more)))

    def goodput(self, productive: float) -> float:
        """The share of all time since the first start that was spent on steps.

        Args:
          productive: Seconds of steps in this process.
        """
        elapsed = self._elapsed_before + time.monotonic() - self._began
        return (self._productive_before + productive) / max(elapsed, 1e-9)


def read_events(path: Path) -> list[Event]:
    """The lines of a file of events, without what a kill has cut off.

    Args:
      path: The file; it need not exist.
    """
    if not path.exists():
        return []
    found = []
    for line in patiently(path.read_bytes).decode(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            event = json.loads(line)
            if isinstance(event, dict) and {"event", "monotonic"} <= event.keys():
                found.append(event)
    return found


def elapsed_seconds(events: Sequence[Event]) -> float:
    """The time from the first event to the last.

    Within one boot of a machine it is that of the monotonic clock. Between two it is
    that of the dates, which may have been corrected: a step backwards counts as none.
    The time between the end of a run and its being taken up for more steps is no time
    of the run.

    Args:
      events: In their order.

    Example:
      >>> a = {"event": "start", "time": 500.0, "monotonic": 1.0, "boot": "x"}
      >>> b = {"event": "stop", "time": 100.0, "monotonic": 4.0, "boot": "x"}
      >>> elapsed_seconds([a, b])     # the date went back, and 3 s passed
      3.0
    """
    total = 0.0
    for before, after in itertools.pairwise(events):
        if before.get("reason") == "done":
            continue
        if before["boot"] == after["boot"]:
            total += max(after["monotonic"] - before["monotonic"], 0.0)
        else:
            total += max(after["time"] - before["time"], 0.0)
    return total


def productive_seconds(events: Sequence[Event], step: float = math.inf) -> float:
    """Seconds of those steps that are not lost: later starts went on after them.

    Args:
      events: In their order.
      step: From where the run goes on now.

    Example:
      >>> def at(event, step, productive=0.0):
      ...     return {"event": event, "step": step, "productive": productive}
      >>> first = [at("start", 0), at("checkpoint", 10, 5.0), at("checkpoint", 20, 9.0)]
      >>> productive_seconds(first, 20), productive_seconds(first, 10)
      (9.0, 5.0)
      >>> productive_seconds([*first, at("start", 10), at("stop", 30, 11.0)])
      16.0
    """
    total, lost_from, best = 0.0, step, 0.0
    for event in reversed(events):
        if event["event"] == "start":
            total, best = total + best, 0.0
            lost_from = min(lost_from, event["step"])
        elif event.get("step", math.inf) <= lost_from:
            best = max(best, event.get("productive", 0.0))
    return total


def this_boot() -> str:
    """Which boot of which machine the monotonic clock belongs to.

    Example:
      >>> this_boot() == this_boot()
      True
    """
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{platform.node()} {round(time.time() - time.monotonic(), -2):.0f}"
