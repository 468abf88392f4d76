"""Distances and angles: numbers of the authors' code, memory, and shards."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from distilljax import losses
from tests.losses.contract import UNOPTIMIZED

# Three corners of a square, and the same with one side doubled.
STUDENT = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
TEACHER = jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])


@functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
def distance(student, teacher):
    return jax.value_and_grad(losses.rkd_distance)(student, teacher)


def test_distance_of_three_points():
    """Mean over all nine pairs, the mean distance over the six that are apart."""
    value, _ = distance(STUDENT, TEACHER)
    np.testing.assert_allclose(value, 0.0184845, rtol=1e-5)


def test_angle_of_three_points():
    """Mean over all 27 triples, of which six are triangles."""
    value = jax.jit(losses.rkd_angle)(STUDENT, TEACHER)
    np.testing.assert_allclose(value, 0.0038012, rtol=1e-5)


def test_the_mean_distance_of_the_student_is_differentiated():
    """So scaling the cloud is no way down; with a constant in its place it would be."""
    _, gradient = distance(STUDENT, TEACHER)
    assert np.abs(gradient).max() > 1e-2
    np.testing.assert_allclose(jnp.sum(gradient * STUDENT), 0, atol=1e-7)


def test_far_from_the_origin_distances_keep_their_digits():
    """From inner products they would be rounded to 0.03, at points that are 1 apart."""
    exact, _ = distance(STUDENT, TEACHER)
    shifted, _ = distance(STUDENT + 1000, TEACHER - 1000)
    np.testing.assert_allclose(shifted, exact, rtol=1e-4)


@pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
def test_memory_grows_with_the_square_of_the_batch(loss):
    """All angles of 512 points are 512 arrays of [512, 512]; all differences, 64."""
    points = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(points, points).compile()
    squares = compiled.memory_analysis().temp_size_in_bytes / (512 * 512 * 4)
    assert squares < 10


def test_shards_over_two_axes_and_without_a_mask():
    """Each shard works on its own corners: all of them are counted, once."""
    rng = np.random.default_rng(2)
    student, teacher = (rng.normal(size=(16, 3)).astype(np.float32) for _ in range(2))
    axes = ("data", "fsdp")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
    split = PartitionSpec(axes)

    def local(student, teacher):
        return jnp.atleast_1d(losses.rkd_angle(student, teacher, axis_name=axes))

    sharded = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split)
    values = jax.jit(sharded, compiler_options=UNOPTIMIZED)(student, teacher)
    alone = jax.jit(losses.rkd_angle)(student, teacher)
    np.testing.assert_allclose(values, np.full(8, alone), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
def test_near_points_keep_their_digits(loss):
    """Pairs a thousandth apart: from inner products a tenth of this would be noise."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 16, 8)).astype(np.float32)
    student[8:] = student[:8] + 1e-3 * student[8:]
    both = jax.jit(jax.value_and_grad(loss))
    value, gradient = both(student, teacher)
    with jax.enable_x64(True):
        wide = (x.astype(np.float64) for x in (student, teacher))
        exact, slope = both(*wide)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-5 * np.abs(slope).max())


@pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
def test_derivatives_forwards_and_of_second_order(loss):
    """Their gradients are written by hand, and may themselves be differentiated."""
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        student, direction = (jnp.asarray(rng.normal(size=(5, 3))) for _ in range(2))
        teacher = jnp.asarray(rng.normal(size=(5, 2)))

        @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
        def derivatives(x):
            gradient = jax.grad(loss)
            along = jax.jvp(lambda x: loss(x, teacher), (x,), (direction,))[1]
            moved = jax.jvp(lambda x: gradient(x, teacher), (x,), (direction,))[1]
            return along, gradient(x, teacher), moved

        along, gradient, moved = jax.device_get(derivatives(student))
        step = 1e-5 * direction
        ends = [jax.device_get(derivatives(student + s)[1]) for s in (-step, step)]
    np.testing.assert_allclose(along, np.vdot(gradient, direction), rtol=1e-10)
    np.testing.assert_allclose(moved, (ends[1] - ends[0]) / 2e-5, rtol=1e-5, atol=1e-8)
