"""How runs are doing, read from their folders; nothing there is touched.

A run may be writing while it is read: a last line that is cut off is left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilljax._checks import fail
from distilljax.events import read_events, this_boot

# How much of the end of a log is read: lines of metrics have some hundred bytes.
TAIL_BYTES = 2**18
# In these a run has no other run, and many files.
INSIDE = frozenset({"checkpoints", "checkpoints.damaged", "tensorboard", "profile"})


@dataclass(frozen=True)
class Status:
    """What is known of one run.

    Attributes:
      path: Its folder.
      name: Name of the experiment.
      state: `running`, `finished`, `stopped` (and saved), `killed`, `elsewhere` (on
        another machine, where no process can be seen from here), or the name of the
        error that ended it.
      step: The last one that was logged.
      steps: How many there are to be.
      train: The last line of training; empty before it.
      validation: The last line of validation.
      seconds_left: What is left at the pace of the last lines; None if unknown.
      silent_secs: Since when nothing was written.
      checkpoint: Step of the last verified checkpoint.
      checkpoint_secs: How long ago that was.
      restarts: How many processes have taken the run up again.
    """

    path: Path
    name: str
    state: str
    step: int
    steps: int
    train: dict[str, Any]
    validation: dict[str, Any]
    seconds_left: float | None
    silent_secs: float
    checkpoint: int | None
    checkpoint_secs: float | None
    restarts: int


def find_statuses(workdirs: Iterable[str | Path]) -> list[Status]:
    """The runs in some folders and below them, sorted by path.

    Args:
      workdirs: Folders that exist.
    """
    found: dict[Path, Status] = {}
    for workdir in map(Path, workdirs):
        if not workdir.is_dir():
            fail(
                "watch",
                "W",
                "be a folder that exists",
                repr(str(workdir)),
                "Pass the --workdir of `distilljax train`.",
            )
        for path in _runs(workdir):
            found[path.resolve()] = status_of(path)
    return [found[path] for path in sorted(found)]


def _runs(root: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(set(inside) - INSIDE)
        if "config.json" in files and ".lock" in files:
            yield Path(folder)


def status_of(path: Path) -> Status:
    """How the run in a folder is doing.

    Args:
      path: The folder of one run.
    """
    config = _read(path / "config.json")
    events = read_events(path / "events.jsonl")
    lines = _tail(path / "metrics.jsonl")
    train = [line for line in lines if line.get("split") == "train"]
    validation = [line for line in lines if line.get("split") == "validation"]
    saved = [e for e in events if e["event"] == "checkpoint"]
    last = train[-1] if train else {}
    step = max((x.get("step", 0) for x in (*lines[-1:], *events[-1:])), default=0)
    steps = config.get("steps", 0)
    return Status(
        path=path,
        name=str(config.get("name", "?")),
        state=_state(path, events, steps),
        step=step,
        steps=steps,
        train=last,
        validation=validation[-1] if validation else {},
        seconds_left=_seconds_left(train, steps),
        silent_secs=_silent_secs(path),
        checkpoint=saved[-1]["step"] if saved else None,
        checkpoint_secs=_ago(saved[-1]) if saved else None,
        restarts=max(sum(e["event"] == "start" for e in events) - 1, 0),
    )


def _state(path: Path, events: list[dict[str, Any]], steps: int) -> str:
    if is_locked(path / ".lock"):
        return "running"
    if _read(path / "results.json").get("steps", -1) == steps:
        return "finished"
    starts = [e for e in events if e["event"] == "start"]
    if events and events[-1]["event"] == "stop":
        reason = str(events[-1].get("reason"))
        # all steps are made, and whatever comes after them was not
        return "killed" if reason == "done" else reason
    if starts and starts[-1]["boot"] != this_boot():
        return "elsewhere"
    return "killed"


def is_locked(lock: Path, table: Path = Path("/proc/locks")) -> bool:
    """True if a process of this machine holds the lock of a run.

    It is looked up and not tried: a run that starts at this moment would be refused.

    Args:
      lock: The file.
      table: The kernel's list of locks.
    """
    try:
        inode = lock.stat().st_ino
        device = lock.stat().st_dev
        lines = table.read_text().splitlines()
    except OSError:
        return False
    known = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    return any(f" {known} " in line and " FLOCK " in line for line in lines)


def _seconds_left(train: list[dict[str, Any]], steps: int) -> float | None:
    if len(train) < 2:
        return None
    first, last = train[max(len(train) - 20, 0)], train[-1]
    made = last["step"] - first["step"]
    if made <= 0:
        return None
    return (steps - last["step"]) * (last["seconds"] - first["seconds"]) / made


def _ago(event: dict[str, Any]) -> float:
    if event["boot"] == this_boot():
        return max(time.monotonic() - event["monotonic"], 0.0)
    return max(time.time() - event["time"], 0.0)


def _silent_secs(path: Path) -> float:
    names = ("metrics.jsonl", "events.jsonl", "config.json")
    times = [(path / n).stat().st_mtime for n in names if (path / n).exists()]
    return max(time.time() - max(times, default=time.time()), 0.0)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found
