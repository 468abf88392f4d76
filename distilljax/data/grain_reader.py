"""Batches read by Grain: ahead, in threads or worker processes, from any source."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from absl import flags

from distilljax._checks import fail
from distilljax.data.finish import Batch, Finish, Shard
from distilljax.data.hashing import derive_key
from distilljax.data.order import Order
from distilljax.data.sources import (
    Example,
    Source,
    check_examples,
    num_classes_of,
    read_examples,
)

if TYPE_CHECKING:
    from distilljax.data.pipeline import Loader


@dataclass(frozen=True)
class Stream:
    """The endless stream as a random-access source of Grain: position to example."""

    source: Source
    order: Order

    def __len__(self) -> int:
        """As long as a position can say."""
        return sys.maxsize

    def __getitem__(self, position: int) -> Example:
        """The example at a position of the stream."""
        return self._getitems([position])[0]

    def _getitems(self, positions: Sequence[int]) -> list[Example]:
        """Several examples; Grain calls this with the positions of a batch."""
        index = [int(self.order.indices(p, 1)[0]) for p in positions]
        examples = read_examples(self.source, index)
        return [
            {
                "inputs": np.asarray(example["inputs"]),
                "labels": np.int64(example["labels"]),
                "index": np.int64(i),
                "position": np.int64(position),
            }
            for example, i, position in zip(examples, index, positions, strict=True)
        ]


@dataclass(frozen=True)
class Check:
    """Checks the stacked rows of a batch, and finishes them."""

    finish: Finish
    num_classes: int | None

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        """The batch; runs in Grain's threads."""
        inputs, labels, index = rows["inputs"], rows["labels"], rows["index"]
        check_examples("Loader", inputs, labels, self.num_classes, index)
        return self.finish(
            int(rows["position"][0]), inputs, labels.astype(np.int32), index
        )


class GrainReader:
    """Reads batches in sequence; a jump in the position starts a new Grain iterator."""

    def __init__(
        self,
        loader: Loader,
        source: Source,
        order: Order,
        shard: Shard,
        finish: Finish,
        seed: int,
    ):
        # Grain's worker processes read absl flags, which nobody has parsed in pytest, in
        # a notebook or under a command line that is not absl's.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        self._loader = loader
        self._shard = shard
        self._iterator: Any = None
        self._position = 0
        self._finish = Check(finish, num_classes_of(source))
        stream = grain.MapDataset.source(Stream(source, order))
        self._stream = stream.seed(derive_key(seed, "transforms") % 2**32)
        for transform in loader.transforms:
            self._stream = _transformed(self._stream, transform)

    def __call__(self, next_example: int) -> Batch:
        """This process's rows of the global batch that begins at ``next_example``."""
        if self._iterator is None or next_example != self._position:
            self._restart(next_example)
        iterator, self._iterator = self._iterator, None  # dropped if the read fails
        batch = next(iterator)
        self._iterator, self._position = iterator, next_example + self._shard.batch_size
        return batch

    def _restart(self, next_example: int) -> None:
        if self._iterator is not None:
            self._iterator.close()
        loader, shard = self._loader, self._shard
        # Batches of one process's size, of which this process takes every n-th: its
        # rows are one contiguous run of the global batch.
        batches = self._stream[next_example:].batch(shard.rows, drop_remainder=True)
        batches = batches[shard.process_index :: shard.process_count]
        options = grain.ReadOptions(
            num_threads=loader.num_threads,
            prefetch_buffer_size=max(loader.prefetch, loader.num_threads),
        )
        dataset = batches.map(self._finish).to_iter_dataset(options)
        if loader.num_workers > 0:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=loader.num_workers)
            )
        self._iterator, self._position = iter(dataset), next_example


def _transformed(
    stream: grain.MapDataset[Example], transform: Any
) -> grain.MapDataset[Example]:
    if isinstance(transform, grain.transforms.Map):
        return stream.map(transform)
    if isinstance(transform, grain.transforms.RandomMap):
        return stream.random_map(transform)
    if isinstance(transform, grain.transforms.MapWithIndex):
        return stream.map_with_index(transform)
    return fail(
        "Loader",
        "transforms",
        "be grain.transforms.Map, RandomMap or MapWithIndex",
        type(transform).__name__,
        "A filter would make the position of an example depend on the data before it: "
        "leave examples out of the source instead.",
        TypeError,
    )
