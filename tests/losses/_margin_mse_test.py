"""The margin between a positive and its negatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses


def test_one_negative():
    """Margins 2 and 1; the positive is column 0, and is pushed down here."""
    student, teacher = jnp.array([3.0, 1.0]), jnp.array([5.0, 4.0])
    value, gradient = jax.jit(jax.value_and_grad(losses.margin_mse))(student, teacher)
    assert value == 1
    np.testing.assert_allclose(gradient, [2.0, -2.0])


def test_queries_may_have_unequal_numbers_of_negatives():
    """A padded negative, at -inf on both sides, is not one that was well ranked."""
    student = jnp.array([[3.0, 1.0, -jnp.inf], [3.0, 1.0, 2.0]])
    teacher = jnp.array([[5.0, 4.0, -jnp.inf], [5.0, 4.0, 2.0]])
    values = jax.jit(losses.margin_mse)(student, teacher)
    np.testing.assert_allclose(values, [1.0, (1.0 + 4.0) / 2])


def test_a_positive_alone_is_refused():
    with pytest.raises(ValueError, match="margin_mse: student must have at least two"):
        losses.margin_mse(jnp.ones((4, 1)), jnp.ones((4, 1)))
