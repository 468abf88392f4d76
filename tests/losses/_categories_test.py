"""Divergences from a sparse teacher: the tail bucket, its digits, and bad input."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from distilljax.losses import SampledLogits, SparseLogits
from tests.losses import oracles
from tests.losses.contract import UNOPTIMIZED

K = 4
RNG = np.random.default_rng(0)
TEACHER = RNG.normal(size=(5, 12)) * 2
STUDENT = TEACHER + RNG.normal(size=(5, 12))
GRID = (1.0, 2.0)

# Every divergence that makes sense through a tail bucket, with its float64 oracle.
DIVERGENCES = {
    losses.forward_kl: oracles.forward_kl,
    losses.reverse_kl: oracles.reverse_kl,
    losses.jensen_shannon: oracles.js,
    losses.skew_forward_kl: oracles.skew_fkl,
    losses.skew_reverse_kl: oracles.skew_rkl,
    losses.total_variation: oracles.tv,
    losses.soft_cross_entropy: oracles.soft_ce,
    losses.adaptive_kl: oracles.akl,
    losses.alpha_beta: oracles.ab,
}
SURROGATES = {losses.adaptive_kl}
SAMPLED = {losses.forward_kl, losses.soft_cross_entropy}


# Where the categories are wrong for one they are for all; and these compile soon.
FEW = (losses.forward_kl, losses.reverse_kl, losses.total_variation)


@functools.partial(jax.jit, static_argnames="divergences", compiler_options=UNOPTIMIZED)
def measure(student, teacher, temperature, divergences=FEW):
    """Values and gradients, compiled once for each kind of teacher."""

    def total(student, loss):
        values = loss(student, teacher, temperature=temperature)
        return values.sum(), values

    return [jax.value_and_grad(total, has_aux=True)(student, d) for d in divergences]


def bucketed_oracle(oracle, student, temperature):
    """The oracle on the logs of the k + 1 probabilities of both sides."""
    q, p, _ = oracles.tail_bucket(student, TEACHER, temperature, K)
    return oracle(np.log(q), np.log(p))


@pytest.mark.parametrize("temperature", GRID)
def test_every_divergence_is_its_formula_on_the_categories(temperature):
    """The tail bucket is one more class, with the tempered mass of all others."""
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
        sparse = SparseLogits.top_k(teacher, K, GRID)
        results = measure(student, sparse, temperature, tuple(DIVERGENCES))
    for (loss, oracle), ((_, values), slope) in zip(
        DIVERGENCES.items(), results, strict=True
    ):
        expected = bucketed_oracle(oracle, STUDENT, temperature)
        np.testing.assert_allclose(values, expected, rtol=1e-10, err_msg=str(loss))
        if loss in SURROGATES:
            continue
        expected = oracles.central_differences(
            lambda z, oracle=oracle: bucketed_oracle(oracle, z, temperature),
            STUDENT.copy(),
        )
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-8)


def test_all_classes_kept_is_the_dense_loss():
    student, teacher = (jnp.asarray(x, jnp.float32) for x in (STUDENT, TEACHER))
    dense = measure(student, teacher, 1.0)
    sparse = measure(student, SparseLogits.top_k(teacher, 12), 1.0)
    for ((_, values), slope), ((_, expected), dense_slope) in zip(
        sparse, dense, strict=True
    ):
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope, dense_slope, rtol=1e-4, atol=1e-6)


def with_tail(mass):
    """Logits of 64 classes of which the last 60 have this probability together."""
    head = np.log(np.array([0.5, 0.3, 0.15, 0.05])) + np.log1p(-mass)
    return np.concatenate([head, np.full(60, np.log(mass / 60))])


TAILS = [1e-3, 1e-6, 1e-9, 1e-12]


def test_a_tiny_tail_keeps_its_digits():
    """1 - sum of q is wrong by 10 % at 1e-6 in float32, and 0 or negative at 1e-9."""
    # The order of the head differs too, so that the loss is not nearly 0.
    student = np.stack([with_tail(3 * tail)[np.r_[1, 0, 2:64]] for tail in TAILS])
    teacher = np.stack([with_tail(tail) for tail in TAILS])

    @jax.jit
    def tail_slope(student, teacher):
        sparse = SparseLogits.top_k(teacher, 4)
        loss = lambda z: losses.reverse_kl(z, sparse).sum()  # noqa: E731
        return losses.reverse_kl(student, sparse), jax.grad(loss)(student)[:, 4:]

    arrays = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
    values, slope = tail_slope(*arrays)
    q, p, _ = oracles.tail_bucket(student, teacher, 1.0, 4)
    ratio = np.log(q[:, -1] / p[:, -1]) - oracles.kl(q, p)
    expected = np.repeat((oracles.softmax(student)[:, 4:].T * ratio).T[:, :1], 60, 1)
    np.testing.assert_allclose(values, oracles.kl(q, p), rtol=1e-5)
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_the_difference_would_fail_the_test_above():
    """Else that test would protect nothing."""
    logits = jnp.asarray(np.stack([with_tail(tail) for tail in TAILS]), jnp.float32)
    q = jax.nn.softmax(logits)
    tail = 1 - jnp.sum(q[:, :4], axis=-1)
    error = np.abs(np.asarray(tail) / TAILS - 1)
    assert error[1] > 1e-2
    assert error[2] > 0.9


def test_unused_slots_are_not_there():
    """Whatever their ids are, also where those are classes that are in use."""
    student = jnp.asarray(STUDENT, jnp.float32)
    short = SparseLogits.top_k(jnp.asarray(TEACHER, jnp.float32), K)
    for filler, dtype in ((0, jnp.uint16), (-1, jnp.int32), (10**6, jnp.uint32)):
        ids = jnp.concatenate([short.ids, jnp.full((5, 2), filler)], axis=-1)
        ids = ids.astype(dtype)
        nothing = jnp.full((5, 2), -jnp.inf)
        log_probs = jnp.concatenate([short.log_probs, nothing], axis=-1)
        long = SparseLogits(ids, log_probs, short.log_tail)
        for ((_, a), slope_a), ((_, b), slope_b) in zip(
            measure(student, short, 1.0), measure(student, long, 1.0), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(slope_a, slope_b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [-1, 12])
def test_an_id_out_of_range_is_nan_and_a_masked_one_is_nothing(bad):
    """It is neither clamped nor counted from the end, in the value or the gradient."""
    student = jnp.asarray(STUDENT, jnp.float32)
    sparse = SparseLogits.top_k(jnp.asarray(TEACHER, jnp.float32), K)
    wrong = SparseLogits(
        sparse.ids.at[2, 1].set(bad), sparse.log_probs, sparse.log_tail
    )
    for (_, values), slope in measure(student, wrong, 1.0):
        np.testing.assert_array_equal(np.isnan(values), np.arange(5) == 2)
        np.testing.assert_array_equal(np.isnan(slope).all(-1), np.arange(5) == 2)
    where = jnp.arange(5) != 2
    weights = jnp.full((5, K), -np.log(K))

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def masked(student, teacher):
        loss = lambda z: losses.forward_kl(z, teacher, where=where)  # noqa: E731
        values, vjp = jax.vjp(loss, student)
        return values, vjp(jnp.ones(5))[0]

    for teacher in (wrong, SampledLogits(wrong.ids, weights)):
        values, slope = masked(student, teacher)
        assert np.all(np.isfinite(values))
        np.testing.assert_array_equal(slope[2], np.zeros(12))
        assert np.all(np.any(np.asarray(slope)[np.asarray(where)] != 0, axis=-1))
    sampled = losses.forward_kl(student, SampledLogits(wrong.ids, weights))
    np.testing.assert_array_equal(np.isnan(sampled), np.arange(5) == 2)


def test_temperatures_outside_the_grid_are_refused_or_nan():
    student = jnp.asarray(STUDENT, jnp.float32)
    sparse = SparseLogits.top_k(jnp.asarray(TEACHER, jnp.float32), K, GRID)
    with pytest.raises(
        ValueError, match=r"forward_kl: temperature .*\(1.0, 2.0\), got 4"
    ):
        losses.forward_kl(student, sparse, temperature=4)
    static = losses.forward_kl(student, sparse, temperature=2)
    (_, traced), _ = measure(student, sparse, 2.0)[0]
    np.testing.assert_allclose(traced, static, rtol=1e-6)
    for (_, values), slope in measure(student, sparse, 1.5):
        assert np.all(np.isnan(values))
        assert np.all(np.isnan(slope))


def test_a_sample_cannot_be_tempered():
    student = jnp.asarray(STUDENT, jnp.float32)
    sample = SampledLogits(jnp.zeros((5, 2), int), jnp.full((5, 2), -np.log(2)))
    for loss in SAMPLED:
        with pytest.raises(ValueError, match=f"{loss.__name__}: temperature must be 1"):
            loss(student, sample, temperature=2.0)
        at = jax.jit(lambda t, loss=loss: loss(student, sample, temperature=t))
        assert np.all(np.isnan(at(2.0)))
        np.testing.assert_allclose(at(1.0), loss(student, sample), rtol=1e-6)


@pytest.mark.parametrize("loss", [d for d in DIVERGENCES if d not in SAMPLED])
def test_a_sample_estimates_two_losses_only(loss):
    sample = SampledLogits(jnp.zeros((5, 2), int), jnp.zeros((5, 2)))
    with pytest.raises(
        TypeError, match=f"{loss.__name__}: teacher .*got SampledLogits"
    ):
        loss(jnp.asarray(STUDENT, jnp.float32), sample)


@pytest.mark.parametrize(
    "loss",
    [
        losses.logit_mse,
        losses.hinge_ranking,
        losses.universal_logit,
        losses.decoupled_kd,
    ],
)
def test_losses_that_need_all_classes_say_so(loss):
    """The shape checker of the tests would be first, so it is taken off here."""
    student = jnp.asarray(STUDENT, jnp.float32)
    labels = {"labels": jnp.zeros(5, int)} if loss is losses.decoupled_kd else {}
    with pytest.raises(TypeError, match="must be a dense array of logits, got Sparse"):
        inspect.unwrap(loss)(student, SparseLogits.top_k(student, 2), **labels)


def sparse_parts():
    sparse = SparseLogits.top_k(jnp.asarray(TEACHER, jnp.float32), K)
    return {
        "ids": sparse.ids,
        "log_probs": sparse.log_probs,
        "log_tail": sparse.log_tail,
    }


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"ids": lambda x: x.astype(jnp.float32)}, TypeError, "ids must be integer"),
        (
            {"log_probs": lambda x: x.astype(int)},
            TypeError,
            "log_probs must be floating",
        ),
        (
            {"log_probs": lambda x: x[:, 1:]},
            ValueError,
            "log_probs must have the leading",
        ),
        (
            {name: lambda x: x[:3] for name in ("ids", "log_probs", "log_tail")},
            ValueError,
            r"ids must have the leading axes of student, \(5,\).*got \(3, 4\)",
        ),
        (
            {"log_tail": lambda x: jnp.concatenate([x, x], axis=-1)},
            ValueError,
            r"log_tail must have the shape \(5, 1\)",
        ),
        (
            {name: lambda x: jnp.tile(x, 4) for name in ("ids", "log_probs")},
            ValueError,
            "ids must name at most the 12 classes of student, got 16 slots",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(change, kind, message):
    parts = sparse_parts()
    for name, edit in change.items():
        parts[name] = edit(parts[name])
    with pytest.raises(kind, match=f"forward_kl: teacher.{message}"):
        losses.forward_kl(jnp.asarray(STUDENT, jnp.float32), SparseLogits(**parts))


def test_no_dense_teacher_is_made():
    """In arrays [positions, classes]: the dense loss takes 6.3 beside the gradient."""
    positions, classes, slots = 64, 8192, 16
    of = jax.ShapeDtypeStruct
    student = of((positions, classes), jnp.float32)
    ids, weights = (
        of((positions, slots), jnp.int32),
        of((positions, slots), jnp.float32),
    )
    tail = of((positions, 1), jnp.float32)

    def arrays(teacher):
        total = lambda z, t: losses.forward_kl(z, t).sum()  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(total)).lower(student, teacher).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * positions * classes)

    assert arrays(SparseLogits(ids, weights, tail)) <= 2.1  # both the student's own
    assert arrays(SampledLogits(ids, weights)) <= 0.1
