"""Hidden states: what the two losses see of a vector, and vectors that are zero."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses

TEACHER = jnp.array([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])


@jax.jit
def cosine(student):
    def total(student):
        values = losses.hidden_cosine(student, TEACHER)
        return values.sum(), values

    return jax.value_and_grad(total, has_aux=True)(student)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_length_does_not_matter(size):
    """Squares of 1e30 are inf in float32, and those of 1e-30 are 0."""
    (_, values), gradient = cosine(jnp.array([[2.0, 1.0, 2.0]] * 3) * size)
    np.testing.assert_allclose(values, [1 - 4 / 9, 1, 1 - 14 / 15], rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    # No gradient along the vector: it turns and does not stretch.
    along = np.abs(np.asarray(gradient) * size @ [2.0, 1.0, 2.0])
    assert along.max() < 1e-6


def test_a_vector_of_zeros_has_no_direction_and_no_gradient():
    """A norm gives nan there, and so does one that is clamped outside the root."""
    (_, values), gradient = cosine(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(values, np.ones(3))
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))


def test_it_keeps_its_digits_near_the_teacher():
    """1 - cos in float32 is 0 or 6e-8 here; the truth is |difference|^2 / 2 |t|^2."""
    student = TEACHER.at[0, 0].add(1e-4)
    across = 1e-8 * (1 - 1 / 9)  # the part of the step that turns the vector
    (_, values), _ = cosine(student)
    np.testing.assert_allclose(values[0], across / 18, rtol=2e-3)


def test_padding_moves_nothing():
    """Value and gradient, of both losses and their mean."""
    where = jnp.array([[True, True, False]])

    @jax.jit
    @jax.value_and_grad
    def loss(student):
        both = losses.hidden_mse(student, TEACHER[None], where=where)
        both += losses.hidden_cosine(student, TEACHER[None], where=where)
        return losses.masked_mean(both, where)

    student = jnp.ones((1, 3, 3))
    clean = loss(student)
    dirty = loss(student.at[0, 2].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("loss", [losses.hidden_mse, losses.hidden_cosine])
def test_the_mask_is_over_positions_where_width_and_batch_are_equal(loss):
    """A mask that broadcast from the right would take out the second channel."""
    student = jnp.eye(3)
    whole = loss(student, TEACHER)
    values = loss(student, TEACHER, where=jnp.array([True, False, True]))
    np.testing.assert_array_equal(values, whole.at[1].set(0))
    assert whole[1] > 0


def test_other_widths_need_a_projection():
    with pytest.raises(ValueError, match=r"3 and 2\. Map the student's") as error:
        losses.hidden_mse(TEACHER, TEACHER[:, :2])
    assert str(error.value).startswith("hidden_mse: teacher must have the shape of")
    unchecked = inspect.unwrap(losses.hidden_mse)
    with pytest.raises(ValueError, match=r"axes \[\.\.\., width\], .* the shape \(\)"):
        unchecked(jnp.float32(1), jnp.float32(1))
