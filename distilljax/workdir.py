"""The folder of a run: who may write in it, what it holds, and reading it back.

    config.json      the resolved config            metrics.jsonl    what was logged
    checkpoints/     see `checkpoints`              tensorboard/     the same, as events
    results.json     the student on test data       predictions.npz  example by example
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilljax._checks import fail
from distilljax._functional import split_module
from distilljax.checkpoints import Checkpoints
from distilljax.config import RESUMABLE, Config, differences, from_json, to_json
from distilljax.metrics import write_atomically
from distilljax.sharding import Rule, tree_shardings
from distilljax.typing import path_of


@contextlib.contextmanager
def claim(workdir: Path, config: Config) -> Iterator[None]:
    """Create the folder, or take it up again if it is of the same config; lock it.

    Raises:
      ValueError: the folder is of another config, in use, or not writable. Nothing in
        it has been changed then.
    """
    if jax.process_index() != 0:
        yield
        return
    saved = to_json(config)
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("a")
    except OSError as error:
        fail(
            "train",
            "--workdir",
            "be a folder that can be written",
            f"{str(workdir)!r} ({error.strerror})",
            "Choose another folder, or make room.",
        )
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(
                "train",
                "--workdir",
                "be used by one process at a time",
                repr(str(workdir)),
                "Another run writes there: wait for it, or choose another folder.",
            )
        if path.exists():
            _check_same(workdir, read_json(path), saved)
        elif any(p.name != ".lock" for p in workdir.iterdir()):
            fail(
                "train",
                "--workdir",
                "be empty or hold a run",
                f"{str(workdir)!r} with other files and no config.json",
                "Choose another folder.",
            )
        write_atomically(path, json.dumps(saved, indent=1) + "\n")
        yield


def _check_same(workdir: Path, old: Any, new: Any) -> None:
    changed = [
        line
        for line in differences(old, new)
        if line.split(":")[0].split(".")[0] not in RESUMABLE
    ]
    if changed:
        fail(
            "train",
            "--workdir",
            "be of the same config",
            f"{str(workdir)!r}, which differs in {'; '.join(changed[:5])}",
            "Choose another folder, or go back to that config to resume.",
        )


def read_json(path: Path) -> Any:
    """A JSON file, or an error that names it."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"read_json: {path} must be a JSON file, got an error: {error}. Restore it, "
            "or train into another folder."
        ) from error


def fingerprint(tree: Any) -> str:
    """A digest of the names, types and values of all arrays; equal on every host."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue  # random streams are not what the model is
        if not x.is_fully_addressable:
            from jax.experimental import multihost_utils

            x = multihost_utils.process_allgather(x, tiled=True)
        x = np.asarray(x)
        digest.update(f"{path_of(path)}:{x.dtype}:{x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TrainedRun:
    """The best student of a finished run, to be a teacher, or to be looked at.

    Example:
      >>> TrainedRun("runs/digits/teacher")(mesh)             # doctest: +SKIP
    """

    workdir: str
    """Folder of a finished run of `distilljax train`."""

    def __call__(
        self, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The module, its arrays restored straight onto the mesh (or one device)."""
        root = Path(self.workdir)
        if not (root / "results.json").exists():
            fail(
                "TrainedRun",
                "workdir",
                "hold a finished run (a folder with results.json)",
                repr(self.workdir),
                "Train it first: distilljax train CONFIG --workdir "
                f"{self.workdir}, or name another with --teacher.workdir.",
            )
        config: Config = from_json(read_json(root / "config.json"))
        trainable = config.trainable or nnx.Param
        abstract = nnx.eval_shape(lambda: config.student(nnx.Rngs(0)))
        graphdef, params, rest = split_module(abstract, trainable, training=False)
        field = "params" if config.ema_decay is None else "ema"
        like = {field: params, "rest": rest}
        if mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: device, like)
        else:
            shardings = tree_shardings(like, mesh, rules)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            like,
            shardings,
        )
        step = read_json(root / "results.json")["selected"]["step"]
        checkpoints = root / "checkpoints"
        found = Checkpoints(checkpoints).restore_student(step, like)
        return nnx.merge(graphdef, found[field], found["rest"])


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("distilljax", "jax", "jaxlib", "flax", "optax", "grain", "numpy")
    found = {"python": platform.python_version()}
    for name in (*names, "orbax-checkpoint"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """What a measured time was measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
        "cpu": _cpu_name(),
        "system": platform.system(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def today() -> str:
    """The date, as YYYY-MM-DD."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()
