"""The ranking loss: which pairs count, its margin, and ties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import oracles

RNG = np.random.default_rng(0)
TEACHER = RNG.normal(size=(4, 9)).astype(np.float32)
STUDENT = (TEACHER + RNG.normal(size=(4, 9))).astype(np.float32)
hinge_ranking = jax.jit(losses.hinge_ranking, static_argnames="k")


@pytest.mark.parametrize(("k", "margin"), [(1, 1.0), (3, 0.5), (9, 2.0)])
def test_follows_the_definition_with_a_margin(k, margin):
    def total(student):
        teacher = jnp.asarray(TEACHER)
        return losses.hinge_ranking(student, teacher, k=k, margin=margin).sum()

    value, slope = jax.jit(jax.value_and_grad(total))(jnp.asarray(STUDENT))
    expected = oracles.hinge(STUDENT, TEACHER, k, margin)
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        slope, oracles.hinge_gradient(STUDENT, TEACHER, k, margin), atol=1e-6
    )


def test_only_the_teachers_order_counts():
    warped = np.exp(2 * TEACHER) - 5
    np.testing.assert_allclose(
        hinge_ranking(STUDENT, warped, k=3), hinge_ranking(STUDENT, TEACHER, k=3)
    )


def test_a_student_that_ranks_with_room_to_spare_is_done():
    order = np.argsort(np.argsort(TEACHER, axis=-1), axis=-1)
    student = jnp.asarray(2.0 * order, jnp.float32)
    np.testing.assert_array_equal(hinge_ranking(student, TEACHER, k=9), np.zeros(4))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([0.0, 5.0, 0.0], [1.0, 1.0, 1.0], 0.0),  # ties are no pairs
        ([-np.inf, 0.0, 0.0], [1.0, 0.0, 0.0], np.inf),
        ([0.0, -np.inf, 0.0], [1.0, 0.0, -np.inf], np.inf),  # ranks the third above
        ([5.0, -np.inf, 0.0], [1.0, 0.0, 0.5], 0.0),
        ([0.0, 0.0, -np.inf], [1.0, 0.0, -np.inf], 1.0),  # the third is not there
    ],
)
def test_ties_and_impossible_classes(student, teacher, expected):
    both = jax.jit(
        jax.value_and_grad(lambda z, v: losses.hinge_ranking(z, v, k=2, margin=1.0))
    )
    value, slope = both(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(value, expected)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 10}, r"k must lie in \[1, 9\]"),
        ({"k": 0}, "k must"),
        ({"margin": -1.0}, "margin"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=f"hinge_ranking: {message}"):
        losses.hinge_ranking(jnp.asarray(STUDENT), jnp.asarray(TEACHER), **options)
