"""Which pieces of which documents lie in which row, found without reading a token.

A document of n tokens has n - 1 predictions: token t predicts token t + 1, and the last
predicts nothing. So it takes n - 1 places of a row. Where that is more than a row has,
it is cut into *pieces*; each brings the one token that its last place predicts, so that
a cut loses no prediction, and every token but the first of a document is predicted in
exactly one place.

Pieces are put into rows by best-fit decreasing: the longest first, each into the
fullest row that still has room. How full the rows become, and how many there are,
depends on the lengths alone. Pieces of one length can trade places, and in each epoch
they do, by a hash of (seed, epoch): new neighbours, the same number of rows.

Reference: Johnson, "Near-optimal bin packing algorithms", PhD thesis, MIT 1973. Ding et
al., "Fewer truncations improve language modeling", ICML 2024, pack documents this way.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from distilljax.data.hashing import derive_key, random_bits


def shift(
    tokens: Any,
    learnt: Any,
    starts: Int64[np.ndarray, " pieces"],
    places: Int64[np.ndarray, " pieces"],
) -> tuple[
    Int32[np.ndarray, " time"], Int32[np.ndarray, " time"], Bool[np.ndarray, " time"]
]:
    """Pieces of texts as inputs, their labels, and the mask of the labels.

    The one place where labels are shifted. ``labels[t]`` is the token that follows
    ``inputs[t]`` in its text, and the mask says whether that token, not the input, is
    learnt. So the last label of a piece is the next token of its own text, and never
    the first one of its neighbour in the row.

    Args:
      tokens: Texts in a row: integers, [all].
      learnt: Which of them are learnt, [all]; None: all of them.
      starts: Where each piece begins in them.
      places: How many inputs each piece has; it reads one token more.

    Returns:
      Inputs, labels and mask, piece after piece.

    Example:
      >>> ids = np.array([7, 8, 9, 50, 51, 52])
      >>> inputs, labels, mask = shift(ids, ids > 8, np.array([0, 3]), np.array([2, 2]))
      >>> inputs.tolist(), labels.tolist()
      ([7, 8, 50, 51], [8, 9, 51, 52])
      >>> mask.tolist()
      [False, True, True, True]
    """
    at = np.repeat(starts, places) + positions(places)
    mask = np.ones(len(at), bool) if learnt is None else learnt[at + 1].astype(bool)
    return tokens[at].astype(np.int32), tokens[at + 1].astype(np.int32), mask


def positions(places: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " time"]:
    """0, 1, 2, ... in each piece.

    Example:
      >>> positions(np.array([3, 2])).tolist()
      [0, 1, 2, 0, 1]
    """
    before = np.cumsum(places) - places
    return np.arange(places.sum()) - np.repeat(before, places)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Parts of documents that each fit into a row.

    Attributes:
      document: Which document each is from.
      start: Its first token there.
      places: How many places of a row it takes; it has one token more.
    """

    document: Int64[np.ndarray, " pieces"]
    start: Int64[np.ndarray, " pieces"]
    places: Int64[np.ndarray, " pieces"]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.places)


def cut(
    documents: Int64[np.ndarray, " kept"],
    lengths: Int64[np.ndarray, " kept"],
    context: int,
) -> Pieces:
    """Documents in pieces of at most ``context`` places.

    Args:
      documents: Which documents.
      lengths: How many tokens each of them has, at least 2.
      context: Places in a row.

    Example:
      >>> pieces = cut(np.array([4, 9]), np.array([3, 8]), context=3)
      >>> for name in ("document", "start", "places"):
      ...     print(name, getattr(pieces, name).tolist())
      document [4, 9, 9, 9]
      start [0, 0, 3, 6]
      places [2, 3, 3, 1]
    """
    places = lengths - 1
    counts = -(-places // context)
    which = np.repeat(np.arange(len(places)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(which)) - first) * context
    return Pieces(documents[which], start, np.minimum(places[which] - start, context))


def best_fit_decreasing(
    lengths: Int[np.ndarray, " pieces"], capacity: int
) -> Int64[np.ndarray, " pieces"]:
    """The row of each piece; the same as placing them one by one, longest first.

    All pieces of one length are placed together, so it takes time by the number of
    *different* lengths: ten million pieces are packed in about a second.

    Args:
      lengths: In falling order, from 1 to ``capacity``.
      capacity: Of a row.

    Example:
      >>> best_fit_decreasing(np.array([6, 5, 4, 3, 1]), capacity=10).tolist()
      [0, 1, 0, 1, 1]
    """
    values, counts = np.unique(lengths, return_counts=True)
    rows = _Rows(capacity)
    placed: list[Any] = [np.zeros(0, np.int64)]
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        placed += rows.place(length, count)
    return np.concatenate(placed)


class _Rows:
    """Rows that have room, by how much."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._count = 0
        self._rooms: list[int] = []  # sorted, each once
        self._rows: dict[int, list[Int64[np.ndarray, " rows"]]] = {}

    def place(self, length: int, count: int) -> list[Int64[np.ndarray, " some"]]:
        """Put ``count`` pieces of one length where they fit best; the row of each."""
        placed = []
        while count:
            at = bisect_left(self._rooms, length)
            if at == len(self._rooms):
                self._open(-(-count // (self._capacity // length)))
                continue
            room = self._rooms.pop(at)
            rows = np.concatenate(self._rows.pop(room))
            # a row that has taken one piece is the fullest that can take the next
            each = room // length
            filled = min(len(rows), count // each)
            placed.append(np.repeat(rows[:filled], each))
            self._put(room - each * length, rows[:filled])
            count -= filled * each
            if count and filled < len(rows):  # the last few do not fill a row
                placed.append(np.repeat(rows[filled : filled + 1], count))
                self._put(room - count * length, rows[filled : filled + 1])
                filled, count = filled + 1, 0
            self._put(room, rows[filled:])
        return placed

    def _open(self, count: int) -> None:
        self._put(self._capacity, np.arange(self._count, self._count + count))
        self._count += count

    def _put(self, room: int, rows: Int64[np.ndarray, " rows"]) -> None:
        if room == 0 or len(rows) == 0:
            return
        if room not in self._rows:
            insort(self._rooms, room)
            self._rows[room] = []
        self._rows[room].append(rows)


class Plan:
    """Rows of pieces, for every epoch.

    Attributes:
      pieces: What is packed.
      num_rows: How many rows an epoch has; the same in all of them.

    Example:
      >>> pieces = cut(np.arange(4), np.array([5, 5, 8, 3]), context=8)
      >>> plan = Plan(pieces, context=8, seed=0)
      >>> plan.num_rows, [len(plan.row(0, r)) for r in range(3)]
      (3, [1, 2, 1])
    """

    def __init__(self, pieces: Pieces, *, context: int, seed: int):
        self.pieces, self._seed = pieces, seed
        self._orders: dict[int, Int64[np.ndarray, " pieces"]] = {}
        # Slot k is that of the k-th longest piece; the slots of a row lie together.
        row = best_fit_decreasing(np.sort(pieces.places)[::-1], context)
        self._slots = np.argsort(row, kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(row))])
        self.num_rows = len(self._bounds) - 1

    def row(self, epoch: int, row: int) -> Int64[np.ndarray, " some"]:
        """Which pieces lie in a row of an epoch."""
        slots = self._slots[self._bounds[row] : self._bounds[row + 1]]
        return self._order(epoch)[slots]

    def _order(self, epoch: int) -> Int64[np.ndarray, " pieces"]:
        """The piece in each slot: by length, and by hash among equals."""
        order = self._orders.get(epoch)
        if order is None:
            key = derive_key(self._seed, "packing", epoch)
            bits = random_bits(key, np.arange(len(self.pieces)))
            order = np.lexsort((bits, -self.pieces.places))
            # Reading threads are at most one epoch apart; replacing the dictionary
            # (instead of changing it) needs no lock.
            self._orders = {
                e: o for e, o in self._orders.items() if abs(e - epoch) == 1
            } | {epoch: order}
        return order

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes compute their own orders."""
        return self.__dict__ | {"_orders": {}}
