"""A store of a teacher's signal on disk: its manifest, its shards, and reading it.

    manifest.json                what the store is; written last, and so the commit
    head.bin                     the kernel of the teacher's head, for hidden states
    shard-00000.array_record     rows; the first record says which units they have

`caching.cache` writes it; docs/store_format.md has the format in full.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distilljax._checks import fail
from distilljax.data.array_record import open_records
from distilljax.data.text.progress import Progress, show_progress
from distilljax.teachers._records import Unit, unpack, unpack_keys
from distilljax.teachers.signals import KINDS, Arrays, Coding, Kind, Raw

FORMAT = 1
MANIFEST = "manifest.json"
HEAD = "head.bin"
# Rows that were read stay in memory, up to so many bytes.
KEPT_BYTES = 2**30
# So many shards are open at once.
_OPEN_FILES = 64


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The digest that a manifest carries of all else in it."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """The digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a store, or an error that says what is wrong with it."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        started = (Path(folder) / "writing.json").is_file()
        fail(
            "CachedTeacher",
            "store",
            f"be a folder with a {MANIFEST}",
            f"{str(folder)!r}" + (", which is not finished" if started else ""),
            "Run the command that wrote it again: it goes on where it was."
            if started
            else "Write it: distilljax cache CONFIG --out DIR.",
        )
    try:
        manifest = json.loads(path.read_text())
        found, known = manifest["format"], digest_of(manifest) == manifest["digest"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        fail(
            "CachedTeacher",
            str(path),
            "be the manifest of a store",
            f"an error, {error!r}",
            "It is truncated or damaged: restore it, or write the store again.",
        )
    if found != FORMAT:
        fail(
            "CachedTeacher",
            str(path),
            f"be of format {FORMAT}",
            found,
            "Use the version of distilljax that wrote it, or write it again.",
        )
    if not known:
        fail(
            "CachedTeacher",
            str(path),
            "have the digest that it carries",
            "another one",
            "It was changed or damaged: restore it, or write the store again.",
        )
    return manifest


class SignalStore:
    """A store, opened: every unit's signal by its key.

    Args:
      folder: Where it lies.
      verify: Compare the checksum of every file, at about 1 GB/s; False compares sizes,
        and what ArrayRecord itself checks of a record that is read.
      progress: Shows how many files were checked.

    Attributes:
      manifest: What is in `manifest.json`.

    Example:
      >>> SignalStore("nowhere")    # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: CachedTeacher: store must be a folder with a manifest.json, got ...
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        verify: bool = True,
        progress: Progress = show_progress,
    ):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self._check_files(verify, progress)
        self._opened: dict[int, Any] = {}
        self._kept: dict[tuple[int, int], list[Unit]] = {}
        self._kept_bytes = 0

    @property
    def digest(self) -> str:
        """Of what is in the store, whoever wrote it, and when."""
        said = ("signal", "teacher", "tokenizer", "data", "shards", "head")
        return digest_of({name: self.manifest[name] for name in said})

    @cached_property
    def kind(self) -> Kind | None:
        """What is kept of the logits; None: nothing."""
        described = self.manifest["signal"]["logits"]
        if described is None:
            return None
        if described["kind"] not in KINDS:
            fail(
                "CachedTeacher",
                str(self.folder),
                f"have signals of a kind that is known, {', '.join(KINDS)}",
                repr(described["kind"]),
                "Use the version of distilljax that wrote it.",
            )
        values = described["options"]
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        make: Any = KINDS[described["kind"]]
        return make(**options)

    @cached_property
    def coding(self) -> Coding | None:
        """How the signal of the logits is coded."""
        if self.kind is None:
            return None
        described = self.manifest["signal"]["logits"]
        layout = _layout(described["arrays"])
        width = described["max_distinct"]
        return self.kind.coding(described["num_classes"], layout, width)

    @cached_property
    def features(self) -> dict[str, tuple[Raw, bool]]:
        """How each feature is stored, and whether it is there for each position."""
        return {
            name: (Raw(_layout({name: d})), d["per_position"])
            for name, d in sorted(self.manifest["signal"]["features"].items())
        }

    @cached_property
    def head(self) -> dict[str, Any] | None:
        """The arrays and numbers of the teacher's head; None without hidden states."""
        described = self.manifest["head"]
        if described is None:
            return None
        data = (self.folder / HEAD).read_bytes()
        found = dict(described["numbers"])
        for a in described["arrays"]:
            count = int(np.prod(a["shape"], dtype=np.int64))
            flat = np.frombuffer(data, np.dtype(a["dtype"]), count, a["offset"])
            found[a["name"]] = flat.reshape(a["shape"])
        return found

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each key: its shard, the record there, and its place in that."""
        size = self.manifest["counts"]["units"]
        found = [np.full(size, -1, np.int32) for _ in range(3)]
        for number in range(len(self.manifest["shards"])):
            counts, keys = self._read(number, lambda r: unpack_keys(r[0]))
            if len(keys) and (keys.min() < 0 or keys.max() >= size):
                self._damaged(number, "a key that is no unit's")
            found[0][keys] = number
            found[1][keys] = np.repeat(np.arange(1, len(counts) + 1), counts)
            ends = np.cumsum(counts)
            found[2][keys] = np.arange(len(keys)) - np.repeat(ends - counts, counts)
        return found[0], found[1], found[2]

    def units(self, keys: np.ndarray) -> list[Unit]:
        """What the store has of some units, in their order.

        Args:
          keys: Their numbers.

        Raises:
          ValueError: A key is in no shard, or a shard is damaged.
        """
        shards, records, places = (column[keys] for column in self._index)
        if (missing := np.flatnonzero(shards < 0)).size:
            fail(
                "CachedTeacher",
                str(self.folder),
                "have a signal for every unit of the data",
                f"none for unit {keys[missing[0]]}",
                "Write the store from the data that the student is trained on.",
            )
        wanted = list(zip(shards.tolist(), records.tolist(), strict=True))
        rows = self._rows(list(dict.fromkeys(wanted)))
        found = [
            rows[row][place] for row, place in zip(wanted, places.tolist(), strict=True)
        ]
        for unit, key, (number, _) in zip(found, keys.tolist(), wanted, strict=True):
            if unit.key != key:
                self._damaged(number, f"unit {unit.key} where {key} should be")
        return found

    def _rows(
        self, wanted: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], list[Unit]]:
        """Records by shard and number, unpacked; those that are kept, from memory."""
        rows = {row: self._kept[row] for row in wanted if row in self._kept}
        by_shard: dict[int, list[int]] = {}
        for number, record in wanted:
            if (number, record) not in rows:
                by_shard.setdefault(number, []).append(record)
        for number, some in by_shard.items():
            read = self._read(
                number,
                lambda records, some=some: [
                    (unpack(r), len(r)) for r in records.__getitems__(some)
                ],
            )
            for record, (units, size) in zip(some, read, strict=True):
                rows[number, record] = units
                if self._kept_bytes + size <= KEPT_BYTES:
                    self._kept[number, record] = units
                    self._kept_bytes += size
        return rows

    def decode(self, units: Sequence[Unit]) -> tuple[Arrays, dict[str, Arrays]]:
        """The arrays of the logits' signal at all positions, and those of features."""
        positions = np.array([unit.positions for unit in units], np.int64)
        found: dict[str, Arrays] = {}
        starts = np.zeros(len(units), np.int64)
        for name, (raw, per_position) in self.features.items():
            counts = positions if per_position else np.ones_like(positions)
            ends = starts + counts * raw.size(1)
            spans = zip(units, starts.tolist(), ends.tolist(), strict=True)
            found[name] = raw.decode([u.data[i:j] for u, i, j in spans], counts)
            starts = ends
        if self.coding is None:
            return {}, found
        rest = [u.data[i:] for u, i in zip(units, starts.tolist(), strict=True)]
        return self.coding.decode(rest, positions), found

    def _read(self, number: int, read: Callable[[Any], Any]) -> Any:
        """Something of a shard's records, or an error that names the shard."""
        try:
            if number not in self._opened:
                if len(self._opened) >= _OPEN_FILES:
                    self._opened.pop(next(iter(self._opened)))
                self._opened[number] = open_records(self._path(number))
            return read(self._opened[number])
        except (RuntimeError, IndexError, ValueError) as error:
            self._damaged(number, f"an error: {error}", error)

    def _path(self, number: int) -> Path:
        return self.folder / self.manifest["shards"][number]["file"]

    def _damaged(self, number: int, got: str, cause: Exception | None = None) -> Any:
        try:
            fail(
                "CachedTeacher",
                f"the shard {str(self._path(number))!r}",
                "be as it was written",
                got,
                "Remove it, and run the command that wrote the store again: it writes "
                "what is missing.",
            )
        except ValueError as error:
            raise error from cause

    def _check_files(self, verify: bool, progress: Progress) -> None:
        files = [(s["file"], s) for s in self.manifest["shards"]]
        if self.manifest["head"] is not None:
            files.append((HEAD, self.manifest["head"]))
        with progress("checking the store", len(files), "files") as advance:
            for number, (name, described) in enumerate(files, start=1):
                self._check_file(self.folder / name, described, verify)
                advance(number)

    def _check_file(self, path: Path, described: Any, verify: bool) -> None:
        if not path.is_file():
            got = "no such file"
        elif (size := path.stat().st_size) != described["bytes"]:
            got = f"{size} bytes, not {described['bytes']}"
        elif verify and sha256_of(path) != described["sha256"]:
            got = "other bytes: its checksum differs"
        else:
            return
        fail(
            "CachedTeacher",
            f"the file {str(path)!r}",
            "be as it was written",
            got,
            "Restore it; or remove it, and run the command that wrote the store again: "
            "it writes what is missing.",
        )


def _layout(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """In the order of names, whatever that of the manifest is."""
    return {n: (a["dtype"], tuple(a["shape"])) for n, a in sorted(arrays.items())}


__all__ = ["SignalStore", "digest_of", "read_manifest", "sha256_of"]
