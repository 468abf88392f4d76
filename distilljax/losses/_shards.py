"""Batch-coupled losses over data-parallel shards: each shard sees everyone's features.

A loss in which the examples of a batch meet each other is another loss on a shard
alone: fewer pairs, fewer negatives. So inside `jax.shard_map` (or `jax.vmap` with a
named axis) features are gathered before they meet, and 8 devices give what one would.

The convention, for whoever writes a loss with ``axis_name`` and whoever uses one:

- A loss that returns one value per anchor returns those of its own shard, so that the
  shards' results concatenated are the result on one device. Sums over shards add up.
- A loss that returns a scalar returns the same one on every shard: that of the whole
  batch. Its *mean* over shards is the loss, as in the usual ``jax.lax.pmean`` of loss
  and gradients; their sum would count the batch once for each shard.

Under both, gradients are those of one device, because the transpose of a gather adds up
what every shard's values owe to a feature (a `psum_scatter`). Nothing is detached.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
"""A named axis of the mesh over which a batch is split, or several of them."""


def gather(
    x: Shaped[Array, "shard ..."], axis_name: AxisName | None
) -> Shaped[Array, "batch ..."]:
    """The rows of all shards, in the order of the batch; ``x`` itself without an axis.

    Pass what has been masked and cast to float32 already, and the teacher's features
    through `jax.lax.stop_gradient`, which saves their way back.
    """
    if axis_name is None:
        return x
    return jax.lax.all_gather(x, axis_name, axis=0, tiled=True)


def first_row(rows: int, axis_name: AxisName | None) -> Int[Array, ""]:
    """Where this shard's rows, ``rows`` in number, begin among the gathered ones."""
    if axis_name is None:
        return jnp.zeros((), jnp.int32)
    return jax.lax.axis_index(axis_name) * rows
