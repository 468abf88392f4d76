"""The two KL divergences where float32 and zero probabilities bite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import oracles

INF = jnp.inf


def vocabulary(temperature):
    """Teacher with logits of standard deviation 5, student 0.1 away; in float32."""
    rng = np.random.default_rng(0)
    teacher = (5 * rng.normal(size=(4, 1000))).astype(np.float32)
    student = (teacher + 0.1 * rng.normal(size=(4, 1000))).astype(np.float32)
    return student, teacher, temperature


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_high_temperature_keeps_four_digits(name, temperature):
    """Summed as p log(p / q), float32 is 4 % off at T = 20, and bfloat16 negative."""
    student, teacher, temperature = vocabulary(temperature)
    loss, oracle = jax.jit(getattr(losses, name)), getattr(oracles, name)
    value = loss(jnp.asarray(student), jnp.asarray(teacher), temperature=temperature)
    expected = oracle(student, teacher, temperature)
    assert expected.max() < 0.1
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_plain_summation_would_fail_the_test_above():
    """Else that test would protect nothing."""
    student, teacher, temperature = vocabulary(20.0)
    log_q = jax.nn.log_softmax(jnp.asarray(student) / temperature)
    log_p = jax.nn.log_softmax(jnp.asarray(teacher) / temperature)
    plain = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    error = np.abs(plain / oracles.forward_kl(student, teacher, temperature) - 1)
    assert error.max() > 1e-2


def test_bfloat16_kl_of_one_hundredth_is_not_lost():
    """As the difference of two bfloat16 numbers, a KL of 0.0105 was reported as 0."""
    rng = np.random.default_rng(1)
    teacher = jnp.asarray(rng.normal(size=(16, 500)) * 2, jnp.bfloat16)
    noise = jnp.asarray(rng.normal(size=(16, 500)) * 0.15, jnp.bfloat16)
    student = teacher + noise
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (student, teacher)]
    expected = oracles.forward_kl(*exact)
    assert 0.005 < expected.mean() < 0.02
    value = jax.jit(losses.forward_kl)(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert value.dtype == jnp.float32


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "value"),
    [
        (losses.forward_kl, [0.0, -INF], [0.0, 0.0], INF),
        (losses.forward_kl, [0.0, 0.0], [0.0, -INF], np.log(2)),
        (losses.reverse_kl, [0.0, 0.0], [0.0, -INF], INF),
        (losses.reverse_kl, [0.0, -INF], [0.0, 0.0], np.log(2)),
        (losses.forward_kl, [0.0, -INF], [0.0, -INF], 0.0),
        (losses.reverse_kl, [0.0, -INF], [0.0, -INF], 0.0),
        (losses.soft_cross_entropy, [0.0, -INF], [0.0, 0.0], INF),
        (losses.soft_cross_entropy, [0.0, 0.0], [0.0, -INF], np.log(2)),
        (losses.soft_cross_entropy, [0.0, -INF], [0.0, -INF], 0.0),
        (losses.jensen_shannon, [0.0, -INF], [-INF, 0.0], np.log(2)),
        (losses.total_variation, [0.0, -INF], [-INF, 0.0], 1.0),
        (losses.logit_mse, [0.0, -INF], [3.0, 0.0], INF),
        (losses.logit_mse, [0.0, -INF], [3.0, -INF], 9.0),
    ],
)
def test_impossible_classes_give_a_number_and_a_finite_gradient(
    loss, student, teacher, value
):
    both = jax.jit(jax.value_and_grad(loss))
    got, gradient = both(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-7)
    assert np.all(np.isfinite(gradient))


def test_an_infinite_kl_pushes_the_student_off_the_impossible_class():
    """Its gradient is finite, and points the right way."""
    gradient = jax.jit(jax.grad(losses.reverse_kl))(
        jnp.zeros(2), jnp.array([0.0, -INF])
    )
    assert gradient[1] > 0 > gradient[0]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_tiny_probabilities_are_not_taken_for_zero(name):
    """exp(-200) is 0 in float32, but a KL of 200 is finite, and not infinite."""
    far, near = jnp.array([0.0, -200.0]), jnp.array([0.0, 0.0])
    pair = (far, near) if name == "forward_kl" else (near, far)
    expected = 0.5 * np.log(0.5) + 0.5 * (200 + np.log(0.5))
    value = jax.jit(getattr(losses, name))(*pair)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_finite_masks_of_classes_work_like_minus_infinity():
    """Some models mask classes with a large negative number, some with -inf."""
    student, teacher = jnp.array([0.0, 1.0, -1e9]), jnp.array([0.0, 0.5, -INF])
    for loss in (losses.forward_kl, losses.jensen_shannon, losses.soft_cross_entropy):
        loss = jax.jit(loss)
        np.testing.assert_allclose(
            loss(student, teacher), loss(student[:2], teacher[:2]), rtol=1e-6
        )
