"""Rows packed by Grain as they are read: for those who want its packers.

Grain fills rows from a stream of pieces, and what is in a row depends on all pieces
before it. So its state is a position in *one* stream: it resumes exactly, but only with
the number of processes that it was saved with, and no row can be asked for by itself.
`Packed` plans its rows ahead and has neither limit; prefer it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distilljax._checks import check_count, fail
from distilljax.data.finish import Batch, check_shards
from distilljax.data.hashing import derive_key
from distilljax.data.text.packed import PackedRows
from distilljax.data.text.packing import shift


@dataclass(frozen=True)
class StreamLoader:
    """Batches of rows that Grain packs while it reads: not elastic.

    A loader for the same sources as `Loader`, `Packed(...)()`, of which it takes the
    pieces and not the plan. The batches have the same arrays, without ``index``.

    Attributes:
      batch_size: Rows in a batch, over all processes.
      method: "first_fit" keeps pieces whole and fills several rows at a time;
        "concatenate" cuts pieces wherever a row ends, so that no place is empty.
      shuffle: A new order of the pieces in each epoch.
      num_bins: Rows that are filled at a time (first_fit only).

    Example:
      >>> StreamLoader(batch_size=8).method
      'first_fit'
    """

    batch_size: int
    method: Literal["first_fit", "concatenate"] = "first_fit"
    shuffle: bool = True
    num_bins: int = 64

    def __post_init__(self):
        check_count("StreamLoader", "num_bins", self.num_bins)
        if self.method not in ("first_fit", "concatenate"):
            fail(
                "StreamLoader",
                "method",
                'be "first_fit" or "concatenate"',
                repr(self.method),
                "Check its spelling.",
            )

    def __call__(
        self,
        source: PackedRows,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> StreamedBatches:
        """The batches of one process, from the beginning.

        Args:
          source: The rows of a `Packed`.
          seed: Of the order; any integer.
          process_index: Which process this is.
          process_count: How many processes share each batch.
        """
        import grain  # heavy

        check_shards("StreamLoader", self.batch_size, process_index, process_count)
        if not isinstance(source, PackedRows):
            fail(
                "StreamLoader",
                "source",
                "be the rows of a Packed",
                type(source).__name__,
                "It packs the pieces of its documents.",
                TypeError,
            )
        dataset = grain.MapDataset.source(ShiftedPieces(source))
        dataset = dataset.seed(derive_key(seed, "stream") % 2**32)
        if self.shuffle:
            dataset = dataset.shuffle()
        stream: Any = dataset.repeat()[process_index::process_count].to_iter_dataset()
        packed = self._packed(stream, source.config.context)
        batches = packed.batch(self.batch_size // process_count)
        shard = {"process_index": process_index, "process_count": process_count}
        return StreamedBatches(iter(batches), {"seed": seed, **shard})

    def _packed(self, stream: Any, context: int) -> Any:
        from grain import experimental

        lengths: Any = dict.fromkeys(("tokens", "labels", "loss_mask"), context)
        if self.method == "concatenate":
            return experimental.ConcatThenSplitIterDataset(
                stream, length_struct=lengths
            )
        return experimental.FirstFitPackIterDataset(
            stream,
            length_struct=lengths,
            num_packing_bins=self.num_bins,
            shuffle_bins=self.shuffle,
        )


@dataclass(frozen=True, eq=False)
class ShiftedPieces:
    """The pieces of a source's documents, each shifted by itself."""

    source: PackedRows

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self.source.plan.pieces)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Piece ``index`` as inputs, labels and their mask."""
        pieces, store = self.source.plan.pieces, self.source.store
        one = slice(index, index + 1)
        starts = store.offsets[pieces.document[one]] + pieces.start[one]
        tokens, labels, mask = shift(
            store.all_tokens, store.all_learnt, starts, pieces.places[one]
        )
        return {"tokens": tokens, "labels": labels, "loss_mask": mask}


class StreamedBatches:
    """The endless iterator of a `StreamLoader`; it resumes as the same process only."""

    def __init__(self, batches: Any, stream: dict[str, int]):
        self._batches, self._stream = batches, stream

    def __iter__(self) -> Iterator[Batch]:
        """Itself: there is one position."""
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        found = next(self._batches)
        return {
            **{name: found[name] for name in ("tokens", "labels")},
            "loss_mask": found["loss_mask"].astype(bool),
            "segment_ids": found["tokens_segment_ids"].astype(np.int32),
            "positions": found["tokens_positions"].astype(np.int32),
        }

    def get_state(self) -> dict[str, Any]:
        """The state of Grain's iterator, and which process it is of."""
        return {"grain": self._batches.get_state(), **self._stream}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, by the same process of as many."""
        for key, value in self._stream.items():
            if state.get(key) != value:
                fail(
                    "set_state",
                    "state",
                    f"be of this stream, whose {key} is {value}",
                    state.get(key),
                    "A stream that is packed while it is read is not elastic: resume "
                    "with as many processes, or use Loader, which is.",
                )
        self._batches.set_state(state["grain"])
