"""Training on a mesh of simulated devices, as tests compare it with one device."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import optax
from flax import nnx

from distilljax import make_distill_step
from distilljax.sharding import (
    batch_axes,
    batch_sharding,
    mesh_from_string,
    tree_shardings,
)


def sharded(
    mesh_text, objective, teacher, student, batch, rules=(), *, devices=8, **kwargs
):
    """Three steps of the pure layer; the state, the last metrics, and the shardings.

    Teacher and state are split wherever they can be. There is one compilation.
    """
    mesh = mesh_from_string(mesh_text, jax.devices()[:devices])
    kwargs |= {"student": student, "tx": optax.adam(1e-2)}
    with jax.set_mesh(mesh):
        frozen = nnx.merge(*nnx.split(teacher))
        state = nnx.state(frozen)
        nnx.update(
            frozen,
            jax.device_put(state, tree_shardings(state, mesh, rules, min_size=1)),
        )
        make = partial(make_distill_step, objective, frozen, **kwargs)
        shardings = tree_shardings(
            jax.eval_shape(make().init, student), mesh, rules, min_size=1
        )
        step = make(state_shardings=shardings, batch_axes=batch_axes(mesh))
        state = jax.jit(make().init, out_shardings=shardings)(student)
        batch = jax.device_put(batch, batch_sharding(mesh))
        for _ in range(3):
            state, metrics = step.pure(state, step.teacher_state, batch)
            jax.block_until_ready(
                metrics
            )  # simulated devices run one program at a time
        assert step.pure._cache_size() == 1
    return state, metrics, shardings


def assert_placed(state, shardings):
    """Born sharded and still so: parameters, and moments, which are the larger part."""
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def pieces(x):
    """The shapes of what lies on the devices."""
    return {shard.data.shape for shard in x.addressable_shards}


def assert_close(actual, expected, rtol=1e-5, atol=1e-7):
    """All arrays of two trees."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        actual,
        expected,
    )
