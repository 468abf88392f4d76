"""Decoupled distillation where the target has all the probability, and bad labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import oracles


@jax.jit
def measure(student, teacher, labels):
    def loss(student):
        return losses.decoupled_kd(student, teacher, labels=labels)

    values, vjp = jax.vjp(loss, student)
    return values, vjp(jnp.ones_like(values))[0]


def test_a_saturated_target_keeps_its_digits():
    """At 40 nats 1 - p_y is 0 in float32, and its log, with released code, -inf."""
    student = np.array([[40.0, 0.0, 1.0, 2.0]])
    teacher = np.array([[35.0, 2.0, 1.0, 0.0]])
    labels = np.array([0])
    values, slope = measure(
        *(jnp.asarray(x, jnp.float32) for x in (student, teacher)), labels
    )
    hat = [oracles.softmax(x[:, 1:]) for x in (student, teacher)]
    np.testing.assert_allclose(values, 8 * oracles.kl(hat[1], hat[0]), rtol=1e-5)
    np.testing.assert_allclose(
        slope[:, 1:], 8 * (hat[0] - hat[1]), rtol=1e-5, atol=1e-6
    )
    wrong_target, _ = measure(student, teacher, np.array([1]))
    assert np.all(np.isfinite(wrong_target))


def test_without_other_classes_only_the_target_counts():
    """Two classes have one other; with one alive there is none."""
    two, _ = measure(jnp.array([1.0, 0.0]), jnp.array([0.0, 0.0]), 0)
    expected = oracles.forward_kl([1.0, 0.0], [0.0, 0.0])
    np.testing.assert_allclose(two, expected, rtol=1e-6)
    alone = jnp.array([0.5, -jnp.inf])
    value, slope = measure(alone, alone, 0)
    np.testing.assert_allclose(value, 0.0)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("label", [-1, 3, -100])
def test_a_label_out_of_range_is_nan_and_a_masked_one_is_nothing(label):
    student = jnp.array([[0.0, 1.0, 2.0]] * 2)
    labels = jnp.array([1, label])
    values, slope = measure(student, student + 0.5 * student**2, labels)
    assert np.isfinite(values[0])
    assert np.isnan(values[1])
    assert np.all(np.isnan(slope[1]))
    where = jnp.array([True, False])
    masked = losses.decoupled_kd(student, student, labels=labels, where=where)
    np.testing.assert_allclose(masked, 0, atol=1e-6)


def test_bad_arguments_are_named():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match="decoupled_kd: labels must have the shape"):
        losses.decoupled_kd(logits, logits, labels=labels[:1])
    with pytest.raises(ValueError, match="non_target_weight must lie in"):
        losses.decoupled_kd(logits, logits, labels=labels, non_target_weight=-1.0)
