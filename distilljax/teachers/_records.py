"""One row of a store as bytes: its units, and what is kept of each.

    uint32    number of units
    20 bytes  for each unit: key uint64, check uint32, positions uint32, size uint32
    bytes     what is kept of each, `size` bytes, one after the other

All numbers are little-endian. The first record of a shard says what is in the others:

    4 bytes   "DJXS"
    uint32    number of rows, which is that of the records behind it
    uint32    for each row: number of its units
    uint64    for each unit, row by row: its key
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from distilljax._checks import fail
from distilljax.data.units import Units

_ENTRY = np.dtype(
    [("key", "<u8"), ("check", "<u4"), ("positions", "<u4"), ("size", "<u4")]
)
_MAGIC = b"DJXS"
# Of an image, so many values tell whether it is the one that the teacher saw.
_VALUES_CHECKED = 1024


class Unit(NamedTuple):
    """What a store has of a unit."""

    key: int
    check: int
    positions: int
    data: bytes


def pack(units: Sequence[Unit]) -> bytes:
    """A row as a record."""
    entries = np.array(
        [(u.key, u.check, u.positions, len(u.data)) for u in units], _ENTRY
    )
    data = b"".join(u.data for u in units)
    return struct.pack("<I", len(units)) + entries.tobytes() + data


def unpack(record: bytes) -> list[Unit]:
    """The row of a record; ValueError if it is none."""
    try:
        (count,) = struct.unpack_from("<I", record)
        entries = np.frombuffer(record, _ENTRY, count, 4)
    except (struct.error, ValueError):
        _damaged("a record", "begin with its units", f"{len(record)} bytes")
    ends = 4 + entries.nbytes + np.cumsum(entries["size"], dtype=np.int64)
    total = int(ends[-1]) if count else 4
    if total != len(record):
        _damaged("a record", f"have {total} bytes", len(record))
    starts = (ends - entries["size"]).tolist()
    return [
        Unit(key, check, positions, record[start : start + size])
        for (key, check, positions, size), start in zip(
            entries.tolist(), starts, strict=True
        )
    ]


def pack_keys(keys: Sequence[np.ndarray]) -> bytes:
    """The first record of a shard, from the keys of each row."""
    counts = np.array([len(some) for some in keys], "<u4")
    joined = np.concatenate([np.zeros(0, np.int64), *keys]).astype("<u8")
    head = _MAGIC + struct.pack("<I", len(counts))
    return head + counts.tobytes() + joined.tobytes()


def unpack_keys(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The number of units of each row, and all keys, row by row."""
    if record[:4] != _MAGIC or len(record) < 8:
        _damaged("the first record", "begin with DJXS", repr(record[:4]))
    (rows,) = struct.unpack_from("<I", record, 4)
    if len(record) < 8 + 4 * rows:
        _damaged("the first record", f"have {rows} counts", f"{len(record)} bytes")
    counts = np.frombuffer(record, "<u4", rows, 8).astype(np.int64)
    size = 8 + 4 * rows + 8 * int(counts.sum())
    if len(record) != size:
        _damaged("the first record", f"have {size} bytes", len(record))
    keys = np.frombuffer(record, "<u8", offset=8 + 4 * rows).astype(np.int64)
    return counts, keys


def _damaged(what: str, rule: str, got: Any) -> NoReturn:
    fail("SignalStore", what, rule, got, "The store is damaged: write it again.")


def parts_of(units: Units, mask: np.ndarray) -> list[np.ndarray]:
    """Which positions of a row each of its units has a signal for.

    Args:
      units: Those of the row.
      mask: Which positions count, flat.
    """
    if units.places is None:
        return [np.flatnonzero(mask)]
    return [s.start + np.flatnonzero(mask[s]) for s in _spans(units.places)]


def _spans(places: np.ndarray) -> list[slice]:
    ends = np.cumsum(places)
    return list(map(slice, (ends - places).tolist(), ends.tolist()))


def checks_of(units: Units, example: Mapping[str, Any], mask: np.ndarray) -> list[int]:
    """A checksum of each unit as the teacher saw it: it tells another text apart.

    Args:
      units: Those of the row.
      example: The row; ``tokens``, or ``teacher_inputs`` or ``inputs``.
      mask: Which positions count, flat.
    """
    if "tokens" not in example:
        seen = example.get("teacher_inputs", example.get("inputs"))
        flat = np.ascontiguousarray(seen).reshape(-1)
        some = flat[:: max(1, len(flat) // _VALUES_CHECKED)]
        return [zlib.crc32(np.ascontiguousarray(some).tobytes())]
    tokens = np.ascontiguousarray(example["tokens"], np.int32).reshape(-1)
    seen = np.ascontiguousarray(mask, np.uint8)
    if units.places is None:
        return [zlib.crc32(seen.tobytes(), zlib.crc32(tokens.tobytes()))]
    return [
        zlib.crc32(seen[s].tobytes(), zlib.crc32(tokens[s].tobytes()))
        for s in _spans(units.places)
    ]


__all__ = [
    "Unit",
    "checks_of",
    "pack",
    "pack_keys",
    "parts_of",
    "unpack",
    "unpack_keys",
]
