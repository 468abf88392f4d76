"""The learned variances: where they start, what moves them, and where they end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses

RNG = np.random.default_rng(0)
STUDENT = jnp.asarray(RNG.normal(size=(3, 4, 2)), jnp.float32)
TEACHER = jnp.asarray(STUDENT + RNG.normal(size=(3, 4, 2)), jnp.float32)
WHERE = jnp.asarray(RNG.random((3, 4)) < 0.5)


@jax.jit
def slope(raw_scale, student, where):
    def total(raw_scale):
        values = losses.variational_information(
            student, TEACHER, raw_scale=raw_scale, where=where
        )
        return losses.masked_mean(values, where)

    return jax.value_and_grad(total)(raw_scale)


def test_the_start_of_the_docstring_is_variance_five():
    raw = jnp.full(2, jnp.log(jnp.expm1(5 - 1e-5)))
    # At the teacher, where only log 5 / 2 is left.
    values = losses.variational_information(TEACHER, TEACHER, raw_scale=raw)
    np.testing.assert_allclose(values, np.full((3, 4), np.log(5) / 2), rtol=1e-6)


def test_the_scales_learn_from_what_counts_and_end_at_the_error():
    """d/d raw = sigmoid(raw) (1 / var - d^2 / var^2) / 2 channels, averaged."""
    raw = jnp.array([0.5, 2.0])
    squares = np.asarray((TEACHER - STUDENT) ** 2)[np.asarray(WHERE)].mean(axis=0)
    variance = np.logaddexp(0, np.asarray(raw, np.float64)) + 1e-5
    expected = (1 / variance - squares / variance**2) / 4
    expected /= 1 + np.exp(-np.asarray(raw, np.float64))
    _, gradient = slope(raw, STUDENT, WHERE)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)
    # The best variance of each channel is its mean squared error.
    _, gradient = slope(jnp.log(jnp.expm1(squares - 1e-5)), STUDENT, WHERE)
    np.testing.assert_allclose(gradient, np.zeros(2), atol=1e-6)


def test_padding_does_not_move_the_scales():
    """0 * nan would make every variance nan, and with it the whole student."""
    raw = jnp.array([0.5, 2.0])
    clean = slope(raw, STUDENT, WHERE)
    dirty = jnp.where(WHERE[..., None], STUDENT, jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, slope(raw, dirty, WHERE), clean)
    value, gradient = slope(raw, STUDENT, jnp.zeros_like(WHERE))
    assert value == 0
    assert not gradient.any()


def test_it_may_be_below_zero():
    """A density, not a probability: variance 0.01 and no error is log(0.1) nats."""
    raw = jnp.full(2, jnp.log(jnp.expm1(0.01)))
    values = losses.variational_information(
        TEACHER, TEACHER, raw_scale=raw, epsilon=1e-9
    )
    np.testing.assert_allclose(values, np.full((3, 4), np.log(0.1)), rtol=1e-4)


def test_bad_scales_are_refused():
    for bad in (jnp.zeros(3), jnp.zeros(()), jnp.zeros((1, 2))):
        with pytest.raises(ValueError, match=r"raw_scale must have one entry .*\(2,\)"):
            losses.variational_information(STUDENT, TEACHER, raw_scale=bad)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        losses.variational_information(
            STUDENT, TEACHER, raw_scale=jnp.zeros(2), epsilon=0.0
        )
