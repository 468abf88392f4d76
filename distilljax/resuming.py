"""Whether a run takes its folder up again, or goes on from where another run was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from distilljax._checks import fail
from distilljax.checkpoints import Checkpoints
from distilljax.workdir import check_same

# What a run does with a folder: take up its own part, or refuse one; or go on from the
# checkpoint of another run.
Resume = Path | Literal["auto", "never"]


def check_resume(resume: Resume, workdir: Path, saved: Any) -> None:
    """Raise if a folder is not to be taken up, or another run cannot be gone on from.

    Args:
      resume: What was asked for.
      workdir: The folder of the run.
      saved: The config as JSON.
    """
    root = workdir / "checkpoints"
    steps = [p.name for p in root.glob("*") if p.name.isdigit()]
    if resume == "never" and (steps or (workdir / "results.json").exists()):
        fail(
            "train",
            "--workdir",
            "hold no run for --resume never",
            f"{str(workdir)!r} with {len(steps)} checkpoints",
            "Choose another folder, remove that one, or go on with --resume auto.",
        )
    if not isinstance(resume, Path):
        return
    other, _ = other_run(resume)
    if other.resolve() == workdir.resolve():
        fail(
            "train",
            "--resume",
            "name another run than that of --workdir",
            repr(str(resume)),
            "A run goes on in its own folder by itself: leave --resume out.",
        )
    check_same(other, saved, "--resume")


def other_run(path: Path) -> tuple[Path, int | None]:
    """The folder of a run, and the step, of what names one of its checkpoints or it.

    Args:
      path: A workdir, or its `checkpoints/STEP`.
    """
    step = None
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent.parent, int(path.name)
    if not (path / "config.json").exists() or not (path / "checkpoints").is_dir():
        fail(
            "train",
            "--resume",
            "be auto, never, or the folder of a run with checkpoints",
            repr(str(path)),
            "Name a workdir of distilljax train, or one of its checkpoints/STEP.",
        )
    root = path / "checkpoints"
    if step is not None and not (root / str(step)).is_dir():
        steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())
        listed = ", ".join(map(str, steps)) or "none"
        fail(
            "train",
            "--resume",
            "name a checkpoint that is there",
            repr(str(root / str(step))),
            f"Those of this run are of steps: {listed}.",
        )
    return path, step


def restore_other(path: Path, like: Any) -> tuple[str, tuple[int, Any, Any]]:
    """Where another run's checkpoint lies; and its step, its state and its meta.

    Args:
      path: Its workdir, for the newest good one, or `checkpoints/STEP` of it.
      like: As for `Checkpoints.restore`.
    """
    root, step = other_run(path)
    checkpoints = Checkpoints(root / "checkpoints", read_only=True)
    if step is None:
        found = checkpoints.restore_newest(like)
    else:
        found = step, *checkpoints.restore(step, like)
    if found is None:
        fail(
            "train",
            "--resume",
            "name a run with a checkpoint",
            repr(str(path)),
            "Name a workdir of distilljax train, or one of its checkpoints/STEP.",
        )
    return str((root / "checkpoints" / str(found[0])).resolve()), found
