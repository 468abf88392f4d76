"""Batches read by Grain: ahead, in threads or worker processes, from any source."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import grain
from absl import flags

from distilljax.data.finish import Batch, Finish, Shard
from distilljax.data.order import Order
from distilljax.data.rows import check_examples, stack_examples
from distilljax.data.sources import Source, num_classes_of, read_examples, read_rows
from distilljax.data.transforms import check_transforms, transformed


@dataclass(frozen=True)
class LocalBatches:
    """The batches of one process as a random-access source of Grain.

    An element of the Grain dataset is a whole batch. Grain's bookkeeping costs 35 us
    for each element and step, as much as decoding a small image, and storage reads many
    records in one call faster than one by one.

    Attributes:
      source: Where the examples are.
      order: From stream positions to examples.
      shard: Which rows of a batch are read here.
      finish: From raw rows to a batch.
      transforms: Grain transforms of single examples.
      origin: Stream position of the first row of global batch 0.
    """

    source: Source
    order: Order
    shard: Shard
    finish: Finish
    transforms: tuple[Any, ...]
    origin: int = 0

    def __len__(self) -> int:
        """As many as a position can count."""
        return sys.maxsize // self.shard.batch_size

    def __getitem__(self, batch: int) -> Batch:
        """This process's rows of global batch ``batch``."""
        start = self.origin + batch * self.shard.batch_size
        start += self.shard.process_index * self.shard.rows
        index = self.order.indices(start, self.shard.rows)
        if self.transforms:
            examples = read_examples(self.source, index.tolist())
            seed = self.finish.seed
            examples = [
                transformed(example, self.transforms, seed=seed, position=position)
                for position, example in enumerate(examples, start)
            ]
            rows = stack_examples(examples, index)
        else:
            rows = read_rows(self.source, index)
        check_examples("Loader", rows, num_classes_of(self.source), index)
        return self.finish(start, rows, index)


class GrainReader:
    """Reads batches in sequence; a jump in the position starts a new Grain iterator."""

    def __init__(
        self,
        batches: LocalBatches,
        *,
        num_threads: int,
        prefetch: int,
        num_workers: int,
    ):
        check_transforms(batches.transforms)
        # Grain's worker processes read absl flags, which nobody has parsed in pytest,
        # in a notebook or under a command line that is not absl's.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        self._batches = batches
        self._options = grain.ReadOptions(
            num_threads=num_threads,
            prefetch_buffer_size=max(prefetch, num_threads),
        )
        self._num_workers = num_workers
        self._iterator: Any = None
        self._position = 0

    def __call__(self, next_example: int) -> Batch:
        """This process's rows of the global batch that begins at ``next_example``."""
        if self._iterator is None or next_example != self._position:
            self._restart(next_example)
        iterator: Any = self._iterator
        self._iterator = None  # and so dropped if the read fails
        batch = next(iterator)
        self._iterator = iterator
        self._position = next_example + self._batches.shard.batch_size
        return batch

    def _restart(self, next_example: int) -> None:
        if self._iterator is not None:
            self._iterator.close()
        batches: Any = replace(self._batches, origin=next_example)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(self._options)
        if self._num_workers > 0:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._num_workers)
            )
        self._iterator = iter(dataset)
