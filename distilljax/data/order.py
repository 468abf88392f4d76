"""In which order a source is read: a permutation for each epoch, without end."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64

from distilljax.data.hashing import derive_key, random_bits

# Up to here an epoch's permutation is kept as an array (128 MiB); above, each index is
# computed when it is needed.
LARGEST_TABLE = 2**24


class Order:
    """Maps positions in an endless stream to positions in a source.

    Position p belongs to epoch p // num_examples. Each epoch visits every example once,
    in an order of its own that depends on (seed, epoch) alone. With ``endless=True``
    the examples of epoch e are numbered from e num_examples on, for a source that has
    other examples in each epoch.

    Why not ``grain.MapDataset.shuffle``: it walks a cipher of at least 16 bits until
    the index falls inside the source, about 2^16 steps for an epoch however small the
    source is. That is 25 ms for an epoch of 36 examples, a thousand times the cost of
    reading them; and its seed is (seed + epoch), so that the second epoch of seed 0 is
    the first epoch of seed 1. Above ``LARGEST_TABLE`` examples, where a table would be
    heavy and the walk is short, the cipher of Grain is what computes the order, with a
    hashed seed.

    Example:
      >>> order = Order(4, seed=0, shuffle=True)
      >>> sorted(order.indices(0, 4).tolist()), sorted(order.indices(4, 4).tolist())
      ([0, 1, 2, 3], [0, 1, 2, 3])
      >>> Order(4, seed=0, shuffle=False).indices(2, 4).tolist()
      [2, 3, 0, 1]
    """

    def __init__(
        self, num_examples: int, *, seed: int, shuffle: bool, endless: bool = False
    ):
        self._num_examples = num_examples
        self._seed = seed
        self._shuffle = shuffle
        self._endless = endless
        self._tables: dict[int, Int64[np.ndarray, " examples"]] = {}

    def indices(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """The positions in the source at stream positions [start, start + count)."""
        within = self._within_epochs(start, count)
        if self._endless:
            positions = np.arange(start, start + count)
            return within + positions // self._num_examples * self._num_examples
        return within

    def _within_epochs(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        if not self._shuffle:
            return np.arange(start, start + count) % self._num_examples
        if self._num_examples > LARGEST_TABLE:
            positions = range(start, start + count)
            return np.fromiter((self._computed(p) for p in positions), np.int64, count)
        epoch, offset = divmod(start, self._num_examples)
        parts = []
        while count > 0:
            part = self._table(epoch)[offset : offset + count]
            parts.append(part)
            count -= len(part)
            epoch, offset = epoch + 1, 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _table(self, epoch: int) -> Int64[np.ndarray, " examples"]:
        table = self._tables.get(epoch)
        if table is None:
            key = derive_key(self._seed, "order", epoch)
            table = np.argsort(random_bits(key, np.arange(self._num_examples)))
            table.setflags(write=False)  # batches hold views of it
            # Reading threads are at most one epoch apart. Replacing the dictionary
            # (instead of changing it) needs no lock.
            self._tables = {
                e: t for e, t in self._tables.items() if abs(e - epoch) == 1
            } | {epoch: table}
        return table

    def _computed(self, position: int) -> int:
        from grain.experimental import index_shuffle  # heavy, and rarely needed

        epoch, index = divmod(position, self._num_examples)
        seed = derive_key(self._seed, "order", epoch) % 2**32
        return index_shuffle(
            index, max_index=self._num_examples - 1, seed=seed, rounds=4
        )

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes compute their own tables."""
        return self.__dict__ | {"_tables": {}}
