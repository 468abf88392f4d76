"""The products of a kernel: to the logits, back to hidden states, to its gradient.

On a mesh a kernel [width, classes] may be split over both of its axes: the classes over
`tensor`, where they stay, and the width over `fsdp`, the axis that also splits the
positions. Its rows are then needed whole, and one slice of the classes after another is
gathered, used and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from distilljax.losses import _numerics as numerics


@dataclass(frozen=True)
class Products:
    """How a kernel lies, and in which dtype it is multiplied.

    Attributes:
      dtype: Of the factors; None for that of the heads. Sums are in float32.
      classes_axis: Mesh axis that splits the classes, left to the compiler; or None.
      num_shards: Its size.
      width_axis: Mesh axis that splits the width, by hand; or None.
      num_slices: How many slices of the classes of a shard are gathered in turn.
    """

    dtype: Any = None
    classes_axis: str | None = None
    num_shards: int = 1
    width_axis: str | None = None
    num_slices: int = 1

    def to_logits(
        self, hidden: Float[Array, "rows width"], kernel: Array
    ) -> Float[Array, "rows classes"]:
        """hidden @ kernel."""
        if self.width_axis is None:
            return self.hold(self._dot("rw,wc->rc", hidden, kernel))
        shards = self._by_shard(kernel)

        def add(index: Any, logits: Array) -> Array:
            part = self._dot("rw,wsc->rsc", hidden, self._gather(shards, index))
            return self._put(logits, part, index)

        empty = self._zeros(hidden, kernel, (hidden.shape[0], *shards.shape[1:]))
        logits = jax.lax.fori_loop(0, self.num_slices, add, empty)
        return self.hold(logits.reshape(hidden.shape[0], kernel.shape[1]))

    def to_hidden(
        self, slope: Float[Array, "rows classes"], kernel: Array
    ) -> Float[Array, "rows width"]:
        """slope @ kernel.T: the gradient of the hidden states."""
        if self.width_axis is None:
            return self._dot("rc,wc->rw", slope, kernel)
        shards, slopes = self._by_shard(kernel), self._by_shard(slope)

        def add(index: Any, hidden: Array) -> Array:
            part = self._take(slopes, index)
            return hidden + self._dot("rsc,wsc->rw", part, self._gather(shards, index))

        width = kernel.shape[0] * jax.lax.axis_size(self.width_axis)
        empty = self._zeros(slope, kernel, (slope.shape[0], width), split=False)
        return jax.lax.fori_loop(0, self.num_slices, add, empty)

    def to_kernel(
        self, hidden: Float[Array, "rows width"], slope: Float[Array, "rows classes"]
    ) -> Array:
        """hidden.T @ slope: the gradient of the kernel, of these positions."""
        if self.width_axis is None:
            return self.hold(self._dot("rw,rc->wc", hidden, slope))
        slopes = self._by_shard(slope)

        def add(index: Any, total: Array) -> Array:
            part = self._dot("rw,rsc->wsc", hidden, self._take(slopes, index))
            return self._put(total, self._scatter(part), index)

        rows = hidden.shape[1] // jax.lax.axis_size(self.width_axis)
        empty = self._zeros(hidden, slope, (rows, *slopes.shape[1:]))
        total = jax.lax.fori_loop(0, self.num_slices, add, empty)
        return self.hold(total.reshape(rows, slope.shape[1]))

    def hold(self, x: Array, axis: int = 1) -> Array:
        """Keep an axis split over `classes_axis`, and nothing else over it."""
        if self.classes_axis is None:
            return x
        spec = [self.classes_axis if i == axis else None for i in range(x.ndim)]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    def _dot(self, equation: str, left: Array, right: Array) -> Array:
        wide = numerics.compute_dtype(left, right)
        dtype = self.dtype
        if dtype is None:  # that of the heads, of which one factor may be a sum
            dtype = right.dtype if left.dtype == wide else left.dtype
        return jnp.einsum(
            equation,
            left.astype(dtype),
            right.astype(dtype),
            preferred_element_type=wide,
        )

    def _by_shard(self, x: Array) -> Array:
        """[rows, classes] as [rows, shards, classes of a shard]."""
        return self.hold(x.reshape(x.shape[0], self.num_shards, -1))

    def _take(self, shards: Array, index: Any) -> Array:
        size = shards.shape[2] // self.num_slices
        return self.hold(
            jax.lax.dynamic_slice_in_dim(shards, index * size, size, axis=2)
        )

    def _gather(self, shards: Array, index: Any) -> Array:
        """A slice of the classes with all rows of the kernel."""
        return self._on_each_shard(
            lambda part: jax.lax.all_gather(part, self.width_axis, tiled=True),
            self._take(shards, index),
        )

    def _scatter(self, part: Array) -> Array:
        """The sum over devices of a slice, of which each keeps its rows."""
        return self._on_each_shard(
            lambda part: jax.lax.psum_scatter(part, self.width_axis, tiled=True), part
        )

    def _on_each_shard(self, function: Callable[[Array], Array], x: Array) -> Array:
        """By hand along `classes_axis` too: else the compiler would make x whole."""
        spec = PartitionSpec(None, self.classes_axis)
        return jax.shard_map(
            function,
            in_specs=spec,
            out_specs=spec,
            axis_names={self.classes_axis},
            check_vma=False,
        )(x)

    def _put(self, total: Array, part: Array, index: Any) -> Array:
        start = index * part.shape[2]
        total = jax.lax.dynamic_update_slice_in_dim(total, part, start, axis=2)
        return self.hold(total)

    def _zeros(
        self, left: Array, right: Array, shape: tuple[int, ...], split: bool = True
    ) -> Array:
        zeros = jnp.zeros(shape, numerics.compute_dtype(left, right))
        return self.hold(zeros) if split else zeros
