"""What every layer shares: means that are not divided yet, and paths in pytrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

Scalar: TypeAlias = int | float | np.number | Real[Array, ""]
"""One number, known now or traced."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean that has not been divided yet: a sum, and how many values it counts.

    Means of unequal parts cannot be averaged, but their sums and counts can be added.
    So microbatches, shards, hosts and logging windows all exchange this pair, and the
    division happens once, when a number is shown.

    Attributes:
      sum: Sum of the values that count.
      count: How many values count (or the sum of their weights).

    Example:
      >>> halves = Mean(6.0, 3.0) + Mean(0.0, 1.0)   # means of 2 over 3, and 0 over 1
      >>> float(halves.value)                         # and not (2 + 0) / 2
      1.5
      >>> float(Mean(0.0, 0.0).value)                 # nothing counted
      0.0
    """

    # Any, because transformations rebuild this node around whatever they carry: shapes
    # (jax.eval_shape), shardings, placeholders. The shape checker would refuse those.
    sum: Any
    count: Any

    @property
    def value(self) -> Float[Array, "..."]:
        """The mean, float32; 0 where nothing was counted."""
        count = jnp.asarray(self.count, jnp.float32)
        safe = jnp.where(count == 0, 1.0, count)
        return jnp.where(count == 0, 0.0, jnp.asarray(self.sum, jnp.float32) / safe)

    def __add__(self, other: Mean) -> Mean:
        """The mean over both sets of values."""
        return Mean(self.sum + other.sum, self.count + other.count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Metrics(Mapping[str, Mean]):
    """What a step returns besides its state: a `Mean` by name, all in one array.

    For every array that a compiled program returns, JAX makes a buffer on every device,
    step by step. So these are one, and are taken apart when somebody reads them.

    Attributes:
      array: The sums and the counts, [2, names].
      names: The names, sorted.

    Example:
      >>> found = Metrics.of({"kl": Mean(6.0, 3.0), "loss": Mean(5.0, 1.0)})
      >>> found.array.shape, {name: float(mean.value) for name, mean in found.items()}
      ((2, 2), {'kl': 2.0, 'loss': 5.0})
    """

    array: Any
    names: tuple[str, ...] = field(metadata={"static": True})

    @staticmethod
    def of(means: Mapping[str, Mean]) -> Metrics:
        """Scalar means, whose sums and counts become float32."""
        names = tuple(sorted(means))
        sums = [jnp.asarray(means[name].sum, jnp.float32) for name in names]
        counts = [jnp.asarray(means[name].count, jnp.float32) for name in names]
        return Metrics(jnp.stack([jnp.stack(sums), jnp.stack(counts)]), names)

    def __getitem__(self, name: str) -> Mean:
        if name not in self.names:
            raise KeyError(f"Metrics: name must be one of {self.names}, got {name!r}.")
        column = _column(self.array, self.names.index(name))
        return Mean(*(_column(column, at) for at in range(2)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _column(x: Any, at: int) -> Any:
    """The last axis, at an index that is known: nothing is sent to a device."""
    if isinstance(x, np.ndarray):
        return np.take(x, at, axis=-1)

    def take(x: Any) -> Any:
        return jax.lax.index_in_dim(x, at, axis=-1, keepdims=False)

    if isinstance(x, jax.Array):
        return take(x)
    # of shapes a shape, and of what else a transformation may have put there, that
    return jax.eval_shape(take, x) if hasattr(x, "shape") else x


def path_of(key_path: Sequence[Any]) -> str:
    """The path of a leaf as rules and patterns see it: ``layers/0/kernel``.

    Example:
      >>> tree = {"layers": {0: {"kernel": 1.0}}}
      >>> [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
      ['layers/0/kernel']
    """
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")
