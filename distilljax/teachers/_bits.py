"""Numbers of a few bits, and sets of ids, packed into bytes and read back together.

Everything here works on whole arrays, and reading on all records of a batch at once: a
record may be a dozen tokens, and a loop over records would cost more than their bits.

Bits are numbered from the lowest: bit i of a section is bit i mod 8 of its byte
i div 8, with value 2^(i mod 8), and numbers are written lowest bit first. A section
begins on a byte, and the bits that fill up its last byte are 0.

A set is written as Elias and Fano do. Each id is cut in two. The low bits, ``width`` of
them, are written as they are. The high parts rise slowly, and are written as their
steps in unary: as many zeros as the step, and a one for the id. That takes about 2 bits
for an id beside its low ones, half a bit more than the least possible. A set ends with
its last one: the reader knows how many ids it has, and the next begins right behind.

Reference: Elias, "Efficient storage and retrieval by content and address of static
files", Journal of the ACM, 1974. Fano, "On the number of bits required to implement an
associative memory", MIT, 1971.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8, UInt32

from distilljax._checks import fail

MAX_WIDTH = 24
"""Of a number: together with its place in a byte it fits into a word of 32 bits."""

_SPARE = bytes(4)  # the last number is read with the word that begins in its byte


@dataclass(frozen=True, eq=False)
class Joined:
    """Records one behind the other, so that one operation reads all of them.

    Attributes:
      data: Their bytes, and a few spare ones.
      starts: Where each record begins, or what has not been read of it.
      ends: Where each ends.
    """

    data: UInt8[np.ndarray, " bytes"]
    starts: Int64[np.ndarray, " records"]
    ends: Int64[np.ndarray, " records"]


def join(records: Sequence[bytes]) -> Joined:
    """Records as one array.

    Example:
      >>> joined = join([b"ab", b"", b"c"])
      >>> joined.starts.tolist(), joined.ends.tolist()
      ([0, 2, 2], [2, 2, 3])
    """
    lengths = np.fromiter(map(len, records), np.int64, len(records))
    data = np.frombuffer(b"".join([*records, _SPARE]), np.uint8)
    ends = np.cumsum(lengths)
    return Joined(data, ends - lengths, ends)


def damaged(function: str, bad: Bool[np.ndarray, " records"], rule: str) -> None:
    """Raise an error that names the first of the bad records, if there is one."""
    if bad.any():
        _damaged(function, int(np.argmax(bad)), rule)


def _damaged(function: str, record: int, rule: str) -> NoReturn:
    fail(
        function,
        "records",
        rule,
        f"record {record} of the batch, which does not",
        "The record is damaged, or was written with another coding or for another "
        "number of positions: verify the store, or write it again.",
    )


def bytes_of(bits: Any) -> Any:
    """How many bytes hold so many bits.

    Example:
      >>> bytes_of(np.array([0, 1, 8, 9])).tolist()
      [0, 1, 1, 2]
    """
    return (bits + 7) >> 3


def pack_flags(flags: Bool[np.ndarray, "..."]) -> bytes:
    """One bit for each flag.

    Example:
      >>> pack_flags(np.array([True, False, True])).hex()
      '05'
    """
    return np.packbits(flags, axis=None, bitorder="little").tobytes()


def sections(
    data: UInt8[np.ndarray, " bytes"],
    starts: Int64[np.ndarray, " records"],
    sizes: Int64[np.ndarray, " records"],
) -> UInt8[np.ndarray, " some"]:
    """So many bytes of each record, section after section.

    Example:
      >>> data = np.frombuffer(b"abcdef", np.uint8)
      >>> sections(data, np.array([0, 4]), np.array([2, 1])).tobytes()
      b'abe'
    """
    shifts = starts - (np.cumsum(sizes) - sizes)
    return data[np.arange(sizes.sum()) + np.repeat(shifts, sizes)]


def find_flags(
    data: UInt8[np.ndarray, " bytes"],
    starts: Int64[np.ndarray, " records"],
    sizes: Int64[np.ndarray, " records"],
) -> tuple[Int64[np.ndarray, " set"], Int64[np.ndarray, " records"]]:
    """Which bits are set, in a section of each record.

    Args:
      data: Bytes of all records.
      starts: The first byte of the section in each record.
      sizes: How many bytes it has.

    Returns:
      The numbers of the bits, each counted from the start of its own section, section
      after section; and how many are set in each section.

    Example:
      >>> data = np.frombuffer(bytes.fromhex("05 00000000 8001"), np.uint8)
      >>> places, counts = find_flags(data, np.array([0, 5]), np.array([1, 2]))
      >>> places.tolist(), counts.tolist()
      ([0, 2, 7, 8], [2, 2])
    """
    octets = sections(data, starts, sizes)
    places = np.flatnonzero(np.unpackbits(octets, bitorder="little").view(bool))
    bounds = 8 * np.concatenate([[0], np.cumsum(sizes)])
    counts = np.diff(np.searchsorted(places, bounds))
    return places - np.repeat(bounds[:-1], counts), counts


def pack_numbers(numbers: Int[np.ndarray, " numbers"], width: int) -> bytes:
    """The lowest ``width`` bits of each number, one behind the other.

    Example:
      >>> pack_numbers(np.array([1, 2, 3]), width=3).hex()    # 011 010 001
      'd100'
    """
    if width == 0:
        return b""
    octets = numbers.astype("<u4").view(np.uint8).reshape(-1, 4)
    bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")
    return np.packbits(bits, axis=None, bitorder="little").tobytes()


def unpack_numbers(
    data: UInt8[np.ndarray, " bytes"],
    starts: Int64[np.ndarray, " records"],
    counts: Int64[np.ndarray, " records"],
    widths: Int64[np.ndarray, " records"],
) -> UInt32[np.ndarray, " numbers"]:
    """Numbers from a section of each record.

    Args:
      data: Bytes of all records, and four spare ones.
      starts: The first byte of the section in each record.
      counts: How many numbers it holds.
      widths: Their bits, from 0 to `MAX_WIDTH`.

    Example:
      >>> data = np.frombuffer(bytes.fromhex("d100 00000000"), np.uint8)
      >>> unpack_numbers(data, np.array([0]), np.array([3]), np.array([3])).tolist()
      [1, 2, 3]
    """
    words = np.ndarray((len(data) - 3,), "<u4", data, strides=(1,)).copy()
    base = 8 * starts - (np.cumsum(counts) - counts) * widths
    places = np.arange(counts.sum())
    places *= np.repeat(widths, counts)
    places += np.repeat(base, counts)
    found = words[places >> 3]
    found >>= (places & 7).astype(np.uint32)
    masks = (1 << widths) - 1
    found &= np.repeat(masks.astype(np.uint32), counts)
    return found


def pack_sets(ids: Int[np.ndarray, " ids"], sizes: Int[np.ndarray, " sets"]) -> bytes:
    """Sets of ids, in as few bytes as any width of the low bits gives.

    Args:
      ids: Ascending in each set, set after set.
      sizes: How many ids each set has, at least 1.

    Returns:
      A byte with the width, the section of low bits, and the section of high parts.

    Example:
      >>> packed = pack_sets(np.array([1, 5, 6, 3]), np.array([3, 1]))
      >>> packed.hex(" ")    # width 0: 01 00001 01, and 0001 for the second set
      '00 42 11'
    """
    if len(sizes) == 0:
        return b"\x00"
    ids = ids.astype(np.int64)
    last = np.cumsum(sizes) - 1
    largest = ids[last]
    low = [bytes_of(len(ids) * width) for width in range(MAX_WIDTH + 1)]
    high = [
        bytes_of(len(ids) + int((largest >> width).sum()))
        for width in range(MAX_WIDTH + 1)
    ]
    width = int(np.argmin(np.add(low, high)))
    high_parts = ids >> width
    # Where sets begin: behind all ids and all steps of the sets before.
    steps = high_parts[last]
    places = high_parts + np.repeat(np.cumsum(steps) - steps, sizes)
    places += np.arange(len(ids))
    flags = np.zeros(places[-1] + 1, bool)
    flags[places] = True
    return bytes([width]) + pack_numbers(ids, width) + pack_flags(flags)


def unpack_sets(
    function: str,
    joined: Joined,
    sizes: Int64[np.ndarray, " sets"],
    num_sets: Int64[np.ndarray, " records"],
    num_classes: int,
) -> Int64[np.ndarray, " ids"]:
    """The sets of all records, which end with them.

    Args:
      function: Who asks, for errors.
      joined: The records, each from the byte with the width on.
      sizes: How many ids each set has, at least 1, for the sets of all records.
      num_sets: How many sets each record has.
      num_classes: Ids are below.

    Returns:
      Ids ascending in each set, set after set.

    Raises:
      ValueError: A record does not have the length, the number of ids or the order
        of ids that it must have, or an id is too large.

    Example:
      >>> joined = join([bytes.fromhex("00 42 11"), bytes.fromhex("00 04")])
      >>> sizes, num_sets = np.array([3, 1, 1]), np.array([2, 1])
      >>> unpack_sets("f", joined, sizes, num_sets, num_classes=7).tolist()
      [1, 5, 6, 3, 2]
    """
    data, starts, ends = joined.data, joined.starts, joined.ends
    damaged(function, starts >= ends, "have a byte for the width of the low bits")
    widths = data[starts].astype(np.int64)
    damaged(function, widths > MAX_WIDTH, f"have low bits of width 0 to {MAX_WIDTH}")
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    last_sets = np.cumsum(num_sets)
    counts = bounds[last_sets] - bounds[last_sets - num_sets]
    middles = starts + 1 + bytes_of(counts * widths)
    damaged(function, middles > ends, "have room for the low bits of their ids")
    places, found = find_flags(data, middles, ends - middles)
    damaged(function, found != counts, "hold as many ids as their positions have")
    surplus = np.where(counts > 0, data[ends - 1] == 0, ends > middles)
    damaged(function, surplus, "end with the last id")

    # A set begins behind the last id of the set before it, or with its section.
    begins = np.zeros(len(sizes), np.int64)
    begins[1:] = places[bounds[1:-1] - 1] + 1
    begins[(last_sets - num_sets)[num_sets > 0]] = 0
    ids = places - np.arange(len(places))
    ids -= np.repeat(begins - bounds[:-1], sizes)
    ids <<= np.repeat(widths, counts)
    ids |= unpack_numbers(data, starts + 1, counts, widths)

    rises = np.ones(len(ids), bool)
    rises[1:] = ids[1:] > ids[:-1]
    rises[bounds[:-1]] = True
    bad = ~rises
    bad |= ids >= num_classes
    if bad.any():
        record = np.searchsorted(np.cumsum(counts), np.argmax(bad), side="right")
        _damaged(function, int(record), f"have ascending ids below {num_classes}")
    return ids
