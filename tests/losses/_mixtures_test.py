"""Jensen-Shannon and the skewed divergences: end points, limits and conventions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import oracles

RNG = np.random.default_rng(0)
TEACHER = (RNG.normal(size=(5, 8)) * 2).astype(np.float32)
STUDENT = (TEACHER + RNG.normal(size=(5, 8))).astype(np.float32)
GOLDEN_TEACHER = jnp.array([2.0, 1.0, 0.0, -1.0])
GOLDEN_STUDENT = jnp.array([0.5, 1.0, 0.0, 0.0])


jensen_shannon = jax.jit(losses.jensen_shannon)


@jax.jit
def sweep(student, teacher, beta):
    """Compiled once: values and gradients, plain and normalized, at a traced beta."""

    def total(student, normalized):
        values = losses.jensen_shannon(
            student, teacher, beta=beta, normalized=normalized
        )
        return values.sum(), values

    return [
        jax.value_and_grad(total, has_aux=True)(student, normalized)
        for normalized in (False, True)
    ]


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_follows_the_paper_inside(beta):
    (_, plain), slope = sweep(STUDENT, TEACHER, beta)[0]
    np.testing.assert_allclose(
        plain, oracles.js(STUDENT, TEACHER, beta=beta), rtol=1e-5
    )
    expected = oracles.js_gradient(STUDENT, TEACHER, beta=beta)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("beta", "limit", "limit_gradient"),
    [
        (0.0, oracles.forward_kl, oracles.forward_kl_gradient),
        (1.0, oracles.reverse_kl, oracles.reverse_kl_gradient),
    ],
)
def test_end_points_are_zero_and_normalized_the_two_kls(beta, limit, limit_gradient):
    ((_, plain), slope), ((_, normalized), normalized_slope) = sweep(
        STUDENT, TEACHER, beta
    )
    np.testing.assert_array_equal(plain, np.zeros(5))
    np.testing.assert_array_equal(slope, np.zeros((5, 8)))
    np.testing.assert_allclose(normalized, limit(STUDENT, TEACHER), rtol=1e-5)
    expected = limit_gradient(STUDENT, TEACHER)
    np.testing.assert_allclose(normalized_slope, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 1e-2, 0.99, 1 - 1e-4, 1 - 1e-6])
def test_normalized_stays_accurate_near_the_ends(beta):
    """With log m from logaddexp the gradient is 7 % off at 1e-6."""
    beta = float(np.float32(beta))
    (_, values), slope = sweep(STUDENT, TEACHER, beta)[1]
    options = {"beta": beta, "normalized": True}
    expected = oracles.js(STUDENT, TEACHER, **options)
    gradient = oracles.js_gradient(STUDENT, TEACHER, **options)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, rtol=1e-4, atol=1e-6)


def test_limits_in_numbers():
    """JSD / beta tends to 0.344752, and JSD / (1 - beta) to 0.357699."""
    near_zero = jensen_shannon(GOLDEN_STUDENT, GOLDEN_TEACHER, beta=1e-4)
    near_one = jensen_shannon(GOLDEN_STUDENT, GOLDEN_TEACHER, beta=1 - 1e-4)
    np.testing.assert_allclose(near_zero / 1e-4, 0.344713, rtol=2e-5)
    np.testing.assert_allclose(near_one / 1e-4, 0.357653, rtol=5e-4)


def test_ends_are_zero_even_where_a_kl_is_infinite():
    """0 * inf is nan."""
    apart = jnp.array([0.0, -jnp.inf])
    both = jax.jit(jax.value_and_grad(losses.jensen_shannon))
    for beta in (0.0, 1.0):
        value, slope = both(apart, apart[::-1], beta=beta)
        assert value == 0
        np.testing.assert_array_equal(slope, np.zeros(2))


def test_beta_may_be_traced_and_differentiated():
    @jax.jit
    @jax.grad
    def slope(beta):
        return losses.jensen_shannon(
            GOLDEN_STUDENT, GOLDEN_TEACHER, beta=beta, normalized=True
        )

    assert all(np.isfinite(slope(beta)) for beta in (0.0, 0.3, 1.0))


@pytest.mark.parametrize(
    ("loss", "unskewed"),
    [
        (losses.skew_forward_kl, losses.forward_kl),
        (losses.skew_reverse_kl, losses.reverse_kl),
    ],
)
def test_skew_zero_is_the_kl_and_skew_one_is_zero(loss, unskewed):
    @jax.jit
    def compare(student, teacher, skew):
        ones = jnp.ones(len(student))
        values, slope = jax.vjp(lambda z: loss(z, teacher, skew=skew), student)
        expected, expected_slope = jax.vjp(lambda z: unskewed(z, teacher), student)
        return values, slope(ones)[0], expected, expected_slope(ones)[0]

    values, slope, expected, expected_slope = compare(STUDENT, TEACHER, 0.0)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-6)
    values, slope, *_ = compare(STUDENT, TEACHER, 1.0)
    np.testing.assert_array_equal(values, np.zeros(5))
    np.testing.assert_array_equal(slope, np.zeros((5, 8)))


def test_skew_is_the_same_convention_as_the_parts_of_jensen_shannon():
    """JSD_b = b SKL_b + (1 - b) SRKL_(1 - b): whose share the weight is."""
    parts = 0.3 * jax.jit(losses.skew_forward_kl)(STUDENT, TEACHER, skew=0.3)
    parts += 0.7 * jax.jit(losses.skew_reverse_kl)(STUDENT, TEACHER, skew=0.7)
    whole = jensen_shannon(STUDENT, TEACHER, beta=0.3)
    np.testing.assert_allclose(whole, parts, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "argument"),
    [
        (losses.jensen_shannon, "beta"),
        (losses.skew_forward_kl, "skew"),
        (losses.skew_reverse_kl, "skew"),
    ],
)
@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_weights_outside_zero_and_one_are_refused(loss, argument, bad):
    with pytest.raises(ValueError, match=rf"{argument} must lie in \[0, 1\], got"):
        loss(GOLDEN_STUDENT, GOLDEN_TEACHER, **{argument: bad})
