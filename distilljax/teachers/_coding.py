"""A teacher's sparse signal as bytes: draws, or the likeliest classes and their tails.

A record is the signal of one example, at so many positions; how many, the reader has to
know. It begins with the parts of fixed size, and ends with the sets of ids, which are
most of it and bring the one byte of header (`_bits.py`). There is no checksum: the file
around the records has one.

Reading takes all records of a batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, Integer, UInt8, UInt16

from distilljax._checks import check_count, fail
from distilljax.teachers import _bits as bits
from distilljax.teachers import _values as numbers

MAX_CLASSES = 1 << bits.MAX_WIDTH


@dataclass(frozen=True)
class SampledCoding:
    """Draws from the teacher, with replacement, the same number at each position.

    What is kept is each id that was drawn, once, and how often. The order of the draws
    is lost; the target, in which each draw weighs 1 / num_samples, is exact.

    Layout: num_samples - 1 bits for each position, of its draws in ascending order: bit
    i is set if the next draw after draw i is another id. Then the sets of ids.

    Attributes:
      num_classes: Ids are below; at most 2^24.
      num_samples: Draws at each position, from 1 to 65,535.

    Example:
      >>> coding = SampledCoding(num_classes=100, num_samples=4)
      >>> record = coding.encode(np.array([[7, 3, 7, 7], [50, 50, 50, 50]]))
      >>> len(record)
      5
      >>> ids, counts = coding.decode([record], np.array([2]))
      >>> ids.tolist(), counts.tolist()
      ([[3, 7], [50, 0]], [[1, 3], [4, 0]])
    """

    num_classes: int
    num_samples: int

    def __post_init__(self):
        _check_up_to("SampledCoding", "num_classes", self.num_classes, MAX_CLASSES)
        _check_up_to("SampledCoding", "num_samples", self.num_samples, 65535)

    def encode(self, ids: Integer[np.ndarray, "..."]) -> bytes:
        """One record.

        Args:
          ids: Drawn classes [positions, num_samples], in any order.
        """
        function = "SampledCoding.encode"
        _check_ids(function, ids, self.num_samples, self.num_classes)
        ids = np.sort(ids, axis=1)
        last = np.ones(ids.shape, bool)  # of the draws of one id
        last[:, :-1] = ids[:, 1:] != ids[:, :-1]
        sets = bits.pack_sets(ids[last], last.sum(axis=1))
        return bits.pack_flags(last[:, :-1]) + sets

    def decode(
        self,
        records: Sequence[bytes],
        positions: Integer[np.ndarray, "..."],
        width: int | None = None,
    ) -> tuple[
        Int32[np.ndarray, "positions width"],
        UInt8[np.ndarray, "positions width"] | UInt16[np.ndarray, "positions width"],
    ]:
        """The draws of many records, position after position.

        Args:
          records: What `encode` returned.
          positions: How many positions each record has [records].
          width: Slots for each position; None: as many as the position with the most
            different ids needs.

        Returns:
          Ids [all positions, width], ascending, and how often each was drawn: uint8, or
          uint16 if num_samples is above 255. An unused slot has count 0 and id 0.

        Raises:
          ValueError: A record is damaged, or a position has more ids than ``width``.
        """
        function = "SampledCoding.decode"
        positions = _check_records(function, records, positions)
        joined = bits.join(records)
        places, joined = self._steps(function, joined, positions)
        rows = places // max(self.num_samples - 1, 1)
        num_rows = int(positions.sum())
        sizes = np.bincount(rows, minlength=num_rows) + 1
        ids = bits.unpack_sets(function, joined, sizes, positions, self.num_classes)
        width = _slots(function, sizes, width)

        slots = np.arange(num_rows) * width - (np.cumsum(sizes) - sizes)
        found = np.zeros((num_rows, width), np.int32)
        found.reshape(-1)[np.arange(len(ids)) + np.repeat(slots, sizes)] = ids
        # Behind which draw each id ends; the last one of a position has no bit.
        dtype = np.uint8 if self.num_samples <= 255 else np.uint16
        ends = np.full((num_rows, width), self.num_samples, dtype)
        slots += np.arange(num_rows)
        columns = places - rows * (self.num_samples - 1)
        ends.reshape(-1)[np.arange(len(places)) + slots[rows]] = columns + 1
        counts = ends.copy()
        counts[:, 1:] -= ends[:, :-1]
        return found, counts

    def _steps(
        self,
        function: str,
        joined: bits.Joined,
        positions: Int64[np.ndarray, " records"],
    ) -> tuple[Int64[np.ndarray, " steps"], bits.Joined]:
        """Bits that are set, numbered through the batch, and what follows them."""
        num_bits = positions * (self.num_samples - 1)
        sizes = bits.bytes_of(num_bits)
        middles = joined.starts + sizes
        short = middles > joined.ends
        bits.damaged(function, short, "have room for the counts of their ids")
        filled = joined.data[middles - 1] >> (num_bits & 7)
        stray = (num_bits & 7 > 0) & (filled > 0)
        bits.damaged(function, stray, "have zeros behind the last count")
        places, found = bits.find_flags(joined.data, joined.starts, sizes)
        places += np.repeat(np.cumsum(num_bits) - num_bits, found)
        return places, bits.Joined(joined.data, middles, joined.ends)


class _Numbers(NamedTuple):
    """How log-probabilities are written, and log tails beside them."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]
    bytes_each: int
    bytes_once: int  # at a position
    write_tail: Callable[[Any], Any]
    read_tail: Callable[[Any], Any]
    bytes_tail: int


_HALVES = (numbers.to_float16, numbers.from_float16, 2)
_WHOLE = (numbers.to_float32, numbers.from_float32)
_NUMBERS = {
    "log8": _Numbers(numbers.to_log8, numbers.from_log8, 1, 1, *_HALVES),
    "bfloat16": _Numbers(numbers.to_bfloat16, numbers.from_bfloat16, 2, 0, *_HALVES),
    "float32": _Numbers(*_WHOLE, 4, 0, *_WHOLE, 4),
}


@dataclass(frozen=True)
class TopKCoding:
    """The k likeliest classes at each position, and the tails at each temperature.

    Layout: for each position its log-probabilities, in the order of the ascending ids,
    and its log tails; then the sets of ids.

    Numerics: the costs in nats of KL are in `benchmarks/store_coding.py`. What is
    rounded no longer sums to 1 exactly, and the reader divides by the sum: at
    temperature T, ``log_total / T`` is taken from each log tail. That needs temperature
    1 in the grid, and is not done for float32, where nothing is rounded.

    Attributes:
      num_classes: Ids are below; at most 2^24.
      k: Classes at each position, from 1 to num_classes.
      temperatures: The grid of the tails.
      values: How log-probabilities are written. "log8": a byte for each and one more
        for each position; "bfloat16"; or "float32", exact. Tails are float32 beside
        "float32", and float16 otherwise: finite ones beyond 65,504 become 65,504. No
        finite number becomes infinite, and -inf remains what it is.

    Example:
      >>> coding = TopKCoding(num_classes=100, k=2, temperatures=(1.0, 2.0))
      >>> log_probs = np.log(np.array([[0.75, 0.125]], np.float32))
      >>> log_tail = np.array([[math.log(0.125), 1.0]], np.float32)
      >>> record = coding.encode(np.array([[70, 3]]), log_probs, log_tail)
      >>> len(record)
      10
      >>> ids, log_probs, log_tail = coding.decode([record], np.array([1]))
      >>> ids.tolist(), np.exp(np.float64(log_probs)).round(3).tolist()
      ([[3, 70]], [[0.124, 0.751]])
    """

    num_classes: int
    k: int
    temperatures: tuple[float, ...] = (1.0,)
    values: str = "log8"

    def __post_init__(self):
        _check_up_to("TopKCoding", "num_classes", self.num_classes, MAX_CLASSES)
        _check_up_to("TopKCoding", "k", self.k, self.num_classes)
        grid = self.temperatures
        if not grid or not all(0 < temperature < math.inf for temperature in grid):
            fail(
                "TopKCoding",
                "temperatures",
                "be positive, finite numbers, at least one",
                self.temperatures,
                "Use (1.0,) for the teacher's own distribution.",
            )
        if self.values not in _NUMBERS:
            fail(
                "TopKCoding",
                "values",
                f"be one of {', '.join(_NUMBERS)}",
                repr(self.values),
                "log8 is the smallest, float32 is exact.",
            )

    def encode(
        self,
        ids: Integer[np.ndarray, "..."],
        log_probs: Float[np.ndarray, "..."],
        log_tail: Float[np.ndarray, "..."],
    ) -> bytes:
        """One record.

        Args:
          ids: Classes [positions, k], all different at a position, in any order.
          log_probs: Their log-probabilities at temperature 1 [positions, k].
          log_tail: [positions, temperatures]: for each temperature T the log of the sum
            of p^(1/T) over all other classes.

        Raises:
          ValueError: An id is out of range or is there twice, a number is nan or +inf,
            or probabilities and tail at temperature 1 do not sum to 1 within 0.01.
        """
        function = "TopKCoding.encode"
        _check_ids(function, ids, self.k, self.num_classes)
        log_probs = np.asarray(log_probs, np.float32)
        log_tail = np.asarray(log_tail, np.float32)
        self._check_numbers(function, len(ids), log_probs, log_tail)
        order = np.argsort(ids, axis=1)
        ids = np.take_along_axis(ids, order, axis=1)
        if (ids[:, 1:] == ids[:, :-1]).any():
            fail(
                function,
                "ids",
                "be different at each position",
                "one twice",
                "Merge equal classes, or keep draws with SampledCoding.",
            )
        ways = _NUMBERS[self.values]
        values = ways.write(np.take_along_axis(log_probs, order, axis=1))
        tails = ways.write_tail(log_tail)
        sets = bits.pack_sets(ids.reshape(-1), np.full(len(ids), self.k))
        return np.hstack([values, tails]).tobytes() + sets

    def decode(
        self, records: Sequence[bytes], positions: Integer[np.ndarray, "..."]
    ) -> tuple[
        Int32[np.ndarray, "positions k"],
        Float32[np.ndarray, "positions k"],
        Float32[np.ndarray, "positions temperatures"],
    ]:
        """The signals of many records, position after position.

        Args:
          records: What `encode` returned.
          positions: How many positions each record has [records].

        Returns:
          Ids [all positions, k], ascending; their log-probabilities; and the log tails
          [all positions, temperatures].

        Raises:
          ValueError: A record is damaged.
        """
        function = "TopKCoding.decode"
        positions = _check_records(function, records, positions)
        joined = bits.join(records)
        ways = _NUMBERS[self.values]
        split = ways.bytes_each * self.k + ways.bytes_once
        row = split + ways.bytes_tail * len(self.temperatures)
        middles = joined.starts + positions * row
        short = middles > joined.ends
        bits.damaged(function, short, "have room for their log-probabilities")
        octets = bits.sections(joined.data, joined.starts, positions * row)
        octets = octets.reshape(-1, row)
        log_probs = ways.read(octets[:, :split])
        log_tail = ways.read_tail(octets[:, split:])
        total = self._total(log_probs, log_tail)
        usable = (total > 0) & (total < np.inf)
        usable &= (log_tail < np.inf).all(axis=1)
        bad = np.repeat(np.arange(len(records)), positions)[~usable]
        flags = np.isin(np.arange(len(records)), bad)
        bits.damaged(function, flags, "have probabilities that can be summed")
        if self.values != "float32" and 1.0 in self.temperatures:
            log_total = np.log(total)[:, None]
            log_probs -= log_total
            log_tail -= log_total / np.array(self.temperatures, np.float32)
        sets = bits.Joined(joined.data, middles, joined.ends)
        sizes = np.full(len(octets), self.k)
        ids = bits.unpack_sets(function, sets, sizes, positions, self.num_classes)
        return ids.astype(np.int32).reshape(-1, self.k), log_probs, log_tail

    def _total(
        self,
        log_probs: Float32[np.ndarray, "positions k"],
        log_tail: Float32[np.ndarray, "positions temperatures"],
    ) -> Float32[np.ndarray, " positions"]:
        """All probabilities at temperature 1; at least 1 if the tail is unknown."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.exp(log_probs).sum(axis=1)
            if 1.0 not in self.temperatures:
                return np.maximum(total, 1)
            return total + np.exp(log_tail[:, self.temperatures.index(1.0)])

    def _check_numbers(
        self, function: str, positions: int, log_probs: Any, log_tail: Any
    ) -> None:
        """Shapes, no number that is not one, and a sum of 1."""
        shapes = {"log_probs": self.k, "log_tail": len(self.temperatures)}
        for argument, x in {"log_probs": log_probs, "log_tail": log_tail}.items():
            shape = (positions, shapes[argument])
            if x.shape != shape:
                remedy = "It has a row for each row of ids."
                fail(function, argument, f"have the shape {shape}", x.shape, remedy)
            if not (x < np.inf).all():
                remedy = "Check the teacher's logits: nan, or infinite ones?"
                fail(function, argument, "be finite or -inf", "nan or inf", remedy)
        off = np.abs(self._total(log_probs, log_tail) - 1)
        if not (off <= 0.01).all():
            fail(
                function,
                "log_probs",
                "sum to 1 with the tail at temperature 1, within 0.01",
                f"a sum that is off by {off.max():.3g}",
                "They are log-probabilities at temperature 1, among all classes.",
            )


def _slots(
    function: str, sizes: Int64[np.ndarray, " positions"], width: int | None
) -> int:
    """The width that was asked for, or the one that is needed."""
    needed = int(sizes.max(initial=1))
    if width is None:
        return needed
    if width < needed:
        fail(
            function,
            "width",
            f"be at least {needed}, the number of ids at a position of the batch",
            width,
            "Give more slots; num_samples are always enough.",
        )
    return width


def _check_up_to(function: str, argument: str, value: Any, high: int) -> None:
    check_count(function, argument, value)
    if value > high:
        remedy = "Change it in the config."
        fail(function, argument, f"be at most {high}", value, remedy)


def _check_ids(function: str, ids: Any, columns: int, num_classes: int) -> None:
    """Integers [positions, columns] below the number of classes."""
    if ids.dtype.kind not in "iu":
        remedy = "Pass classes, not their probabilities."
        fail(function, "ids", "be integers", ids.dtype, remedy, TypeError)
    if ids.ndim != 2 or ids.shape[1] != columns:
        rule = f"have the shape [positions, {columns}]"
        fail(function, "ids", rule, ids.shape, "Flatten the leading axes, if any.")
    if ids.size and not (ids.min() >= 0 and ids.max() < num_classes):
        fail(
            function,
            "ids",
            f"lie in [0, {num_classes - 1}]",
            f"ids from {ids.min()} to {ids.max()}",
            "Check that num_classes is the teacher's vocabulary, with its padding.",
        )


def _check_records(function: str, records: Any, positions: Any) -> Any:
    """As many numbers as records, none negative."""
    if positions.shape != (len(records),) or (positions < 0).any():
        fail(
            function,
            "positions",
            f"be {len(records)} numbers, one for each record, none negative",
            positions,
            "A record does not say how many positions it has; the store does.",
        )
    return positions.astype(np.int64)
