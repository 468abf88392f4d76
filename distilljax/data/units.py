"""What a teacher is asked about once, however often and wherever it is seen later.

A unit is an example; but of packed text it is a piece of a document, for the rows have
other pieces in each epoch, and what a model says of a piece does not depend on its
neighbours (attention stays within a segment, positions count from its beginning). Units
are numbered from 0. A `Cover` is rows in which each of them is exactly once: what a
teacher has to read. A source that is made of units says so by `num_units`,
`units(index)` and `units_fingerprint`; of any other source every example is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from distilljax.data.rows import Example


class Units(NamedTuple):
    """The units of an example, in order.

    Attributes:
      keys: Their numbers.
      places: How many positions of the example each of them takes; None: it is one
        unit, and takes all of them.
    """

    keys: Int64[np.ndarray, " units"]
    places: Int64[np.ndarray, " units"] | None


def num_units(source: Any) -> int:
    """How many units a source has.

    Example:
      >>> num_units([{"inputs": 1.0}, {"inputs": 2.0}])
      2
    """
    count = getattr(source, "num_units", None)
    return len(source) if count is None else count


def units_of(source: Any, index: int) -> Units:
    """The units of example ``index``.

    Example:
      >>> units_of([{"inputs": 1.0}, {"inputs": 2.0}], 1)
      Units(keys=array([1]), places=None)
    """
    find = getattr(source, "units", None)
    if find is None:
        return Units(np.array([index], np.int64), None)
    return Units(*find(index))


def units_fingerprint(source: Any) -> str | None:
    """A digest of the units, their order in a batch apart; None where none is known."""
    found = getattr(source, "units_fingerprint", None)
    return getattr(source, "fingerprint", None) if found is None else found


class Cover:
    """Rows that have every unit of a source once: a source itself, of fixed order.

    Example:
      >>> cover = Cover([{"inputs": 1.0}, {"inputs": 2.0}])
      >>> len(cover), cover[1], cover.units(1).keys.tolist()
      (2, {'inputs': 2.0}, [1])
    """

    def __init__(self, source: Any):
        self.source = source
        # of packed rows one epoch; of a mixture, one epoch of each of its parts
        self._parts: list[tuple[Any, int]] = getattr(
            source, "unit_parts", [(source, 0)]
        )
        self._starts = np.cumsum([0, *(len(rows) for rows, _ in self._parts)])

    @property
    def num_classes(self) -> int | None:
        """That of the source."""
        return getattr(self.source, "num_classes", None)

    def __len__(self) -> int:
        """How many rows there are."""
        return int(self._starts[-1])

    def _place(self, row: int) -> tuple[Any, int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        rows, first = self._parts[part]
        return rows, row - int(self._starts[part]), first

    def where(self, row: int) -> int:
        """Which example of its part a row is."""
        return self._place(row)[1]

    def __getitem__(self, row: int) -> Example:
        """A row."""
        rows, index, _ = self._place(row)
        return rows[index]

    def __iter__(self) -> Iterator[Example]:
        """All rows, in order."""
        return (self[row] for row in range(len(self)))

    def units(self, row: int) -> Units:
        """The units of a row."""
        rows, index, first = self._place(row)
        keys, places = units_of(rows, index)
        return Units(keys + first, places)
