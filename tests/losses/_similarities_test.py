"""Similarities of points: numbers of the authors' code, and where they end."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import relation_oracles as oracles
from tests.losses.contract import UNOPTIMIZED

# The third point is half-way between the others, or nearer to the second.
STUDENT = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
TEACHER = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.fixture(scope="module")
def golden():
    """All values of the three points, in one compilation."""

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def values(s, t):
        return {
            "sp": losses.similarity_preserving(s, t),
            "pkt": losses.probabilistic_transfer(s, t),
            "others": losses.probabilistic_transfer(s, t, include_self=False),
            "cc": losses.correlation_congruence(s, t),
            "gaussian": losses.correlation_congruence(s, t, order=8),
        }

    return values(STUDENT, TEACHER)


def test_similarity_preserving_of_three_points(golden):
    """The rows of the inner products are normalised, and not the points."""
    np.testing.assert_allclose(golden["sp"], 0.106263, rtol=1e-5)


def test_probabilistic_transfer_of_three_points(golden):
    """A mean over anchors, where the authors' code has the mean over all nine pairs."""
    np.testing.assert_allclose(3 * golden["pkt"], 0.0554178, rtol=1e-5)
    np.testing.assert_allclose(golden["pkt"] / 3, 0.0061575, rtol=1e-4)


def test_probabilistic_transfer_without_the_anchor_itself(golden):
    """As the equation of the paper has it; kernels 1/2 and .853553, by hand."""
    a = (1 + np.sqrt(0.5)) / 2
    near = a / (a + 0.5)
    # Rows: (1/2, 1/2) against (1 - near, near), equal ones, the first the other way.
    first = -0.5 * np.log(4 * near * (1 - near))
    last = np.log(2) + near * np.log(near) + (1 - near) * np.log(1 - near)
    np.testing.assert_allclose(golden["others"], (first + 0 + last) / 3, rtol=1e-5)
    exact = oracles.pkt(STUDENT, TEACHER, include_self=False)
    np.testing.assert_allclose(golden["others"], exact, rtol=1e-5)


def test_opposite_points_have_a_finite_divergence():
    """The kernel is 0 there, and its log is not taken."""
    line = jnp.array([[1.0], [-1.0], [2.0]])
    together = jnp.array([[1.0], [1.0], [1.0]])
    loss = jax.value_and_grad(losses.probabilistic_transfer)
    value, gradient = jax.jit(loss, compiler_options=UNOPTIMIZED)(line, together)
    # Two anchors with one neighbour opposite, one with two: -log of 1e-7 and of shares.
    rows = [np.array([1, 1e-7, 1]), np.array([1e-7, 1, 1e-7]), np.array([1, 1e-7, 1])]
    expected = np.mean([-np.log(3 * row / row.sum()).mean() for row in rows])
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert np.all(np.isfinite(gradient))


def test_congruence_with_the_papers_kernel(golden):
    """gamma 0.4 and order 2 by default: e^-.8 (1 + .8 c + .32 c^2)."""
    near = 0.8 * np.sqrt(0.5) + 0.32 * 0.5  # and 0 for points at right angles
    expected = 2 * (np.exp(-0.8) * near) ** 2 / 9
    np.testing.assert_allclose(golden["cc"], expected, rtol=1e-5)


def test_congruence_tends_to_the_gaussian(golden):
    """With more terms, the kernel is exp(-gamma |x - y|^2) of points of length 1."""

    def gaussian(x):
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return np.exp(-0.4 * ((x[:, None] - x[None]) ** 2).sum(axis=-1))

    gaps = gaussian(np.asarray(STUDENT)) - gaussian(np.asarray(TEACHER))
    np.testing.assert_allclose(golden["gaussian"], (gaps**2).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"gamma": 0.0}, "gamma must be positive and finite, got 0.0"),
        ({"gamma": np.nan}, "gamma must be positive and finite, got nan"),
        ({"order": 0}, "order must be at least 1, got 0"),
    ],
)
def test_kernels_that_are_none_are_refused(options, rule):
    with pytest.raises(ValueError, match=f"correlation_congruence: {rule}"):
        losses.correlation_congruence(STUDENT, TEACHER, **options)


def test_embedding_relation_refuses_a_bad_temperature():
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.embedding_relation(STUDENT, TEACHER, temperature=0.0)


def test_images_are_points_of_all_their_pixels():
    """Examples, not pixels, make pairs; the two models may see other sizes."""
    rng = np.random.default_rng(0)
    student = jnp.asarray(rng.normal(size=(4, 2, 3, 5)), jnp.float32)
    teacher = jnp.asarray(rng.normal(size=(4, 6, 6, 2)), jnp.float32)
    where = jnp.array([True, True, False, True])
    loss = jax.jit(losses.similarity_preserving, compiler_options=UNOPTIMIZED)
    value = loss(student, teacher, where=where)
    flat = (np.asarray(x)[where].reshape(3, -1) for x in (student, teacher))
    np.testing.assert_allclose(value, oracles.similarity_preserving(*flat), rtol=1e-5)
