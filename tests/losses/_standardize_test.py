"""Standardised logits: what they forget, and rows that have no spread."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import oracles

LOGITS = np.random.default_rng(0).normal(size=(3, 6)) * 4


@pytest.mark.parametrize("ddof", [0, 1])
def test_mean_is_zero_and_deviation_one(ddof):
    standard = losses.standardize_logits(jnp.asarray(LOGITS, jnp.float32), ddof=ddof)
    np.testing.assert_allclose(standard, oracles.standard(LOGITS, ddof), atol=1e-6)


@jax.jit
def loss_and_slope(z, v):
    def loss(z):
        z, standard = losses.standardize_logits(z), losses.standardize_logits(v)
        return losses.forward_kl(z, standard, temperature=2.0).sum()

    return jax.value_and_grad(loss)(z)


def test_the_students_scale_is_left_alone():
    """The gradient has no component along the logits: nothing here sets their size."""
    z = jnp.asarray(LOGITS, jnp.float32)
    v = z[:, ::-1]
    value, slope = loss_and_slope(z, v)
    doubled, _ = loss_and_slope(2 * z + 1, v)
    np.testing.assert_allclose(doubled, value, rtol=1e-5)
    centered = z - z.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(jnp.sum(slope * centered, axis=-1), 0, atol=1e-6)


def test_equal_logits_give_zeros_and_a_finite_gradient():
    z = jnp.full((1, 6), 3.0)
    np.testing.assert_array_equal(losses.standardize_logits(z), np.zeros((1, 6)))
    _, slope = loss_and_slope(z, jnp.asarray(LOGITS[:1], jnp.float32))
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ddof": 6}, r"ddof must lie in \[0, 5\]"),
        ({"ddof": -1}, "ddof must lie in"),
        ({"min_std": 0.0}, "min_std must lie in"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=f"standardize_logits: {message}"):
        losses.standardize_logits(jnp.zeros((2, 6)), **options)
