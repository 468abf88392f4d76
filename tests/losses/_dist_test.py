"""DIST on batches where a correlation is not defined, or says nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import oracles
from tests.losses.contract import UNOPTIMIZED

TEACHER = jnp.array([2.0, 1.0, 0.0, -1.0])
STUDENT = jnp.array([0.5, 1.0, 0.0, 0.0])


@functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
def weighted(student, teacher, inter_weight, intra_weight):
    """Value and gradient; the weights are traced, so each shape is compiled once."""

    def loss(student):
        weights = {"inter_weight": inter_weight, "intra_weight": intra_weight}
        return losses.dist(student, teacher, **weights)

    return jax.value_and_grad(loss)(student)


def inter(student, teacher):
    return weighted(student, teacher, 1.0, 0.0)


def intra(student, teacher):
    return weighted(student, teacher, 0.0, 1.0)


def test_worked_example_of_one_row():
    """1 - r over the classes; the sign flipped, the student would learn to differ."""
    value, gradient = inter(STUDENT[None], TEACHER[None])
    np.testing.assert_allclose(value, 0.653604, rtol=1e-5)
    expected = [-0.949031, 0.590733, 0.138202, 0.220096]
    np.testing.assert_allclose(gradient[0], expected, rtol=2e-5)


def test_one_row_has_no_intra_term():
    """Nor does a mask that leaves one: nothing varies over the batch."""
    value, gradient = intra(STUDENT[None], TEACHER[None])
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


def test_two_rows_correlate_fully_or_inversely():
    """Two points lie on a line: the intra term counts signs, and teaches nothing."""
    student = jnp.stack([STUDENT, STUDENT[::-1]])
    teacher = jnp.stack([TEACHER, TEACHER * 0])
    value, gradient = intra(student, teacher)
    q, p = oracles.softmax(student), oracles.softmax(teacher)
    opposite = np.sign(q[0] - q[1]) != np.sign(p[0] - p[1])
    assert 0 < opposite.mean() < 1
    np.testing.assert_allclose(value, 2 * opposite.mean(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 7.3])
def test_a_student_that_says_the_same_to_everything(size):
    """As with a head of zeros: 1 each, and a gradient of 0, where r' is 1 / 0."""
    teacher = jnp.stack([TEACHER, TEACHER[::-1], TEACHER * 2])
    student = jnp.full_like(teacher, size)
    value, gradient = weighted(student, teacher, 1.0, 1.0)
    np.testing.assert_allclose(value, 2, rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_a_teacher_that_says_the_same_to_everything_asks_for_nothing():
    student = jnp.stack([STUDENT, STUDENT[::-1], STUDENT * 2])
    value, gradient = weighted(student, student * 0, 1.0, 1.0)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_rare_classes_count_like_others():
    """Probabilities of 1e-30 have squares that float32 does not have."""
    teacher = jnp.stack([TEACHER, TEACHER[::-1], TEACHER * 2]).at[:, 3].add(-70)
    student = jnp.stack([STUDENT, STUDENT[::-1], STUDENT * 2]).at[:, 3].add(-70)
    value, gradient = intra(student, teacher)
    q, p = oracles.softmax(student), oracles.softmax(teacher)
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
    np.testing.assert_allclose(value, 1 - np.mean(r), rtol=1e-4)
    assert np.all(gradient[:, 3] != 0)


@pytest.mark.parametrize("name", ["inter_weight", "intra_weight"])
@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_weights_below_zero_are_refused(name, bad):
    with pytest.raises(ValueError, match=rf"dist: {name} must lie in \[0, inf\]"):
        losses.dist(STUDENT[None], TEACHER[None], **{name: bad})
