"""Asking a teacher once: from a config to a store that students are trained from.

    cache(config, "runs/store", logits=Sampled(50))

A store is written in shards, each of which appears when it is complete. A job that was
killed goes on with the shards that are missing, with any number of processes, and ends
in the same bytes. `manifest.json` is written last: without it there is no store.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from distilljax._checks import check_count, fail
from distilljax.asking import Asked
from distilljax.config import Config
from distilljax.data.array_record import write_records
from distilljax.data.text.progress import Progress, show_progress
from distilljax.data.units import num_units
from distilljax.describing import check_same, described_of, head_of, write_head
from distilljax.learnable import check_learnable
from distilljax.metrics import write_atomically
from distilljax.programs import Programs
from distilljax.sharding import mesh_from_string
from distilljax.teachers._records import pack_keys
from distilljax.teachers.cached import CachedTeacher, check_unaugmented
from distilljax.teachers.signals import Kind
from distilljax.teachers.store import (
    HEAD,
    MANIFEST,
    digest_of,
    read_manifest,
    sha256_of,
)
from distilljax.verifying import coding_kl
from distilljax.workdir import locked, read_json, today, versions

# A killed job loses a shard: a 64th of the work, but a file is not very small or large.
_SHARDS, _SHARD_BYTES = 64, (2**20, 2**26)
_WRITING = "writing.json"


def cache(
    config: Config,
    out: str | Path,
    *,
    logits: Kind | None,
    features: Sequence[str] = (),
    shard_rows: int | None = None,
    programs: Programs | None = None,
    progress: Progress = show_progress,
) -> dict[str, Any]:
    """Ask the teacher of a config about its training data, and keep what it says.

    Args:
      config: Its teacher, its data, and its loader's batches without augmentation.
      out: Folder of the store. One that was begun goes on; one that is finished is left
        as it is.
      logits: What is kept of the logits; None: nothing.
      features: Names of the features that are kept, as objectives name them.
      shard_rows: Rows in a shard; None: a 64th of them, and at most 64 MiB.
      programs: Compiled programs to share.
      progress: Shows how far it is.

    Returns:
      The manifest.

    Raises:
      ValueError: The config cannot be cached, or the folder is of another store.

    Example:
      >>> import tempfile
      >>> from distilljax import data, models, objectives, students
      >>> from distilljax.data import text
      >>> from distilljax.teachers import Hidden
      >>> texts = text.Tokenized(text.Texts(("By the sea.",)), text.ByteTokenizer())
      >>> config = Config(
      ...     name="example",
      ...     student=None,
      ...     teacher=students.Untrained(models.DecoderConfig(264, 8, 1, 1, 1, 8, 8)),
      ...     objective=objectives.LogitKD(),
      ...     data=text.Packed(texts, context=16),
      ...     loader=data.Loader(batch_size=1),
      ...     steps=1,
      ...     eval_batch_size=8,
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     manifest = cache(config, f"{folder}/store", logits=Hidden())
      >>> manifest["counts"]["positions"], manifest["signal"]["shape"]
      (11, [16])
    """
    _check(config, logits, features)
    if shard_rows is not None:
        check_count("cache", "shard_rows", shard_rows)
    if isinstance(config.teacher, CachedTeacher):  # its students' config will do
        config = replace(config, teacher=config.teacher.teacher)
    out, mesh = Path(out), mesh_from_string(config.mesh)
    with _alone(out), jax.set_mesh(mesh):
        names = tuple(sorted(set(features)))
        asked = Asked.of(config, mesh, logits, names, programs or Programs())
        check_learnable(config.objective, logits, asked.kept.num_classes, names)
        described = described_of(asked)
        rows = _begun_rows(out) if shard_rows is None else shard_rows
        described["shard_rows"] = rows or _shard_rows(asked)
        if (done := _finished(out, described)) is not None:
            return done
        _begin(out, described)
        rows = described["shard_rows"]
        shards = [
            _Shard(number, np.arange(start, min(start + rows, len(asked.cover))))
            for number, start in enumerate(range(0, len(asked.cover), rows))
        ]
        described["coding_kl"] = coding_kl(asked)
        _write(asked, out, shards, progress)
        return _finish(asked, out, described, shards)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Process 0 holds the folder for all; if it cannot, none waits for it."""
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locked(out, (MANIFEST, _WRITING), "cache", "--out"))
            except ValueError as found:
                error = found
        if _agreed([error is not None])[0] and error is None:
            error = ValueError(
                "cache: --out must be usable for process 0, got an error there. "
                "Process 0 has printed it."
            )
        if error is not None:
            raise error
        yield


def _check(config: Config, logits: Kind | None, features: Sequence[str]) -> None:
    if logits is None and not features:
        remedy = "Pass logits=Sampled(50), say."
        fail("cache", "signal", "be of logits, features, or both", "neither", remedy)
    remedy = "Name the one that is to be asked."
    teacher = config.teacher
    if isinstance(teacher, CachedTeacher):
        teacher = teacher.teacher
        remedy = "Name the teacher: CachedTeacher(..., teacher=...); or another --arm."
    if teacher is None or isinstance(teacher, Mapping):
        got = "none" if teacher is None else f"{len(teacher)} of them"
        fail("cache", "the config's teacher", "be a single one", got, remedy)
    check_unaugmented("cache", config.loader)


# --- shards ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """Some of the rows, in one file."""

    number: int
    rows: np.ndarray

    @property
    def file(self) -> str:
        """Its name."""
        return f"shard-{self.number:05d}.array_record"

    @property
    def complete(self) -> str:
        """The name of what says that it is complete, until the manifest does."""
        return f"shard-{self.number:05d}.json"

    def is_complete(self, out: Path) -> bool:
        """Whether it is there, as it was written, with the rows that it shall have."""
        if not (out / self.complete).is_file() or not (out / self.file).is_file():
            return False
        known = read_json(out / self.complete)
        same = known["bytes"] == (out / self.file).stat().st_size
        return same and known["rows"] == len(self.rows)


def _write(asked: Asked, out: Path, shards: list[_Shard], progress: Progress) -> None:
    """Write what is missing: each process a shard, and all run the teacher together."""
    there = _agreed([shard.is_complete(out) for shard in shards])
    todo = [shard for shard, done in zip(shards, there, strict=True) if not done]
    done, left = 0, sum(len(shard.rows) for shard in todo)
    index, count = asked.reader["process_index"], asked.reader["process_count"]
    with progress("asking the teacher", left, "rows that are left") as advance:
        for start in range(0, len(todo), count):
            some = todo[start : start + count]
            num_batches = -(-max(len(s.rows) for s in some) // asked.batch_size)

            def step(rows: int, before: int = done, times: int = len(some)) -> None:
                advance(min(before + rows * times, left))

            if index < len(some):
                _write_shard(asked, out, some[index], num_batches, step)
            else:  # it helps to compute
                for _ in asked.said(some[0].rows, num_batches):
                    pass
            done += sum(len(shard.rows) for shard in some)
    _wait("written")


def _write_shard(
    asked: Asked, out: Path, shard: _Shard, num_batches: int, advance: Any
) -> None:
    counts = {"rows": 0, "units": 0, "positions": 0}
    widest = 1

    def records() -> Iterator[bytes]:
        nonlocal widest
        yield pack_keys([asked.cover.units(row).keys for row in shard.rows.tolist()])
        for batch, said in asked.said(shard.rows, num_batches):
            if "ids" in said["logits"]:
                widest = max(widest, _most_distinct(said["logits"]["ids"]))
            yield from asked.records(batch, said, counts)
            advance(counts["rows"])

    path = out / shard.file
    write_records(path, records())
    described = {"file": shard.file, "bytes": path.stat().st_size}
    described |= {"sha256": sha256_of(path), **counts, "max_distinct": widest}
    write_atomically(out / shard.complete, json.dumps(described) + "\n")


def _most_distinct(ids: np.ndarray) -> int:
    """The most different ids at a position."""
    ordered = np.sort(ids, axis=-1)
    return 1 + int((ordered[..., 1:] != ordered[..., :-1]).sum(axis=-1).max(initial=0))


def _agreed(there: list[bool]) -> list[bool]:
    """What process 0 finds: all processes must write as many shards."""
    if jax.process_count() == 1:
        return there
    return multihost_utils.broadcast_one_to_all(np.array(there)).tolist()


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"distilljax cache {name}")


# --- what the store says of itself ----------------------------------------------------


def _begun_rows(out: Path) -> int | None:
    """Rows in a shard of what is there already; None: nothing is."""
    for name in (MANIFEST, _WRITING):
        if (out / name).is_file():
            return read_json(out / name)["shard_rows"]
    return None


def _shard_rows(asked: Asked) -> int:
    """So many that not much is ever lost, and files are neither small nor large."""
    some = np.arange(min(asked.batch_size, len(asked.cover)))
    counts = {"rows": 0, "units": 0, "positions": 0}
    ((batch, said),) = asked.said(some, 1)
    row = sum(map(len, asked.records(batch, said, counts))) / len(some)
    least, most = (max(1, int(size / row)) for size in _SHARD_BYTES)
    rows = min(max(-(-len(asked.cover) // _SHARDS), least), most)
    if jax.process_count() > 1:
        rows = int(multihost_utils.broadcast_one_to_all(np.int32(rows)))
    return -(-rows // asked.config.eval_batch_size) * asked.config.eval_batch_size


def _begin(out: Path, described: dict[str, Any]) -> None:
    """Write down what is written, or compare with what was begun."""
    path = out / _WRITING
    if path.is_file():
        check_same(path, read_json(path), described)
    elif jax.process_index() == 0:
        write_atomically(path, json.dumps(described, indent=1) + "\n")
    if jax.process_index() == 0:
        for left in (*out.glob(".*.incomplete-*"), *out.glob(".*.tmp")):
            left.unlink()  # by a process that was killed: this one has the lock
    _wait("begun")


def _finished(out: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest; None if there is none, or files are missing: then it is begun."""
    if not _agreed([(out / MANIFEST).is_file()])[0]:
        return None
    manifest = read_manifest(out)
    before = copy.deepcopy(manifest)
    widest = (before["signal"]["logits"] or {}).pop("max_distinct", 1)
    check_same(out / MANIFEST, before, described)
    files = [*manifest["shards"], *([manifest["head"]] if manifest["head"] else [])]
    names = [file.get("file", HEAD) for file in files]
    there = _agreed(
        [
            path.is_file() and path.stat().st_size == file["bytes"]
            for path, file in zip((out / name for name in names), files, strict=True)
        ]
    )
    if all(there):
        return {**manifest, "already_finished": True}
    _wait("read")
    if jax.process_index() == 0:
        for shard, is_there in zip(manifest["shards"], there, strict=False):
            path = (out / shard["file"]).with_suffix(".json")
            path.unlink(missing_ok=True)
            if is_there:
                text = json.dumps({**shard, "max_distinct": widest}) + "\n"
                write_atomically(path, text)
        write_atomically(out / _WRITING, json.dumps(described, indent=1) + "\n")
        (out / MANIFEST).unlink()
    return None


def _finish(
    asked: Asked, out: Path, described: dict[str, Any], shards: list[_Shard]
) -> dict[str, Any]:
    """The head, and the manifest, which makes it a store."""
    head = head_of(asked)
    if jax.process_index() == 0:
        found = [read_json(out / shard.complete) for shard in shards]
        rows, units = (sum(shard[key] for shard in found) for key in ("rows", "units"))
        if rows != len(asked.cover) or units != num_units(asked.source):
            raise RuntimeError(
                f"cache: {rows} rows and {units} units, which is not all"
            )
        widest = max(shard.pop("max_distinct") for shard in found)
        if described["signal"]["logits"] is not None:
            described["signal"]["logits"]["max_distinct"] = widest
        described["head"] = None if head is None else write_head(out, head)
        described["counts"] = {
            name: sum(shard[name] for shard in found)
            for name in ("rows", "units", "positions", "bytes")
        }
        described |= {"versions": versions(), "date": today(), "shards": found}
        described["digest"] = digest_of(described)
        text = json.dumps(described, indent=1) + "\n"
        write_atomically(out / MANIFEST, text)
        for name in (_WRITING, *(shard.complete for shard in shards)):
            (out / name).unlink(missing_ok=True)
    _wait("finished")
    return read_json(out / MANIFEST)


__all__ = ["cache"]
