"""What the transformers of this folder are built of alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from distilljax._checks import fail, is_static
from distilljax.losses._fused_mesh import position_axes


def here(module: Any) -> Any:
    """A module that NNX transforms take; they refuse one that `jax.jit` closes over.

    Where features are captured, they are noted in the module itself.
    """
    if hasattr(module, "__captures__"):
        return module
    return nnx.merge(*nnx.split(module), copy=True)


def check_functions(name: str, config: Any) -> None:
    """Fields of a config that are functions can be called; `remat` may be None."""
    for field in ("activation", "attention", "pool", "remat"):
        value = getattr(config, field, None)
        missing = value is None and (field == "remat" or not hasattr(config, field))
        if not missing and not callable(value):
            fail(
                name,
                field,
                "be a function",
                repr(value),
                "Pass it, not its name: nnx.silu, models.blocked_attention, "
                "jax.checkpoint_policies.nothing_saveable.",
                TypeError,
            )


def looked_up(table: Array, ids: Array) -> Array:
    """The rows of an embedding; nan for what is in none, -1 too.

    So that nothing is taken for something else: of a negative number numpy would take
    the row from the end.
    """
    rows = table.at[ids]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


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
