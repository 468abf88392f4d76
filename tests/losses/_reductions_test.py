"""Sums and means under a mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses

VALUES = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
MASK = jnp.array([[True, False, True], [False, False, True]])

sum_and_gradient = jax.jit(jax.value_and_grad(losses.masked_sum))
mean_and_gradient = jax.jit(jax.value_and_grad(losses.masked_mean))


def test_only_what_counts_is_summed_and_counted():
    assert losses.masked_sum(VALUES, MASK) == 37
    np.testing.assert_allclose(losses.masked_mean(VALUES, MASK), 37 / 3, rtol=1e-6)
    assert losses.masked_sum(VALUES) == 63
    assert losses.masked_mean(VALUES) == 10.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_zero_times_nan_is_nan_so_a_mask_is_no_factor(bad):
    dirty = jnp.where(MASK, VALUES, bad)
    for reduce in (sum_and_gradient, mean_and_gradient):
        value, gradient = reduce(dirty, MASK)
        expected, slope = reduce(VALUES, MASK)
        assert value == expected
        np.testing.assert_array_equal(gradient, slope)
        np.testing.assert_array_equal(gradient[~MASK], np.zeros(3))


@pytest.mark.parametrize("reduce", [sum_and_gradient, mean_and_gradient])
def test_an_empty_mask_is_zero_with_zero_gradient(reduce):
    nothing = jnp.zeros_like(MASK)
    value, gradient = reduce(jnp.full((2, 3), jnp.nan), nothing)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_an_empty_array_is_zero():
    assert losses.masked_sum(jnp.zeros((0, 3))) == 0
    assert losses.masked_mean(jnp.zeros((0, 3))) == 0


def test_an_empty_mask_through_a_whole_loss():
    logits = jnp.full((3, 4), jnp.inf)
    nothing = jnp.zeros(3, bool)

    def loss(logits):
        values = losses.forward_kl(logits, logits, where=nothing)
        return losses.masked_mean(values, nothing)

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((3, 4)))


def test_padding_never_changes_the_loss():
    """The same examples in a longer batch, padded with anything at all."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    where = np.ones((2, 3), bool)

    @jax.jit
    def mean(student, teacher, where):
        values = losses.forward_kl(student, teacher, where=where)
        return losses.masked_mean(values, where)

    width = ((0, 0), (0, 2), (0, 0))
    padded = [np.pad(x, width, constant_values=np.nan) for x in (student, teacher)]
    longer = np.pad(where, width[:2])
    np.testing.assert_allclose(
        mean(*padded, longer), mean(student, teacher, where), rtol=1e-6
    )


def test_a_mask_of_examples_never_masks_classes():
    """Where the batch is as large as the vocabulary, the shapes cannot tell."""
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(4, 4))) for _ in range(2))
    where = jnp.array([True, True, False, False])
    for loss in (losses.forward_kl, losses.total_variation, losses.logit_mse):
        loss = jax.jit(loss)
        values = loss(student, teacher, where=where)
        np.testing.assert_allclose(values[:2], loss(student, teacher)[:2], rtol=1e-6)
        np.testing.assert_array_equal(values[2:], np.zeros(2))


def test_counts_and_hits_are_numbers_too():
    """Accuracy: the mean of booleans, in float32; a mask may be integers."""
    hits = jnp.array([True, True, False, True])
    accuracy = losses.masked_mean(hits, jnp.array([1, 1, 1, 0]))
    np.testing.assert_allclose(accuracy, 2 / 3, rtol=1e-6)
    assert accuracy.dtype == jnp.float32
    assert losses.masked_sum(jnp.arange(5)) == 10


def test_bfloat16_is_summed_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    ones = jnp.ones(1000, jnp.bfloat16)
    assert losses.masked_sum(ones) == 1000
    assert losses.masked_mean(ones) == 1


@pytest.mark.parametrize("reduce", [losses.masked_sum, losses.masked_mean])
def test_a_mask_of_another_shape_is_refused(reduce):
    with pytest.raises(ValueError, match=r"where must have the shape.*\(2, 3\)"):
        reduce(VALUES, MASK[:, 0])
