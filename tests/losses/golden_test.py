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

TOP_2 = losses.SparseLogits.top_k(TEACHER, 2)
RAW_TOP_2 = losses.SampledLogits(TOP_2.ids, TOP_2.log_probs)


def decoupled(z, temperature, **weights):
    return losses.decoupled_kd(
        z, TEACHER, labels=LABEL, temperature=temperature, **weights
    )


def standardized(z, ddof):
    z, v = (losses.standardize_logits(x, ddof=ddof) for x in (z, TEACHER))
    return losses.forward_kl(z, v, temperature=2)


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
    "the head is the likeliest class here, and the weight of each KL is detached": (
        lambda z: losses.adaptive_kl(z, TEACHER, mu=0.5),
        0.351225,
        [-0.356739, 0.144413, 0.053127, 0.159199],
    ),
    "teacher_power is the exponent of p: exchanged, the value would be another": (
        lambda z: losses.alpha_beta(z, TEACHER, teacher_power=0.2, student_power=0.7),
        0.405810,
        [-0.380187, 0.119797, 0.054065, 0.206326],
    ),
    "the powers (1/2, 1/2) are a Hellinger distance": (
        lambda z: losses.alpha_beta(z, TEACHER, teacher_power=0.5, student_power=0.5),
        0.342792,
        [-0.343164, 0.144662, 0.053218, 0.145283],
    ),
    "the powers (1, 1) are half the squared distance of the probabilities": (
        lambda z: losses.alpha_beta(z, TEACHER, teacher_power=1, student_power=1),
        0.102416,
        [-0.102811, 0.075987, 0.009086, 0.017738],
    ),
    "the limit at power 0 has 1 / b^2, where released code has 1 / b": (
        lambda z: losses.alpha_beta(z, TEACHER, teacher_power=0, student_power=0.7),
        0.573315,
        None,
    ),
    "TCKD: the target against all others, and T^2 is not in it": (
        lambda z: 4 * decoupled(z, 2.0, target_weight=1, non_target_weight=0),
        0.350663,
        None,
    ),
    "NCKD: the others given that it is one of them": (
        lambda z: 4 * decoupled(z, 2.0, target_weight=0, non_target_weight=1),
        0.083781,
        None,
    ),
    "decoupled distillation with the weights and the temperature of its authors": (
        lambda z: 16 * decoupled(z, 4.0),
        1.130914,
        [-0.373598, -0.757531, -0.589966, 1.721094],
    ),
    "standard deviations divide by classes - 1": (
        lambda z: 4 * standardized(z, ddof=1),
        0.303437,
        [-0.688127, 0.344064, 0.045983, 0.298080],
    ),
    "unless asked to divide by classes": (
        lambda z: 4 * standardized(z, ddof=0),
        0.414223,
        None,
    ),
    "sorted before they are compared: 0.39 apart, and not 0.77": (
        lambda z: losses.universal_logit(z, TEACHER),
        0.433963,
        [0.221107, -0.489322, 0.134108, 0.134108],
    ),
    "the mean over six pairs, (1.5 + .5 + .5 + 0 + 0 + 1) / 6, flat at the margin": (
        lambda z: losses.hinge_ranking(z, TEACHER, k=4),
        0.583333,
        [-0.5, 0.166667, 0.0, 0.333333],
    ),
    "top-2 with its raw mass: weights p of the two classes, and nothing else": (
        lambda z: losses.soft_cross_entropy(z, RAW_TOP_2),
        1.071629,
        [-0.415834, 0.139158, 0.138338, 0.138338],
    ),
    "top-2 renormalised in the teacher alone": (
        lambda z: losses.soft_cross_entropy(z, TOP_2.renormalize()),
        1.216658,
        [-0.472111, 0.157991, 0.157060, 0.157060],
    ),
    "top-2 and a tail bucket: the gradient of the KL at both ids": (
        lambda z: losses.forward_kl(z, TOP_2),
        0.331527,
        [-0.384966, 0.190050, 0.097458, 0.097458],
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


def test_decoupled_parts_add_up_to_the_kl():
    """TCKD + (1 - p_y) NCKD = KL: the others count little where p_y is near 1."""
    others = 1 - jax.nn.softmax(TEACHER / 2)[0]
    whole = decoupled(STUDENT, 2.0, target_weight=1.0, non_target_weight=others)
    np.testing.assert_allclose(4 * whole, 0.396319, rtol=1e-5)


def test_soft_cross_entropy_is_the_kl_plus_the_teachers_entropy():
    loss = jax.jit(losses.soft_cross_entropy)
    entropy = loss(TEACHER, TEACHER)
    np.testing.assert_allclose(entropy, 0.947537, rtol=1e-6)  # -sum p log p, by hand
    np.testing.assert_allclose(loss(STUDENT, TEACHER) - entropy, 0.344752, rtol=1e-5)
