"""Batches for evaluation: every example once, in order, all batches of one shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Shaped

from distilljax.data.finish import Batch, Shard, check_reserved, check_shards, scaled
from distilljax.data.labels import check_labelled
from distilljax.data.rows import check_examples
from distilljax.data.sources import (
    Source,
    check_not_empty,
    num_classes_of,
    read_rows,
)


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    scale: float = 1.0,
    flatten: bool = False,
    labelled: bool = True,
) -> Iterator[Batch]:
    """One pass over a source; the last batch is padded and masked.

    Every process yields the same number of batches, ceil(len(source) / batch_size), so
    that no process waits for another. Rows of padding have ``loss_mask`` False, index
    -1, and 0 everywhere else: an evaluation that sums under the mask is exact.

    Args:
      source: A labelled source (not its config); ``load_in_memory`` it if it is read
        often.
      batch_size: Examples in a batch, over all processes; may exceed the source.
      process_index: Which process this is.
      process_count: How many processes share each batch.
      scale: The inputs are divided by this; the same as in training.
      flatten: Yield [batch, features]; the same as in training.
      labelled: False takes examples without labels too, to ask a teacher about them.

    Returns:
      An iterator of dicts of local NumPy arrays: ``inputs`` float32, ``labels`` int32,
      ``loss_mask`` bool, ``index`` int64, and the other keys of the examples as they
      are stored. Examples of tokens may have a ``loss_mask`` of their own, which is
      then padded.

    Example:
      >>> from distilljax.data.sources import Arrays
      >>> source = Arrays(np.ones((3, 1), np.uint8), np.array([5, 6, 7]))
      >>> for batch in eval_batches(source, 2):
      ...     print(batch["labels"].tolist(), batch["loss_mask"].tolist())
      [5, 6] [True, True]
      [7, 0] [True, False]
    """
    check_not_empty("eval_batches", source)
    check_shards("eval_batches", batch_size, process_index, process_count)
    if labelled:
        check_labelled(
            "eval_batches",
            source,
            "Evaluation is on labelled data: give it a part that has labels, or none.",
        )
    shard = Shard(batch_size, process_index, process_count)
    return _one_pass(source, shard, scale, flatten)


def _one_pass(
    source: Source, shard: Shard, scale: float, flatten: bool
) -> Iterator[Batch]:
    for first in range(0, len(source), shard.batch_size):
        start = first + shard.process_index * shard.rows
        index = np.arange(start, start + shard.rows)
        mask = index < len(source)
        # A process without a row of the last batch still needs the shape of one.
        real = index[mask] if mask.any() else np.zeros(1, np.int64)
        rows = read_rows(source, real)
        made = ("index", "loss_mask") if "inputs" in rows else ("index",)
        check_reserved("eval_batches", rows, made)
        check_examples("eval_batches", rows, num_classes_of(source), real)
        if "inputs" in rows:
            rows["inputs"] = scaled(rows["inputs"], scale)
        batch = {name: _padded(array, mask) for name, array in rows.items()}
        if flatten and "inputs" in batch:
            batch["inputs"] = batch["inputs"].reshape(shard.rows, -1)
        # the mask of tokens is padded with False already
        yield {"loss_mask": mask, **batch, "index": np.where(mask, index, -1)}


def _padded(
    array: Shaped[np.ndarray, "real *features"], mask: Bool[np.ndarray, " rows"]
) -> Shaped[np.ndarray, "rows *features"]:
    padded = np.zeros((len(mask), *array.shape[1:]), array.dtype)
    count = int(mask.sum())
    padded[:count] = array[:count]
    return padded
