"""CKA: its golden value, what it is blind to, and batches that do not vary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from distilljax import losses
from tests.losses import feature_oracles as oracles
from tests.losses.oracles import central_differences

RNG = np.random.default_rng(0)
# Columns without a mean, at right angles: their variances are the eigenvalues.
AXES = hadamard(8)[:, 1:].astype(np.float32)
STUDENT = jnp.asarray(AXES[:, :4] * np.sqrt([3, 2, 1, 1], dtype=np.float32))
TEACHER = jnp.asarray(AXES[:, :5] * np.sqrt([3, 2, 1, 1, 1], dtype=np.float32))

linear_cka = jax.jit(losses.linear_cka)


def rotation(width):
    turned, _ = np.linalg.qr(RNG.normal(size=(width, width)))
    return jnp.asarray(turned, jnp.float32)


def test_worked_example_and_rotations():
    """CKA 15 / sqrt(15 * 16) = .968246 from the spectra alone, before and after turns.

    Without the centring the offset would dominate, and give 1.
    """
    student, teacher = rotation(4), rotation(5)
    for x, y in (
        (STUDENT, TEACHER),
        (STUDENT @ student, TEACHER),
        (3 * STUDENT @ student + 2, TEACHER @ teacher - 7),
    ):
        np.testing.assert_allclose(1 - linear_cka(x, y), 0.968246, rtol=2e-6)


@pytest.mark.parametrize("rows", [8, 9])
def test_more_rows_than_columns_and_fewer_are_one_loss(rows):
    """Inner products of rows up to 8, of columns beyond."""
    student, teacher = RNG.normal(size=(rows, 5)), RNG.normal(size=(rows, 8)) + 1
    both = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    value, slope = jax.jit(jax.value_and_grad(losses.linear_cka))(*both)
    np.testing.assert_allclose(value, oracles.linear_cka(student, teacher), rtol=1e-5)
    differences = central_differences(lambda x: oracles.linear_cka(x, teacher), student)
    np.testing.assert_allclose(slope, differences, rtol=1e-4, atol=1e-6)


def test_rows_that_do_not_count_are_not_in_the_mean_either():
    student, teacher = RNG.normal(size=(2, 5, 3)), RNG.normal(size=(2, 5, 4))
    where = RNG.random((2, 5)) < 0.7
    both = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    expected = oracles.linear_cka(student[where], teacher[where])
    np.testing.assert_allclose(
        linear_cka(*both, where=jnp.asarray(where)), expected, rtol=1e-5
    )


@pytest.mark.parametrize("offset", [0.1, 1000.1])
def test_a_side_that_does_not_vary_is_unlike_anything(offset):
    """Rounding errors of the mean are no variation: 1000.1 - mean is not quite 0."""
    for teacher in (TEACHER, jnp.tile(TEACHER, (2, 1))):  # both forms
        constant = jnp.full((len(teacher), 4), offset)
        value, slope = jax.value_and_grad(linear_cka)(constant, teacher)
        assert value == 1
        assert not slope.any()


def test_one_row_has_no_relations():
    value, slope = jax.value_and_grad(linear_cka)(STUDENT[:1], TEACHER[:1])
    assert value == 0
    assert not slope.any()


def test_very_large_features_do_not_overflow():
    np.testing.assert_allclose(linear_cka(1e15 * STUDENT, TEACHER), 0.031754, rtol=1e-4)
    long = jnp.tile(TEACHER, (2, 1))
    value = linear_cka(1e15 * jnp.tile(STUDENT, (2, 1)), 1e-15 * long)
    np.testing.assert_allclose(value, 0.031754, rtol=1e-4)


def test_a_list_of_rows_is_wanted():
    with pytest.raises(ValueError, match=r"linear_cka: student must have the axes"):
        losses.linear_cka(STUDENT[0], TEACHER[0])
