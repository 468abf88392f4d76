"""Gathered features: values and gradients over eight shards are those of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from distilljax.losses import _shards as shards

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(16, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 4)).astype(np.float32)
ALL, SPLIT = PartitionSpec(), PartitionSpec(("data", "fsdp"))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def gram(x, axis_name=None):
    """A scalar: every pair of the batch, the same on every shard."""
    x = shards.gather(x, axis_name)
    return jnp.mean((x @ x.T) ** 2)


def rivals(x, axis_name=None):
    """One value per anchor: how it stands out among all rows but its own."""
    everyone = shards.gather(x, axis_name)
    own = shards.first_row(len(x), axis_name) + jnp.arange(len(x))
    others = jnp.arange(len(everyone))[None] != own[:, None]
    return jnp.sum(jnp.where(others, jnp.sin(x @ everyone.T), 0.0), axis=1)


def test_without_an_axis_nothing_happens():
    x = jnp.asarray(INPUTS)
    assert shards.gather(x, None) is x
    assert shards.first_row(4, None) == 0


def test_rows_keep_the_order_of_the_batch(mesh):
    """Over two axes as well, and booleans too: masks are gathered like features."""

    def local(x, where):
        axes = ("data", "fsdp")
        own = shards.first_row(len(x), axes)
        return shards.gather(x, axes)[None], shards.gather(where, axes)[None], own[None]

    where = INPUTS[:, 0] > 0
    split = jax.shard_map(local, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)
    gathered, masks, first = jax.jit(split)(INPUTS, where)
    for rows, mask in zip(gathered, masks, strict=True):
        np.testing.assert_array_equal(rows, INPUTS)
        np.testing.assert_array_equal(mask, where)
    np.testing.assert_array_equal(first, np.arange(0, 16, 2))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("loss", [gram, rivals])
def test_gradients_inside_a_shard_are_averaged_as_usual(mesh, loss, check_vma):
    """The loop that people write: local loss and gradient, and `pmean` of both.

    A gather that is detached, so that a shard differentiates its own rows only, gives
    the right value and half of this gradient.
    """
    axes = ("data", "fsdp")

    def local(kernel, x):
        # Without this cast jax sums the kernel's gradient over shards by itself.
        kernel = jax.lax.pcast(kernel, axes, to="varying") if check_vma else kernel
        value, gradient = jax.value_and_grad(
            lambda kernel: jnp.mean(loss(x @ kernel, axes))
        )(kernel)
        return jax.lax.pmean((value, gradient), axes)

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(ALL, SPLIT), out_specs=ALL, check_vma=check_vma
    )
    value, gradient = jax.jit(split)(KERNEL, INPUTS)
    expected, slope = jax.value_and_grad(
        lambda kernel: jnp.mean(loss(jnp.asarray(INPUTS) @ kernel))
    )(jnp.asarray(KERNEL))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [gram, rivals])
def test_gradients_from_outside_are_those_of_one_device(mesh, loss):
    axes = ("data", "fsdp")
    split = jax.shard_map(
        lambda x: jnp.atleast_1d(loss(x, axes)),
        mesh=mesh,
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    weights = 1 + jnp.arange(16) / 4 if loss is rivals else jnp.ones(8) / 8
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weights * split(x))))(INPUTS)
    alone = weights if loss is rivals else 1.0
    slope = jax.grad(lambda x: jnp.sum(alone * loss(x)))(jnp.asarray(INPUTS))
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-5)
