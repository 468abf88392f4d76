"""The weight of `adaptive_kl`: which classes are the head, and what it may not do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import oracles

adaptive_kl = jax.jit(losses.adaptive_kl)
TEACHER = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
STUDENT = jnp.log(jnp.array([0.2, 0.3, 0.4, 0.1]))


@pytest.mark.parametrize(
    ("mu", "weight"),
    [
        (0.0, 0.1 / 0.6),  # the likeliest class is the head in any case
        (0.5, 0.1 / 0.6),
        (0.75, 0.3 / 0.6),  # .4 + .3
        (0.95, 0.5 / 0.6),  # .4 + .3 + .2
        (1.0, 1.0),
    ],
)
def test_the_head_is_taken_from_the_likeliest_on(mu, weight):
    """Sorted from the other end, or the mask not sorted back, gives other weights."""
    forward, reverse = (
        kl(np.asarray(STUDENT), np.asarray(TEACHER))
        for kl in (oracles.forward_kl, oracles.reverse_kl)
    )
    value = adaptive_kl(STUDENT, TEACHER, mu=mu + 1e-6 if mu < 1 else mu)
    expected = weight * forward + (1 - weight) * reverse
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_order_of_the_classes_does_not_matter():
    order = jnp.array([2, 0, 3, 1])
    value = adaptive_kl(STUDENT[order], TEACHER[order], mu=0.75)
    np.testing.assert_allclose(value, adaptive_kl(STUDENT, TEACHER, mu=0.75), rtol=1e-6)


def test_an_infinite_kl_without_weight_is_not_nan():
    """All is head, so the reverse KL, which is infinite here, has weight 0."""
    teacher = jnp.array([0.0, 0.0, -jnp.inf])
    student = jnp.array([1.0, 0.0, 0.0])
    value = adaptive_kl(student, teacher, mu=1.0)
    assert np.isinf(value) == (
        oracles.akl_weight(oracles.softmax(student), oracles.softmax(teacher), 1.0) < 1
    )
    student = jnp.array([1.0, 0.0, -jnp.inf])
    assert np.isfinite(adaptive_kl(student, teacher, mu=1.0))


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_mu_is_a_probability(bad):
    with pytest.raises(ValueError, match=r"adaptive_kl: mu must lie in \[0, 1\], got"):
        losses.adaptive_kl(STUDENT, TEACHER, mu=bad)
