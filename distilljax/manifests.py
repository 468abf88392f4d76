"""The files of a checkpoint: listed when it is complete, checked when it is read.

A file that was cut off, lost or changed since then is found here, before its numbers
are in a model: by sizes, and by SHA-256 digests.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

from distilljax._checks import fail
from distilljax.metrics import write_atomically
from distilljax.patience import note, patiently

NAME = "files.json"


def check_writable(directory: Path) -> None:
    """Say so before anything is computed, and not at the first checkpoint.

    Args:
      directory: Of the checkpoints; made if it is not there.
    """
    probe = directory / f".writable.{threading.get_ident()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        fail(
            "Checkpoints",
            "the folder of the checkpoints",
            "be one that can be written",
            f"{str(directory)!r} ({error.strerror})",
            "Make room, change its permissions, or choose another --workdir.",
        )


def write_manifest(folder: Path) -> None:
    """Write down the size and the digest of every file below a folder.

    Args:
      folder: A complete checkpoint.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     folder = Path(name)
      ...     _ = (folder / "a").write_text("abc")
      ...     write_manifest(folder)
      ...     before = damage(folder)
      ...     _ = (folder / "a").write_text("abd")
      ...     before, damage(folder)
      (None, 'a changed file, a')
    """
    found = {
        str(path.relative_to(folder)): patiently(partial(_described, path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    write_atomically(folder / NAME, json.dumps({"format": 1, "files": found}) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are as written.

    Also None without a manifest: a run that was killed right after it had written a
    checkpoint left none, and the checkpoint is whole.

    Args:
      folder: The checkpoint.
    """
    path = folder / NAME
    try:
        if not patiently(path.exists):
            return None
        files = json.loads(patiently(path.read_text))["files"]
        # sizes first: they cost nothing
        for name, written in files.items():
            if not patiently((folder / name).is_file):
                return f"a missing file, {name}"
            size = patiently((folder / name).stat).st_size
            if size != written["bytes"]:
                return f"{size} bytes instead of {written['bytes']} in {name}"
        for name, written in files.items():
            if patiently(partial(_described, folder / name)) != written:
                return f"a changed file, {name}"
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return f"a broken file, {NAME}"
    except OSError as error:
        return f"a file that cannot be read ({error.strerror}), {error.filename}"
    return None


def set_aside(folder: Path, why: str, good: int, *, move: bool) -> None:
    """Say that a checkpoint is damaged, and move it beside the others' folder.

    Args:
      folder: The checkpoint.
      why: What it is instead of complete.
      good: The step that is gone on from.
      move: False leaves it where it is: the folder is somebody else's.
    """
    words = f"the checkpoint of step {folder.name} must be complete, got {why}. "
    words += f"Going on from that of step {good}"
    if move:
        aside = folder.parent.with_name(f"{folder.parent.name}.damaged")
        patiently(partial(aside.mkdir, exist_ok=True))
        names = (f"{folder.name}.{i}" for i in itertools.count(1))
        target = aside / folder.name
        while target.exists():
            target = aside / next(names)
        patiently(partial(folder.replace, target))
        words += f"; the damaged one is now {target}"
    note(f"{words}.")


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}
