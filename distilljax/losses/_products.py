"""The products of a kernel: to the logits, back to hidden states, to its gradient.

On a mesh a kernel [width, classes] may be split over both of its axes: the classes over
`tensor`, where they stay, and the width over `fsdp`, the axis that also splits the
positions. Its rows are then needed whole: they are gathered once, before the loop over
positions, and the gradient is summed and split once, after it. (In the loop it would be
sent again for every chunk of positions, which costs more time than all layers.)
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
      width_axis: Mesh axis that splits the width outside of the loop; or None.
    """

    dtype: Any = None
    classes_axis: str | None = None
    width_axis: str | None = None

    def to_logits(
        self, hidden: Float[Array, "rows width"], kernel: Array
    ) -> Float[Array, "rows classes"]:
        """hidden @ kernel."""
        return self.hold(self._dot("rw,wc->rc", hidden, kernel))

    def to_hidden(
        self, slope: Float[Array, "rows classes"], kernel: Array
    ) -> Float[Array, "rows width"]:
        """slope @ kernel.T: the gradient of the hidden states."""
        return self._dot("rc,wc->rw", slope, kernel)

    def to_kernel(
        self, hidden: Float[Array, "rows width"], slope: Float[Array, "rows classes"]
    ) -> Float[Array, "width classes"]:
        """hidden.T @ slope: the gradient of the kernel, of these positions."""
        return self.hold(self._dot("rw,rc->wc", hidden, slope))

    def to_embedding(
        self, hidden: Float[Array, "rows width"], slope: Float[Array, "rows classes"]
    ) -> Float[Array, "classes width"]:
        """The same, transposed; on a CPU this product takes half the time."""
        return self.hold(self._dot("rc,rw->cw", slope, hidden), axis=0)

    def hold(self, x: Array, axis: int = 1) -> Array:
        """Keep an axis split over `classes_axis`, and nothing else over it."""
        if self.classes_axis is None:
            return x
        spec = [self.classes_axis if i == axis else None for i in range(x.ndim)]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    def gather(self, kernel: Array) -> Array:
        """All rows of a kernel of which a device has some."""
        axis = self.width_axis
        if axis is None:
            return kernel
        return self._on_each_shard(
            lambda part: jax.lax.all_gather(part, axis, tiled=True), kernel
        )

    def scatter(self, gradient: Array) -> Array:
        """The sum over the devices, of which each keeps the rows that are its own."""
        axis = self.width_axis
        if axis is None:
            return gradient
        return self._on_each_shard(
            lambda part: jax.lax.psum_scatter(part, axis, tiled=True), gradient
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
