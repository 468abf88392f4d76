"""Inequalities between the divergences, for logits that nobody would think of."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distilljax import losses

# Steep enough that most probabilities underflow, with ties and impossible classes.
LOGIT = st.one_of(
    st.floats(-60, 60, width=32), st.sampled_from([0.0, 1.0, -np.inf, -1e9])
)


def with_a_possible_class(logits):
    logits[:, 0] = np.clip(logits[:, 0], -60, 60)
    return logits


LOGITS = arrays(np.float32, (3, 5), elements=LOGIT).map(with_a_possible_class)
SHARE = st.floats(np.float32(0.01), np.float32(0.99), width=32)


@jax.jit
def measure(student, teacher, share):
    """All divergences both ways round, compiled once."""
    return {
        "kl": losses.forward_kl(student, teacher),
        "reverse": losses.reverse_kl(teacher, student),
        "other": losses.reverse_kl(student, teacher),
        "tv": losses.total_variation(student, teacher),
        "tv_swapped": losses.total_variation(teacher, student),
        "jsd": losses.jensen_shannon(student, teacher, beta=share),
        "jsd_swapped": losses.jensen_shannon(teacher, student, beta=1 - share),
        "skew": losses.skew_forward_kl(student, teacher, skew=share),
        "skew_reverse": losses.skew_reverse_kl(student, teacher, skew=share),
        "cross": losses.soft_cross_entropy(student, teacher),
        "entropy": losses.soft_cross_entropy(teacher, teacher),
        "bucket": losses.forward_kl(student, losses.SparseLogits.top_k(teacher, 2)),
        "adaptive": losses.adaptive_kl(student, teacher, mu=share),
        "alpha_beta": losses.alpha_beta(
            student, teacher, teacher_power=share, student_power=1 - share
        ),
        "universal": losses.universal_logit(student, teacher),
    }


@settings(max_examples=200)
@given(LOGITS, LOGITS, SHARE)
def test_divergences_keep_their_inequalities(student, teacher, share):
    got = {name: np.asarray(x) for name, x in measure(student, teacher, share).items()}
    assert not any(np.isnan(values).any() for values in got.values())
    for values in got.values():
        assert np.all(values >= -1e-6)
    other = got.pop("other")
    # One is the other with the arguments exchanged.
    np.testing.assert_allclose(got["kl"], got["reverse"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["tv"], got["tv_swapped"], atol=1e-6)
    np.testing.assert_allclose(got["jsd"], got["jsd_swapped"], rtol=1e-4, atol=1e-6)
    # Bounds: probability, entropy of a coin, the share of the mixture; Pinsker.
    coin = -share * np.log(share) - (1 - share) * np.log1p(-share)
    assert np.all(got["tv"] <= 1 + 1e-6)
    assert np.all(got["jsd"] <= coin + 1e-5)
    assert np.all(got["skew"] <= -np.log(share) + 1e-5)
    assert np.all(got["skew_reverse"] <= -np.log(share) + 1e-5)
    assert np.all(got["tv"] <= np.sqrt(got["kl"] / 2) + 1e-4)
    # Mixing teacher into the reference never increases the divergence.
    assert np.all(got["skew"] <= got["kl"] * (1 + 1e-5) + 1e-6)
    # What falls into one bucket cannot be told apart; a sorted class is no farther.
    assert np.all(got["bucket"] <= got["kl"] * (1 + 1e-5) + 1e-5)
    assert np.all(got["universal"] <= 2 * got["tv"] + 1e-6)
    # A mean of the two directions lies between them.
    low, high = np.minimum(got["kl"], other), np.maximum(got["kl"], other)
    assert np.all(got["adaptive"] >= low * (1 - 1e-5) - 1e-6)
    assert np.all(got["adaptive"] <= high * (1 + 1e-5) + 1e-6)
    # Powers that sum to 1 tend to the KLs, of which they are a bounded form.
    bound = (1 + 1e-4) / min(share * (1 - share), 1)
    assert np.all(got["alpha_beta"] <= bound + 1e-5)
    finite = np.isfinite(got["kl"])
    np.testing.assert_allclose(
        got["cross"][finite],
        (got["kl"] + got["entropy"])[finite],
        rtol=1e-4,
        atol=1e-5,
    )


@jax.jit
def gradients(student, teacher, share):
    # The floor under log 0 has slopes of 1e4 where a reverse KL is infinite, and they
    # cancel in the sum to 1e-3 only.
    infinite = {"other", "adaptive"}

    def total(student):
        found = measure(student, teacher, share)
        return sum(found[name].sum() for name in sorted(found.keys() - infinite))

    return jax.grad(total)(student)


@settings(max_examples=100)
@given(LOGITS, LOGITS, SHARE)
def test_gradients_are_finite_and_sum_to_zero(student, teacher, share):
    """Softmax ignores a shift, so no gradient may push all logits one way."""
    gradient = np.asarray(gradients(student, teacher, share))
    assert np.all(np.isfinite(gradient))
    size = np.abs(gradient).sum(axis=-1)
    np.testing.assert_array_less(np.abs(gradient.sum(axis=-1)), 1e-5 * size + 1e-5)
