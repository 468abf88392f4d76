"""Writers to trackers of experiments: Weights & Biases, and trackio.

    distilljax train CONFIG --workdir W --log wandb,trackio

Each has its own variables for where it writes and as whom (`WANDB_PROJECT`,
`WANDB_MODE=offline`, `TRACKIO_PROJECT`, `TRACKIO_DIR`): nothing is configured twice.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from distilljax._checks import fail
from distilljax.metrics import Record, Writer, write_atomically
from distilljax.patience import patiently

TRACKERS = ("wandb", "trackio")


def load_trackers(names: Sequence[str]) -> dict[str, ModuleType]:
    """The modules of some trackers, by name; before a run begins.

    Args:
      names: Of `TRACKERS`.

    Raises:
      ValueError: there is no such tracker.
      ImportError: it is not installed; the message names the extra.
    """
    found = {}
    for name in names:
        if name not in TRACKERS:
            fail(
                "train",
                "--log",
                f"be some of {', '.join(TRACKERS)}",
                repr(name),
                "metrics.jsonl and tensorboard are always written.",
            )
        try:
            found[name] = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f"train: {name} must be installed for --log {name}, got no such "
                f'module. Run `pip install "distilljax[{name}]"`.'
            ) from error
    return found


class TrackerWriter(Writer):
    """Records to a module with `init`, `log` and `finish`, as both of them are.

    A run that is resumed goes on in the same run there: its id is kept beside its
    checkpoints. What was logged beyond the checkpoint is logged again, with the same
    values. A run of W&B that is offline when it is killed lacks what was in no whole
    block of 32 KiB yet: `metrics.jsonl` has that.

    Args:
      module: `wandb` or `trackio`.
      workdir: Folder of the run.
      project: Where it is filed, unless the tracker is told otherwise; what cannot be
        in a project's name, as the slash of a config's, becomes an underscore.
      config: The config, as JSON.
    """

    def __init__(
        self, module: Any, workdir: Path, project: str, config: Mapping[str, Any]
    ):
        self._module, project = module, _plain(project)
        own = _run_id(workdir, module.__name__)
        # trackio keeps names with an underscore to itself: only `_type` is one
        told = {name: x for name, x in config.items() if not name.startswith("_")}
        common = {"config": told, "resume": "allow"}
        if module.__name__ == "wandb":
            # of WANDB_PROJECT it hears only if no project is given
            options = {"id": own, "name": workdir.resolve().name, "dir": str(workdir)}
            named = os.environ.get("WANDB_PROJECT", project)
            module.init(project=named, **options, **common)
            # else what is logged again after a kill would be dropped for its step
            module.define_metric("*", step_metric="step")
        else:
            named = os.environ.get("TRACKIO_PROJECT", project)
            module.init(project=named, name=own, **common)

    def write(self, record: Record) -> None:
        """Numbers of a record by split and name; what is not finite is left out."""
        split = record["split"]
        numbers = {
            f"{split}/{name}": value
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
            if math.isfinite(value)
        }
        if self._module.__name__ == "wandb":
            self._module.log({**numbers, "step": record["step"]})
        else:
            self._module.log(numbers, step=record["step"])

    def close(self) -> None:
        """Send what is left."""
        self._module.finish()


def _run_id(workdir: Path, tracker: str) -> str:
    """Under which name the run is known there, over all its restarts."""
    path = workdir / f"{tracker}_run.txt"
    if not path.exists():
        new = f"{workdir.resolve().name}-{secrets.token_hex(4)}"
        write_atomically(path, _plain(new) + "\n")
    return patiently(path.read_text).strip()


def _plain(name: str) -> str:
    """A name of characters that both trackers take.

    Example:
      >>> _plain("digits/teacher")
      'digits_teacher'
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
