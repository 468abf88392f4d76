"""Labels: out of range, smoothed, shifted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses

# Compiled whole: op by op, every operation would be compiled for every shape.
cross_entropy = jax.jit(losses.cross_entropy)
soft_cross_entropy = jax.jit(losses.soft_cross_entropy)

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)


@jax.jit
def summed_gradient(logits, labels):
    return jax.grad(lambda z: losses.cross_entropy(z, labels).sum())(logits)


@pytest.mark.parametrize("bad", [-1, -100, 5, 10**6])
def test_a_label_out_of_range_is_nan_there_and_nowhere_else(bad):
    """Clamped or wrapped, it would train on the wrong class in silence."""
    labels = jnp.array([0, bad, 2, 4])
    values = cross_entropy(LOGITS, labels)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False, False])
    gradient = np.asarray(summed_gradient(LOGITS, labels))
    assert np.all(np.isnan(gradient[1]))
    assert np.all(np.isfinite(gradient[[0, 2, 3]]))


def test_a_masked_label_out_of_range_costs_nothing():
    where = jnp.array([True, False, True, True])
    values = cross_entropy(LOGITS, jnp.array([0, -100, 2, 4]), where=where)
    assert values[1] == 0
    assert np.all(np.isfinite(values))


def test_small_integer_labels_work():
    """As image data has them, with more classes than their type can count."""
    logits = jnp.zeros((2, 300))
    values = cross_entropy(logits, jnp.array([3, 199], jnp.uint8))
    np.testing.assert_allclose(values, np.log(300), rtol=1e-6)
    values = cross_entropy(logits, jnp.array([3, -1], jnp.int8))
    np.testing.assert_array_equal(np.isnan(values), [False, True])


def test_next_token_perfect_is_zero_and_copy_current_is_large():
    """Shifted as documented; unshifted, the two numbers would change places."""
    tokens = jnp.array([[1, 3, 2, 0, 4, 1]])
    following = 50.0 * jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), 5)
    copying = 50.0 * jax.nn.one_hot(tokens, 5)
    labels, where = tokens[:, 1:], jnp.ones((1, 5), bool)
    perfect = cross_entropy(following[:, :-1], labels, where=where)
    copied = cross_entropy(copying[:, :-1], labels, where=where)
    assert losses.masked_mean(perfect, where) < 1e-6
    assert losses.masked_mean(copied, where) > 40


def test_smoothing_skips_impossible_classes():
    """Over all classes, one at -inf would make every value infinite."""
    logits = jnp.array([1.0, 2.0, -jnp.inf])
    label = jnp.array(0)
    slope = summed_gradient(logits, label)
    assert np.all(np.isfinite(slope))
    smooth = {"label_smoothing": 0.3}
    np.testing.assert_allclose(
        cross_entropy(logits, label, **smooth),
        cross_entropy(logits[:2], label, **smooth),
        rtol=1e-6,
    )
    assert slope[2] == 0


def test_smoothing_is_distillation_from_an_indifferent_teacher():
    uniform, labels, eps = jnp.zeros((4, 5)), jnp.array([0, 1, 2, 3]), 0.2
    smoothed = cross_entropy(LOGITS, labels, label_smoothing=eps)
    hard = cross_entropy(LOGITS, labels)
    soft = soft_cross_entropy(LOGITS, uniform)
    np.testing.assert_allclose(smoothed, (1 - eps) * hard + eps * soft, rtol=1e-6)


def test_one_hot_labels_are_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"argmax\(labels, axis=-1\)"):
        losses.cross_entropy(LOGITS, jnp.eye(4, 5, dtype=jnp.int32))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\]"):
        losses.cross_entropy(LOGITS, jnp.zeros(4, jnp.int32), label_smoothing=1.5)
