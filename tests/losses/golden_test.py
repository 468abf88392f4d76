"""One worked example, to six digits: values and gradients of every response loss.

Computed once in float64 from the formulas, and checked by automatic differentiation of
another implementation. Each row says which mistake it would catch; rows at T > 1 are
the pure quantities, without the factor T^2 that an objective applies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses

TEACHER = jnp.array([2.0, 1.0, 0.0, -1.0])
STUDENT = jnp.array([0.5, 1.0, 0.0, 0.0])
LABEL = jnp.array(0)

GOLDEN = {
    "the label is class 0, counted from 0, and the gradient is q - onehot": (
        lambda z: losses.cross_entropy(z, LABEL),
        1.351129,
        [-0.741052, 0.426933, 0.157060, 0.157060],
    ),
    "smoothing spreads over all classes, the label's own included": (
        lambda z: losses.cross_entropy(z, LABEL, label_smoothing=0.1),
        1.363629,
        [-0.666052, 0.401933, 0.132060, 0.132060],
    ),
    "forward means teacher first: KL(p || q), gradient q - p": (
        lambda z: losses.forward_kl(z, TEACHER),
        0.344752,
        [-0.384966, 0.190050, 0.069915, 0.125001],
    ),
    "the temperature divides both sides, and no T^2 is hidden": (
        lambda z: 4 * losses.forward_kl(z, TEACHER, temperature=2),
        0.396319,
        [-0.389496, 0.116471, 0.070643, 0.202381],
    ),
    "at T = 100 the value is 4e-5 and must not drown in rounding": (
        lambda z: 10_000 * losses.forward_kl(z, TEACHER, temperature=100),
        0.399106,
        [-0.345186, 0.032780, 0.032454, 0.279952],
    ),
    "half the centred logit error is the limit of T^2 KL for large T": (
        lambda z: 0.5 * losses.logit_mse(z, TEACHER, centered=True),
        0.398438,
        [-0.34375, 0.03125, 0.03125, 0.28125],
    ),
    "the logit error is a mean over classes, neither halved nor centred": (
        lambda z: losses.logit_mse(z, TEACHER),
        0.8125,
        [-0.75, 0.0, 0.0, 0.5],
    ),
    "reverse means student first: KL(q || p)": (
        lambda z: losses.reverse_kl(z, TEACHER),
        0.357699,
        [-0.328511, 0.098776, 0.036338, 0.193397],
    ),
    "the classical Jensen-Shannon divergence is the middle, undivided": (
        lambda z: losses.jensen_shannon(z, TEACHER),
        0.083757,
        [-0.082682, 0.036069, 0.013269, 0.033344],
    ),
    "beta weighs the teacher: swapped, 0.1 and 0.9 would change places": (
        lambda z: losses.jensen_shannon(z, TEACHER, beta=0.1),
        0.030647,
        None,
    ),
    "and the other end": (
        lambda z: losses.jensen_shannon(z, TEACHER, beta=0.9),
        0.031409,
        None,
    ),
    "the skewed reference keeps a tenth of the teacher; not a cross-entropy": (
        lambda z: losses.skew_forward_kl(z, TEACHER),
        0.272919,
        [-0.286723, 0.135956, 0.050015, 0.100752],
    ),
    "the skewed reverse reference is mostly teacher, and q in it is not detached": (
        lambda z: losses.skew_reverse_kl(z, TEACHER),
        0.276883,
        [-0.260262, 0.099062, 0.036443, 0.124757],
    ),
    "total variation is half the L1 distance, so at most 1": (
        lambda z: losses.total_variation(z, TEACHER),
        0.384966,
        [-0.191894, 0.110553, 0.040670, 0.040670],
    ),
}


@pytest.fixture(scope="module")
def results():
    """All rows in one compilation."""

    def all_rows(student):
        return [jax.value_and_grad(loss)(student) for loss, *_ in GOLDEN.values()]

    return dict(zip(GOLDEN, jax.jit(all_rows)(STUDENT), strict=True))


@pytest.mark.parametrize("row", GOLDEN)
def test_worked_example(row, results):
    _, value, gradient = GOLDEN[row]
    got, slope = results[row]
    np.testing.assert_allclose(got, value, rtol=1e-5, atol=6e-7)
    if gradient is not None:
        np.testing.assert_allclose(slope, gradient, rtol=2e-5, atol=1e-6)


def test_soft_cross_entropy_is_the_kl_plus_the_teachers_entropy():
    loss = jax.jit(losses.soft_cross_entropy)
    entropy = loss(TEACHER, TEACHER)
    np.testing.assert_allclose(entropy, 0.947537, rtol=1e-6)  # -sum p log p, by hand
    np.testing.assert_allclose(loss(STUDENT, TEACHER) - entropy, 0.344752, rtol=1e-5)
