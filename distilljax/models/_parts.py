"""What the transformers of this folder are built of alike."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from distilljax._checks import is_static
from distilljax.losses._fused_mesh import position_axes


def here(module: Any) -> Any:
    """A module that NNX transforms take; they refuse one that `jax.jit` closes over.

    Where features are captured, they are noted in the module itself.
    """
    if hasattr(module, "__captures__"):
        return module
    return nnx.merge(*nnx.split(module), copy=True)


def make_linear(
    config: Any, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear map in the types of a config."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def as_batch(x: Array) -> Array:
    """Hold what was looked up to the sharding of the batch, on the mesh that is set.

    An embedding that is split along its width would else hand that split on, and every
    layer after it would be computed for all examples on each device.
    """
    axes = position_axes()
    if not axes or is_static(x):
        return x
    spec = PartitionSpec(axes, *[None] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)
