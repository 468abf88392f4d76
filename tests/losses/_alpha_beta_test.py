"""The alpha-beta divergence at its limits, where formulas divide by zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import oracles

RNG = np.random.default_rng(0)
TEACHER = RNG.normal(size=(5, 8)) * 2
STUDENT = TEACHER + RNG.normal(size=(5, 8))


@jax.jit
def measure(student, teacher, a, b):
    """Values and gradient at traced powers: one compilation for all of them."""

    def total(student):
        values = losses.alpha_beta(student, teacher, teacher_power=a, student_power=b)
        return values.sum(), values

    (_, values), slope = jax.value_and_grad(total, has_aux=True)(student)
    return values, slope


def in_float32(a, b):
    arrays = (jnp.asarray(x, jnp.float32) for x in (STUDENT, TEACHER))
    return measure(*arrays, jnp.float32(a), jnp.float32(b))


def squared_distance(student, teacher):
    return 0.5 * ((oracles.softmax(student) - oracles.softmax(teacher)) ** 2).sum(-1)


def half_squared_log_ratio(student, teacher):
    q, p = oracles.softmax(student), oracles.softmax(teacher)
    return 0.5 * (np.log(p / q) ** 2).sum(axis=-1)


@pytest.mark.parametrize(
    ("powers", "expected"),
    [
        ((1, 0), oracles.forward_kl),
        ((0, 1), oracles.reverse_kl),
        ((1, 1), squared_distance),
        ((0, 0), half_squared_log_ratio),
    ],
)
def test_special_powers_are_known_divergences(powers, expected):
    values, _ = in_float32(*powers)
    np.testing.assert_allclose(values, expected(STUDENT, TEACHER), rtol=1e-5)


@pytest.mark.parametrize("limit", [(0.0, 0.7), (0.6, 0.0), (0.5, -0.5), (1.0, 0.0)])
def test_limits_are_those_of_the_formula_nearby(limit):
    """Released code is wrong here by 1 / a or 1 / b. Beside it, float64 has digits."""
    a, b = limit
    values, slope = in_float32(a, b)
    near = {"teacher_power": a + 1e-5, "student_power": b + 2e-5}
    expected = oracles.ab(STUDENT, TEACHER, **near)
    np.testing.assert_allclose(values, expected, rtol=5e-4)
    expected = oracles.ab_gradient(STUDENT, TEACHER, **near)
    np.testing.assert_allclose(slope, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("a", [1e-3, 1e-6, 1e-9, -1e-6])
def test_stays_accurate_near_a_limit(a):
    """p^a q^b less two others, over a b, loses all digits in float32 at 1e-7."""
    at_limit, slope_at_limit = in_float32(0.0, 0.7)
    values, slope = in_float32(a, 0.7)
    np.testing.assert_allclose(values, at_limit, rtol=abs(a) * 10 + 2e-6)
    np.testing.assert_allclose(
        slope, slope_at_limit, rtol=abs(a) * 20 + 1e-5, atol=1e-6
    )


def test_negative_powers_are_a_divergence_too():
    """With powers (2, -1) the teacher is asked for p^2 / q; still at least 0."""
    values, slope = in_float32(2.0, -1.0)
    powers = {"teacher_power": 2.0, "student_power": -1.0}
    np.testing.assert_allclose(
        values, oracles.ab(STUDENT, TEACHER, **powers), rtol=1e-5
    )
    expected = oracles.ab_gradient(STUDENT, TEACHER, **powers)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "student", "teacher", "expected"),
    [
        # a class that one side rules out costs q^(a+b) / (a (a+b)), or p^.. / (b ..)
        (0.5, 0.5, [0.0, -np.inf], [-np.inf, 0.0], 4.0),
        (0.2, 0.7, [0.0, -np.inf], [-np.inf, 0.0], 1 / (0.2 * 0.9) + 1 / (0.7 * 0.9)),
        (1.0, 0.0, [0.0, -np.inf], [0.0, 0.0], np.inf),
        (1.0, 0.0, [0.0, 0.0], [0.0, -np.inf], np.log(2)),
        (0.0, 1.0, [0.0, 0.0], [0.0, -np.inf], np.inf),
        (1.0, -1.0, [0.0, 0.0], [0.0, -np.inf], np.inf),
        (-0.5, 1.0, [0.0, -np.inf], [0.0, -np.inf], 0.0),
    ],
)
def test_impossible_classes(a, b, student, teacher, expected):
    value, slope = measure(jnp.array(student), jnp.array(teacher), a, b)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
    assert np.all(np.isfinite(slope))


def test_steep_logits_overflow_nowhere():
    """exp(a log(p / q)) alone would be exp(200)."""
    student, teacher = jnp.array([0.0, -250.0]), jnp.array([-250.0, 0.0])
    value, slope = measure(student, teacher, 0.9, 0.1)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))


def test_second_derivatives_are_those_of_the_gradient():
    """The gradient is given by hand, so differentiating it again is checked as well."""

    def slope(student):
        loss = lambda z: losses.alpha_beta(z, jnp.asarray(TEACHER[0])).sum()  # noqa: E731
        return jax.grad(loss)(student)

    with jax.enable_x64(True):
        z = jnp.asarray(STUDENT[0])
        hessian = jax.jit(jax.jacfwd(slope))(z)
        rows = [
            oracles.central_differences(
                lambda x, i=i: oracles.ab_gradient(x, TEACHER[0])[i], STUDENT[0].copy()
            )
            for i in range(8)
        ]
    np.testing.assert_allclose(hessian, np.stack(rows), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["teacher_power", "student_power"])
def test_powers_must_be_finite_numbers(name):
    with pytest.raises(ValueError, match=f"alpha_beta: {name} must be finite, got nan"):
        losses.alpha_beta(jnp.zeros(2), jnp.zeros(2), **{name: np.nan})
