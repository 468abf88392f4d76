"""`bias_calibration` finds the bias that was taken away, without a label."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from distilljax.evaluation import bias_calibration, measure, softmax_mass, summarize


def _logits(n: int = 300, classes: int = 6, scale: float = 3.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.normal(size=(n, classes)), jnp.float32)


def test_mass_is_the_mean_softmax():
    logits = _logits(50)
    weights = np.exp(np.asarray(logits, np.float64))
    probs = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(softmax_mass(logits), probs.mean(0), rtol=1e-6)
    where = jnp.arange(50) < 20
    np.testing.assert_allclose(
        softmax_mass(logits, where),
        probs[:20].mean(0),
        rtol=1e-6,
    )


@pytest.mark.parametrize("taken", [0.5, 3.0, 12.0, 40.0, -6.0])
def test_one_class_gets_back_exactly_what_was_taken(taken):
    teacher = _logits()
    student = teacher.at[:, 3].add(-taken)
    bias = bias_calibration(student, softmax_mass(teacher), classes=[3])
    expected = np.zeros(6)
    expected[3] = taken
    np.testing.assert_allclose(bias, expected, atol=1e-4)


def test_several_classes():
    teacher = _logits()
    removed = jnp.array([0.0, 4.0, 0.0, 9.0, 0.0, -2.0])
    bias = bias_calibration(teacher - removed, softmax_mass(teacher), classes=[5, 1, 3])
    np.testing.assert_allclose(bias, removed, atol=1e-4)


def test_all_classes_up_to_a_constant():
    teacher = _logits()
    removed = jnp.array([0.0, 4.0, 1.0, 9.0, -3.0, -2.0])
    bias = bias_calibration(teacher - removed, softmax_mass(teacher))
    np.testing.assert_allclose(bias, removed - removed.mean(), atol=1e-4)


def test_the_mass_matches_for_a_student_that_is_no_shifted_teacher():
    mass = softmax_mass(_logits(seed=1))
    student = _logits(seed=2, scale=6.0)
    bias = bias_calibration(student, mass)
    np.testing.assert_allclose(softmax_mass(student + bias), mass, rtol=1e-4)


def test_masked_inputs_do_not_matter():
    teacher = _logits()
    student = teacher.at[:, 2].add(-5.0)
    where = jnp.arange(300) < 200
    mass = softmax_mass(teacher, where)
    broken = student.at[200:].set(jnp.nan)
    bias = bias_calibration(broken, mass, classes=[2], where=where)
    np.testing.assert_allclose(bias[2], 5.0, atol=1e-4)


def test_a_forgotten_class_is_recognised_again():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 600)
    teacher = _logits(600, scale=0.7).at[jnp.arange(600), labels].add(5)
    student = teacher + 0.5 * _logits(600, seed=3, scale=1.0)
    student = student.at[:, 3].add(-9.0)
    bias = bias_calibration(student, softmax_mass(teacher), classes=[3])
    before = summarize(measure(student, None, jnp.asarray(labels)))["per_class"]
    after = summarize(measure(student + bias, None, jnp.asarray(labels)))["per_class"]
    assert before["correct"][3] < 0.1 * before["count"][3]
    assert after["correct"][3] > 0.9 * after["count"][3]
    assert sum(after["correct"]) > sum(before["correct"])


@pytest.mark.parametrize(
    ("mass", "classes", "message"),
    [
        ([0.5, 0.5, 0.0], [2], "be positive on the calibrated classes"),
        ([0.5, 0.5, 0.5], [0, 1], "leave mass for the other classes"),
        ([0.5, 0.5, 0.5], None, "sum to 1"),
        ([0.5, 0.5], [0], r"have the shape \(3,\)"),
        ([0.2, 0.3, 0.5], [3], "distinct classes"),
        ([0.2, 0.3, 0.5], [1, 1], "distinct classes"),
        ([0.2, 0.3, 0.5], [-1], "distinct classes"),
        ([0.2, 0.3, 0.5], [], "distinct classes"),
        ([0.2, np.nan, 0.5], [1], "be positive"),
    ],
)
def test_bad_targets_and_classes(mass, classes, message):
    with pytest.raises(ValueError, match=message):
        bias_calibration.__wrapped__(
            _logits(classes=3), np.array(mass), classes=classes
        )


def test_bad_logits():
    dead = _logits(classes=3).at[:, 1].set(-jnp.inf)
    mass = np.array([0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match=r"none for classes \[1\]"):
        bias_calibration(dead, mass, classes=[1])
    broken = _logits(classes=3).at[4].set(jnp.nan)
    with pytest.raises(ValueError, match="1 bad rows of 300"):
        bias_calibration(broken, mass, classes=[1])
    with pytest.raises(ValueError, match="at least one row"):
        softmax_mass(_logits(classes=3), jnp.zeros(300, bool))
