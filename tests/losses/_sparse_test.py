"""Sparse targets: how they are made, and what each of them teaches, in numbers.

The bias of a target is known exactly: where the student's logits give q, the gradient
is q minus what is taught, so what is taught is q minus the gradient.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from distilljax import losses
from distilljax.losses import SampledLogits, SparseLogits
from tests.losses.contract import UNOPTIMIZED

# A long tail, as a vocabulary has: p falls with the rank to the power 1.2.
ZIPF = np.arange(1, 513) ** -1.2
ZIPF /= ZIPF.sum()
VOCABULARY = jnp.log(jnp.asarray(ZIPF, jnp.float32))


@functools.partial(jax.jit, static_argnames="loss", compiler_options=UNOPTIMIZED)
def taught(target, loss=losses.forward_kl):
    """The mean over positions of what the loss would have the student believe."""
    lead = target.ids.shape[:-1]
    student = jnp.zeros((*lead, ZIPF.size))
    slope = jax.grad(lambda z: loss(z, target).sum())(student)
    return jnp.mean(1 / ZIPF.size - slope, axis=tuple(range(len(lead))))


def test_top_k_keeps_the_best_and_the_tail_at_every_temperature():
    logits = jax.random.normal(jax.random.key(0), (3, 20)) * 3
    temperatures = (1.0, 2.0, 5.0)
    sparse = jax.jit(lambda x: SparseLogits.top_k(x, 6, temperatures))(logits)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    best = np.argsort(-p, axis=-1)[:, :6]
    np.testing.assert_array_equal(sparse.ids, best)
    np.testing.assert_allclose(
        np.exp(sparse.log_probs), np.take_along_axis(p, best, -1), rtol=1e-5
    )
    np.put_along_axis(p, best, 0.0, axis=-1)
    for column, temperature in enumerate(temperatures):
        tail = (p ** (1 / temperature)).sum(axis=-1)
        np.testing.assert_allclose(np.exp(sparse.log_tail[:, column]), tail, rtol=1e-5)
    assert sparse.ids.dtype == jnp.int32
    assert sparse.temperatures == temperatures


def test_a_tail_is_many_classes_at_high_temperature():
    """Tempered as one token, the tail of the top 50 is an eighth of what it is."""
    sparse = SparseLogits.top_k(VOCABULARY, 50, (1.0, 2.0))
    at_ids, tail = np.exp(sparse.log_probs / 2).sum(), np.exp(sparse.log_tail)
    share = tail[1] / (at_ids + tail[1])
    as_one_token = np.sqrt(tail[0]) / (at_ids + np.sqrt(tail[0]))
    truth = np.sqrt(ZIPF)[50:].sum() / np.sqrt(ZIPF).sum()
    np.testing.assert_allclose(share, truth, rtol=1e-5)
    np.testing.assert_allclose([truth, as_one_token], [0.646, 0.084], atol=1e-3)


def test_impossible_classes_are_unused_slots():
    logits = jnp.array([0.0, -jnp.inf, 1.0, -jnp.inf])
    sparse = SparseLogits.top_k(logits, 3)
    np.testing.assert_array_equal(np.isneginf(sparse.log_probs), [False, False, True])
    assert np.isneginf(sparse.log_tail[0])
    np.testing.assert_allclose(losses.forward_kl(logits, sparse), 0, atol=1e-6)


def test_forms_travel_through_transformations():
    sparse = SparseLogits.top_k(jnp.zeros((2, 3, 5)), 2, [1, 4])
    assert sparse.temperatures == (1.0, 4.0)
    shapes = jax.tree.map(jnp.shape, sparse)
    assert shapes == SparseLogits((2, 3, 2), (2, 3, 2), (2, 3, 2), (1.0, 4.0))
    mapped = jax.jit(jax.vmap(losses.forward_kl))(jnp.ones((2, 3, 5)), sparse)
    whole = jax.jit(losses.forward_kl)(jnp.ones((2, 3, 5)), sparse)
    np.testing.assert_allclose(mapped, whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SparseLogits.top_k(VOCABULARY, 513),
            r"k must lie in \[1, 512\].*got 513",
        ),
        (lambda: SparseLogits.top_k(VOCABULARY, 0), "k must be at least 1"),
        (
            lambda: SparseLogits.top_k(VOCABULARY, 5, (0.0,)),
            "temperatures must be a tuple of positive",
        ),
        (lambda: SparseLogits(1, 2, 3, ()), "temperatures must be a tuple of positive"),
        (
            lambda: SampledLogits.draw(jax.random.key(0), VOCABULARY, 0),
            "num_samples must",
        ),
        (
            lambda: SampledLogits.draw(jax.random.key(0), VOCABULARY, 5, -1.0),
            "temperature must be positive",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- What is taught ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "l1_bias", "head_ratio"),
    [(5, 1.020, 2.04), (12, 0.761, 1.61), (50, 0.407, 1.25)],
)
def test_renormalised_top_k_inflates_the_head_and_starves_the_tail(
    k, l1_bias, head_ratio
):
    t = taught(SparseLogits.top_k(VOCABULARY[None], k).renormalize())
    np.testing.assert_allclose(np.abs(t - ZIPF).sum(), l1_bias, atol=2e-3)
    np.testing.assert_allclose(t[0] / ZIPF[0], head_ratio, atol=6e-3)
    np.testing.assert_allclose(t[k:], 0, atol=1e-6)


@pytest.mark.parametrize(("k", "kl"), [(5, 0.569), (12, 0.293), (50, 0.064)])
def test_the_tail_bucket_is_exact_at_the_ids_and_leaves_the_tail_its_shape(k, kl):
    """From equal logits the student ends with an even tail: that far from the truth."""
    sparse = SparseLogits.top_k(VOCABULARY, k)
    q = np.where(np.arange(512) < k, ZIPF, ZIPF[k:].mean())
    student = jnp.log(jnp.asarray(q, jnp.float32))
    value, slope = jax.jit(jax.value_and_grad(losses.forward_kl))(student, sparse)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    to_truth = np.sum(ZIPF * np.log(ZIPF / q))
    np.testing.assert_allclose(to_truth, kl, atol=1e-3)


def test_a_student_outside_the_top_k_pays_for_it():
    """Renormalised on both sides the tail is free: 99 % outside, and the loss is 0."""
    sparse = SparseLogits.top_k(VOCABULARY, 12)
    q = np.where(np.arange(512) < 12, 0.01 * ZIPF / ZIPF[:12].sum(), 0.99 / 500)
    student = jnp.log(jnp.asarray(q, jnp.float32))
    both_sides = losses.forward_kl(student[:12], VOCABULARY[:12])
    np.testing.assert_allclose(both_sides, 0, atol=1e-6)
    assert jax.jit(losses.forward_kl)(student, sparse) > 1.5


def test_sampled_support_with_the_teachers_weights_is_biased():
    """Sampled ids, weighed by p and renormalised, as reported for one large model."""
    sample = SampledLogits.draw(
        jax.random.key(1), jnp.broadcast_to(VOCABULARY, (1000, 512)), 50
    )
    log_p = jnp.where(jnp.isneginf(sample.merge().log_weights), -jnp.inf, 0.0)
    log_p += VOCABULARY[sample.ids]
    weighed = SampledLogits(sample.ids, jax.nn.log_softmax(log_p))
    biased = taught(weighed, losses.soft_cross_entropy)
    np.testing.assert_allclose(np.abs(biased - ZIPF).sum(), 0.608, atol=0.02)
    np.testing.assert_allclose(biased[0] / ZIPF[0], 1.65, atol=0.02)
    unbiased = taught(sample, losses.soft_cross_entropy)
    assert np.abs(unbiased - ZIPF).sum() < 0.09  # noise of 50,000 draws
    np.testing.assert_allclose(unbiased[0] / ZIPF[0], 1.0, atol=0.02)


# --- Samples -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [losses.forward_kl, losses.soft_cross_entropy])
def test_the_expected_gradient_of_a_sample_is_the_dense_one(loss):
    """Exactly, over all nine outcomes of two draws from three classes."""
    with jax.enable_x64(True):
        teacher = jnp.array([1.0, 0.2, -1.0])
        student = jnp.array([0.3, 0.1, 0.5])
        ids = jnp.array(list(itertools.product(range(3), repeat=2)))
        p = jax.nn.softmax(teacher)

        def expected(log_proposal):
            chances = jnp.exp(log_proposal[ids]).prod(axis=-1)
            weights = jnp.log(p)[ids] - log_proposal[ids] - np.log(2)
            sample = SampledLogits(ids, weights)
            students = jnp.broadcast_to(student, (9, 3))
            value, vjp = jax.vjp(lambda z: loss(z, sample), students)
            return chances @ value, chances @ vjp(jnp.ones(9))[0]

        dense = jax.grad(loss)(student, teacher)
        for proposal in (teacher, teacher / 3):
            value, slope = jax.jit(expected)(jax.nn.log_softmax(proposal))
            np.testing.assert_allclose(slope, dense, rtol=1e-12, atol=1e-15)
            if loss is losses.soft_cross_entropy:
                np.testing.assert_allclose(value, loss(student, teacher), rtol=1e-12)
            else:  # too large, by what the sample's entropy lacks
                assert value > loss(student, teacher)


def test_draws_have_the_teachers_frequencies():
    """Chi-square over the cells, with a fixed key; a class that cannot be, is not."""
    logits = VOCABULARY.at[3].set(-jnp.inf)
    sample = SampledLogits.draw(jax.random.key(3), logits[None], 200_000)
    counts = np.bincount(np.asarray(sample.ids[0]), minlength=512)
    assert counts[3] == 0
    p = np.delete(np.asarray(jax.nn.softmax(logits), np.float64), 3)
    test = stats.chisquare(np.delete(counts, 3), p / p.sum() * 200_000)
    assert test.pvalue > 1e-3
    np.testing.assert_allclose(sample.log_weights, -np.log(200_000), rtol=1e-6)


def test_a_proposal_is_corrected_by_the_weights():
    sample = SampledLogits.draw(
        jax.random.key(4), VOCABULARY[None], 100_000, proposal_temperature=2.0
    )
    t = np.bincount(
        np.asarray(sample.ids[0]), np.exp(np.asarray(sample.log_weights[0])), 512
    )
    plain = np.sqrt(ZIPF) / np.sqrt(ZIPF).sum()
    counts = np.bincount(np.asarray(sample.ids[0]), minlength=512)
    assert stats.chisquare(counts, plain * 100_000).pvalue > 1e-3
    error = np.sqrt(ZIPF**2 / plain / 100_000)
    assert np.abs((t - ZIPF) / error).max() < 4.5


def test_copies_merged_or_kept_are_the_same_target():
    logits = jnp.broadcast_to(VOCABULARY, (6, 512))
    sample = SampledLogits.draw(jax.random.key(5), logits, 20)
    merged = sample.merge()
    used = ~np.isneginf(merged.log_weights)
    for ids, row in zip(np.asarray(sample.ids), used, strict=True):
        assert sorted(ids[row]) == sorted(set(ids))
    student = jax.random.normal(jax.random.key(6), (6, 512))
    for loss in (losses.forward_kl, losses.soft_cross_entropy):
        both = jax.jit(lambda z, t, loss=loss: jax.vjp(lambda z: loss(z, t), z))
        (kept, kept_vjp), (once, once_vjp) = (
            both(student, sample),
            both(student, merged),
        )
        np.testing.assert_allclose(kept, once, rtol=1e-5)
        weights = jnp.arange(6.0)
        np.testing.assert_allclose(
            kept_vjp(weights)[0], once_vjp(weights)[0], atol=1e-6
        )


def test_the_kl_to_a_sample_is_zero_at_the_sample():
    """It is a divergence, and no cross-entropy; of a certain teacher it is exact."""
    sample = SampledLogits(jnp.array([0, 2, 0, 0]), jnp.full(4, -np.log(4)))
    student = jnp.log(jnp.array([0.75, 0.0, 0.25]))
    value, slope = jax.jit(jax.value_and_grad(losses.forward_kl))(student, sample)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    certain = jnp.array([0.0, -jnp.inf, -jnp.inf])
    sample = SampledLogits.draw(jax.random.key(0), certain, 7)
    student = jnp.array([0.5, 1.0, 0.0])
    of_sample = jax.jit(losses.forward_kl)(student, sample)
    np.testing.assert_allclose(of_sample, -jax.nn.log_softmax(student)[0], rtol=1e-5)
