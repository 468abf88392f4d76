"""The folder of a run: who may write in it, what it holds, and reading it back.

config.json      the resolved config            metrics.jsonl    what was logged
checkpoints/     see `checkpoints`              tensorboard/     the same, as events
events.jsonl     starts, checkpoints, stops     profile/         traces for XProf
results.json     the student on test data       predictions.npz  example by example
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from distilljax._checks import fail
from distilljax._functional import split_module
from distilljax.checkpoints import Checkpoints
from distilljax.config import from_json
from distilljax.patience import patiently
from distilljax.resume import differences, resumable
from distilljax.sharding import Rule, tree_shardings
from distilljax.typing import path_of


@contextlib.contextmanager
def claim(workdir: Path, saved: Any) -> Iterator[None]:
    """Lock the folder for a run of this config: a new one, or one to take up again.

    Process 0 does it and tells the others, so that none waits for one that has failed.

    Args:
      workdir: The folder.
      saved: The config as JSON.

    Raises:
      ValueError: the folder is of another config, in use, or not writable. Nothing in
        it has been changed then.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locked(workdir, ["config.json"]))
                check_same(workdir, saved)
            except ValueError as found:
                error = found
        if jax.process_count() > 1:
            failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
            if failed and error is None:
                error = ValueError(
                    "train: --workdir must be usable for process 0, got an error "
                    "there. Process 0 has printed it."
                )
        if error is not None:
            raise error
        yield


# What a run writes as a whole, under a temporary name first.
WRITTEN = ("config.json", "results.json", "predictions.npz", "metrics.jsonl")


def remove_half_written(workdir: Path) -> None:
    """Remove what killed runs left of files that they were writing.

    Args:
      workdir: The folder, whose lock is held: nobody is writing them now.
    """
    for name in WRITTEN:
        for path in workdir.glob(f".{name}.*.tmp"):
            patiently(functools.partial(path.unlink, missing_ok=True))


def check_same_student(workdir: Path, saved: Any) -> None:
    """Raise if the run in a folder has another student than a config, given as JSON."""
    old = read_json(workdir / "config.json")
    parts = ("student", "trainable", "ema_decay")
    changed = differences({p: old[p] for p in parts}, {p: saved[p] for p in parts})
    if changed:
        listed = "; ".join(f"{path}: {change}" for path, change in changed.items())
        fail(
            "evaluate",
            "--workdir",
            "hold a run of the config's student",
            f"{str(workdir)!r}, which differs in {listed}",
            "Name the config and the arm with which it was trained.",
        )


@contextlib.contextmanager
def locked(
    folder: Path,
    markers: Sequence[str],
    function: str = "train",
    argument: str = "--workdir",
) -> Iterator[None]:
    """Have a folder to oneself: a new one, or one that holds one of the markers.

    Args:
      folder: The folder; made if it is not there, and removed again if it stays empty.
      markers: Files that tell what is in it.
      function: Who asks, for messages.
      argument: What names the folder, for messages.

    Raises:
      ValueError: it is in use, not writable, or somebody's files. Nothing in it has
        been changed then.
    """
    _check_place(folder, markers, function, argument)
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        fail(
            function,
            argument,
            "be a folder that can be written",
            f"{str(folder)!r} ({error.strerror})",
            "Choose another folder, or make room.",
        )
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(
                function,
                argument,
                "be used by one process at a time",
                repr(str(folder)),
                "Another run writes there: wait for it, or choose another folder.",
            )
        try:
            yield
        finally:
            if not any(p.name != ".lock" for p in folder.iterdir()):
                # refused before anything was written: as if it had not been asked for
                (folder / ".lock").unlink()
                for empty in new:
                    with contextlib.suppress(OSError):  # another run is beside it
                        empty.rmdir()


def _check_place(
    folder: Path, markers: Sequence[str], function: str, argument: str
) -> None:
    """A folder for a run: not a bucket, not in another run, not somebody's files."""
    if re.match(r"[a-z0-9]+:/", str(folder)):
        given = str(folder).replace(":/", "://", 1)  # a Path has one slash of the two
        fail(
            function,
            argument,
            "be a path",
            repr(given),
            "Mount the bucket, and name the path under which it is mounted.",
        )
    locks = (p for p in folder.resolve().parents if (p / ".lock").exists())
    runs = (p for p in locks if (p / "config.json").exists())
    if (run := next(runs, None)) is not None:
        fail(
            function,
            argument,
            "lie outside of other runs",
            f"{str(folder)!r} in the run {str(run)!r}",
            "Choose a folder beside it.",
        )
    # the lock of a new folder is the first thing written: not into somebody's files
    if folder.is_dir() and not any((folder / name).exists() for name in markers):
        files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
        if (first := next(files, None)) is not None:
            what = "a run" if function == "train" else "a store"
            fail(
                function,
                argument,
                f"be empty or hold {what}",
                f"{str(folder)!r} with {first.name!r} and no {markers[0]}",
                "Choose another folder.",
            )


def check_same(workdir: Path, new: Any, argument: str = "--workdir") -> None:
    """Raise if a run has a config that another one cannot go on from.

    Args:
      workdir: Folder of the run; of a new one nothing is known.
      new: The config as JSON.
      argument: What names the folder, for messages.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    found = differences(read_json(path), new)
    changed = [
        f"{path}: {values}" for path, values in found.items() if not resumable(path)
    ]
    if changed:
        fail(
            "train",
            argument,
            "be of the same config",
            f"{str(workdir)!r}, which differs in {'; '.join(changed[:10])}",
            "Choose another folder, or go back to that config to resume.",
        )


def read_json(path: Path) -> Any:
    """A JSON file, or an error that names it."""
    try:
        return json.loads(patiently(path.read_text))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"read_json: {path} must be a JSON file, got an error: {error}. Restore "
            "it, or train into another folder."
        ) from error


def fingerprint(tree: Any) -> str:
    """A digest of the names, types and values of all arrays; equal on every host."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue  # random streams are not what the model is
        if not x.is_fully_addressable:
            with jax.set_mesh(x.sharding.mesh):  # a teacher's may be another one
                x = multihost_utils.process_allgather(x, tiled=True)
        x = np.asarray(x)
        digest.update(f"{path_of(path)}:{x.dtype}:{x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TrainedRun:
    """The best student of a finished run, to be a teacher, or to be looked at.

    It needs the folder, and of the saved config only what makes the model. A student
    that was made of another model (`students.KeptLayers`, say) reads that one's files
    again, for its structure.
    """

    workdir: str
    """Folder of a finished run of `distilljax train`."""

    def untrained(self) -> Any:
        """What makes the same shapes from the saved config alone, for a plan."""
        config = Path(self.workdir) / "config.json"
        self._check_trained(config)
        return from_json(read_json(config)["student"])

    def __call__(
        self, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The module, its arrays restored straight onto the mesh (or one device)."""
        root = Path(self.workdir)
        self._check_trained(root / "results.json")
        saved = read_json(root / "config.json")
        make = from_json(saved["student"])
        trainable = from_json(saved["trainable"]) or nnx.Param
        abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        graphdef, params, rest = split_module(abstract, trainable, training=False)
        field = "params" if saved["ema_decay"] is None else "ema"
        like = placed({field: params, "rest": rest}, mesh, rules)
        step = read_json(root / "results.json")["selected"]["step"]
        checkpoints = Checkpoints(root / "checkpoints", read_only=True)
        found = checkpoints.restore_student(step, like)
        return nnx.merge(graphdef, found[field], found["rest"])

    def _check_trained(self, file: Path) -> None:
        if not file.exists():
            fail(
                "TrainedRun",
                "workdir",
                "hold a finished run (a folder with results.json)",
                repr(self.workdir),
                "Train it first: distilljax train CONFIG --workdir "
                f"{self.workdir}, or name another with --teacher.workdir.",
            )


def placed(
    abstract: Any, mesh: Mesh | None, rules: Sequence[Rule], min_size: int = 1024
) -> Any:
    """Shapes with the sharding that each array is to have, for a checkpoint to fill."""
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    else:
        shardings = tree_shardings(abstract, mesh, rules, min_size=min_size)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
    )


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
