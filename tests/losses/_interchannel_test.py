"""Correlations of channels do not see where something is, and need equal channels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import relation_oracles as oracles
from tests.losses.contract import UNOPTIMIZED

RNG = np.random.default_rng(0)
STUDENT = jnp.asarray(RNG.normal(size=(2, 4, 3, 5)), jnp.float32)
TEACHER = jnp.asarray(RNG.normal(size=(2, 6, 6, 5)), jnp.float32)


@functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
def measure(student):
    def total(student):
        values = losses.interchannel_correlation(student, TEACHER)
        return jnp.sum(values), values

    return jax.grad(total, has_aux=True)(student)


def test_images_of_other_sizes_and_other_places():
    _, values = measure(STUDENT)
    np.testing.assert_allclose(values, oracles.icc(STUDENT, TEACHER), rtol=1e-5)
    _, mirrored = measure(STUDENT[:, ::-1])
    np.testing.assert_allclose(mirrored, values, rtol=1e-5)


def test_a_dead_channel_has_a_finite_gradient():
    gradient, values = measure(STUDENT.at[..., 2].set(0))
    assert np.all(np.isfinite(gradient))
    assert np.all(np.isfinite(values))


@pytest.mark.parametrize(
    ("teacher", "remedy"),
    [
        (TEACHER[..., :4], "project the student's features"),
        (TEACHER[:1], "both models saw one batch"),
        (TEACHER[0, 0], r"\[batch, space, ..., channels\]"),
    ],
)
def test_other_channels_and_examples_are_refused(teacher, remedy):
    with pytest.raises(ValueError, match=remedy) as caught:
        losses.interchannel_correlation(STUDENT, teacher)
    assert str(caught.value).startswith("interchannel_correlation: teacher must have")
