"""Batches for training: shuffled, augmented, sharded by process, and resumable.

A stream is endless: position p holds example ``order(p)`` of the source, and epoch
p // len(source). Batch k is the positions [k B, (k + 1) B) of the whole program, and
process i of n has its i-th run of B / n. So everything about a batch follows from the
position of its first example, which is the whole state of the iterator::

    {"next_example": 7200, "seed": 0, "num_examples": 1200}

A source that has a ``fingerprint`` is in the state as well (``source``), so that other
data is refused. The state does not know how many processes, threads or prefetched
batches there are: it can be saved by one process and restored in eight, and the next
global batch is the same array, rows in the same order.
(``grain.experimental.ElasticIterator`` has such a state as well, but deals its rows
like cards. With another number of processes the global array is then permuted, and
dropout noise and microbatches go to other examples.)

Two readers with this one contract, equal bit for bit: sources in memory are gathered a
whole batch at a time, and everything else is read by Grain, ahead, in threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from distilljax._checks import fail
from distilljax.data.finish import Batch, Finish, Shard, check_shards
from distilljax.data.one_pass import eval_batches
from distilljax.data.order import Order
from distilljax.data.sources import (
    Arrays,
    Source,
    check_not_empty,
    load_in_memory,
    read_rows,
)


@runtime_checkable
class ResumableIterator(Protocol):
    """What a Loader returns, and what `train` saves and restores."""

    def __iter__(self) -> Iterator[Any]:
        """Itself."""
        ...

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, int]:
        """The state after the batch last yielded, as small JSON."""
        ...

    def set_state(self, state: dict[str, int]) -> None:
        """Continue with the batch that follows the one of ``state``."""
        ...


@dataclass(frozen=True)
class Loader:
    """How a source becomes batches. Calling it returns an endless resumable iterator.

    Each batch is a dict of local NumPy arrays: ``inputs`` float32 [batch, ...],
    ``labels`` int32 [batch] where the source has labels, ``index`` int64 [batch]
    (positions in the source, so that an error or a cache can name examples), and
    ``teacher_inputs`` where the teacher has a view of its own. Every other key of the
    examples is in the batch as it is stored, neither scaled nor augmented. Examples may
    have ``tokens`` in place of inputs, and then labels of [batch, time].

    Attributes:
      batch_size: Examples in a batch, over all processes.
      shuffle: A new order in each epoch; False keeps the order of the source.
      scale: The inputs are divided by this: 255 for 8-bit images, 16 for the digits.
      augment: An ``Augment``, such as ``RandomShift(2)``, applied after scaling; or
        None. (Typed loosely, so that the command line can reach its fields.)
      teacher_view: "same": the teacher sees ``inputs``; "clean": the batch has
        ``teacher_inputs`` without augmentation; "independent": with another draw.
      flatten: Yield [batch, features] instead of the shape of the source.
      transforms: Grain transforms of single examples, before scaling (Map, RandomMap
        or MapWithIndex; the elements are dicts); read by Grain.
      eval_transforms: Those of ``eval_batches``, none of them random; None: the same.
      in_memory: Load the source first; None: if it takes at most 1 GiB as it is stored.
      num_threads: Threads that read batches (Grain only).
      prefetch: Batches that are read ahead (Grain only).
      num_workers: Processes that read batches, for decoding that holds the interpreter
        (Grain only; 0: threads only). They import the main module again.

    Example:
      >>> source = Arrays(np.arange(6, dtype=np.uint8)[:, None], np.arange(6))
      >>> batches = Loader(batch_size=3, scale=2.0, shuffle=False)(source, seed=0)
      >>> next(batches)["inputs"].ravel().tolist(), next(batches)["index"].tolist()
      ([0.0, 0.5, 1.0], [3, 4, 5])
      >>> batches.get_state()
      {'next_example': 6, 'seed': 0, 'num_examples': 6}
    """

    batch_size: int
    shuffle: bool = True
    scale: float = 1.0
    augment: Any = None
    teacher_view: Literal["same", "clean", "independent"] = "same"
    flatten: bool = False
    transforms: tuple[Any, ...] = ()
    eval_transforms: Any = None
    in_memory: bool | None = None
    num_threads: int = 4
    prefetch: int = 8
    num_workers: int = 0

    def __call__(
        self,
        source: Source,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Batches:
        """The batches of one process, from the beginning.

        Args:
          source: A source (not its config). Load a small one once with
            ``load_in_memory`` if it feeds several loaders.
          seed: Of the order and the augmentation; any integer.
          process_index: Which process this is.
          process_count: How many processes share each batch.
        """
        self._check(source, process_index, process_count)
        in_memory = self.in_memory
        if in_memory is None:
            in_memory = not self.transforms and _fits_in_memory(source)
        endless = getattr(source, "endless", False)
        order = Order(len(source), seed=seed, shuffle=self.shuffle, endless=endless)
        finish = Finish(self.scale, self.augment, self.teacher_view, self.flatten, seed)
        shard = Shard(self.batch_size, process_index, process_count)
        if in_memory:
            read = MemoryReader(load_in_memory(source), order, shard, finish)
        else:
            from distilljax.data.grain_reader import GrainReader, LocalBatches  # heavy

            read = GrainReader(
                LocalBatches(source, order, shard, finish, self.transforms),
                num_threads=self.num_threads,
                prefetch=self.prefetch,
                num_workers=self.num_workers,
            )
        return Batches(read, self.batch_size, _stream(source, seed))

    def eval_batches(
        self,
        source: Source,
        *,
        batch_size: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        labelled: bool = True,
    ) -> Iterator[Batch]:
        """One pass as `eval_batches`, scaled and transformed, but never augmented."""
        transforms = self.eval_transforms
        if transforms is None:
            transforms = self.transforms
        if transforms:
            from distilljax.data.transforms import Transformed  # heavy

            source = Transformed(source, transforms)
        return eval_batches(
            source,
            batch_size or self.batch_size,
            process_index=process_index,
            process_count=process_count,
            scale=self.scale,
            flatten=self.flatten,
            labelled=labelled,
        )

    def _check(self, source: Source, process_index: int, process_count: int) -> None:
        check_not_empty("Loader", source)
        check_shards("Loader", self.batch_size, process_index, process_count)
        if self.batch_size > len(source):
            fail(
                "Loader",
                "batch_size",
                f"be at most the size of the source, {len(source)}",
                self.batch_size,
                "Use a smaller batch, or more examples.",
            )
        if not self.scale > 0:
            fail(
                "Loader",
                "scale",
                "be positive",
                self.scale,
                "Inputs are divided by it.",
            )
        if self.teacher_view not in ("same", "clean", "independent"):
            fail(
                "Loader",
                "teacher_view",
                'be "same", "clean" or "independent"',
                repr(self.teacher_view),
                "See the documentation of Loader.",
            )
        if self.augment is None and self.teacher_view != "same":
            fail(
                "Loader",
                "teacher_view",
                'be "same" where augment is None',
                repr(self.teacher_view),
                "Without an augmentation there is only one view.",
            )
        if self.transforms and self.in_memory:
            fail(
                "Loader",
                "in_memory",
                "be False or None where there are transforms",
                True,
                "Transforms of single examples are read by Grain; or use augment.",
            )


@dataclass(frozen=True)
class MemoryReader:
    """Gathers a whole batch at once from arrays; nothing to read ahead."""

    arrays: Arrays
    order: Order
    shard: Shard
    finish: Finish

    def __call__(self, next_example: int) -> Batch:
        """This process's rows of the global batch that begins at ``next_example``."""
        start = next_example + self.shard.process_index * self.shard.rows
        index = self.order.indices(start, self.shard.rows)
        return self.finish(start, read_rows(self.arrays, index), index)


class Batches:
    """The endless iterator of a Loader: a reader, and where the next batch begins."""

    def __init__(
        self,
        read: Callable[[int], Batch],
        batch_size: int,
        stream: dict[str, int],
    ):
        self._read = read
        self._batch_size = batch_size
        self._stream = stream
        self._next_example = 0

    def __iter__(self) -> Batches:
        """Itself: there is one position."""
        return self

    def __next__(self) -> Batch:
        """The next batch; a failed read leaves the position where it was."""
        batch = self._read(self._next_example)
        self._next_example += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """The state after the batch last yielded; the same in every process."""
        return {"next_example": self._next_example} | self._stream

    def set_state(self, state: dict[str, int]) -> None:
        """Continue where ``state`` was taken; it must be of this stream."""
        expected = {"next_example", *self._stream}
        if set(state) != expected:
            fail(
                "set_state",
                "state",
                f"have the keys {sorted(expected)}",
                sorted(state),
                "Pass what get_state returned.",
            )
        for key, value in self._stream.items():
            if state[key] != value:
                fail(
                    "set_state",
                    "state",
                    f"be of this stream, whose {key} is {value}",
                    state[key],
                    "Resume with the seed and the data of the first run, or begin a "
                    "new one.",
                )
        if state["next_example"] < 0:
            fail(
                "set_state",
                "state",
                "have next_example >= 0",
                state["next_example"],
                "Pass what get_state returned.",
            )
        self._next_example = int(state["next_example"])


def _stream(source: Source, seed: int) -> dict[str, int]:
    """What a stream is told by, beside its position."""
    stream = {"seed": seed, "num_examples": len(source)}
    fingerprint = getattr(source, "fingerprint", None)
    if fingerprint is not None:
        digest = hashlib.blake2b(str(fingerprint).encode(), digest_size=6)
        stream["source"] = int.from_bytes(digest.digest(), "little")
    return stream


def _fits_in_memory(source: Source, limit_bytes: int = 2**30) -> bool:
    if isinstance(source, Arrays):
        return True
    example = source[0]
    if "inputs" not in example:
        return False  # tokens are read from where they are
    stored = sum(np.asarray(value).nbytes for value in example.values())
    return stored * len(source) <= limit_bytes
