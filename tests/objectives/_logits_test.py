"""Objectives bind losses to outputs, masks, weights and temperatures."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import (
    Outputs,
    Term,
    losses,
    make_distill_step,
    objectives,
    reduce_terms,
)
from distilljax.terms import diagnostics

STUDENT = Outputs(jnp.array([[0.5, 1.0, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]]))
TEACHER = Outputs(jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 2.0, 3.0]]))
BATCH = {"labels": jnp.array([0, 2]), "loss_mask": jnp.array([True, False])}


def test_hinton_distillation_is_the_published_number():
    """T^2 KL at T = 2 and T = 100 of the worked example in docs/losses.md."""
    for temperature, expected in ((2.0, 0.396319), (100.0, 0.399106)):
        objective = objectives.LogitKD(temperature=temperature)
        loss, metrics = reduce_terms(objective(STUDENT, TEACHER, BATCH))
        np.testing.assert_allclose(loss, expected, rtol=2e-5)
        assert set(metrics) == {"kd"}


def test_the_gradient_keeps_its_size_when_the_temperature_changes():
    """What T^2 is for: without it, T = 20 would have a gradient 400 times smaller."""

    def size(temperature):
        def loss(z):
            objective = objectives.LogitKD(temperature=temperature)
            return reduce_terms(objective(Outputs(z), TEACHER, {}))[0]

        return float(jnp.linalg.norm(jax.grad(loss)(STUDENT.logits)))

    assert 0.3 < size(20.0) / size(1.0) < 3.0


def test_weights_and_masks():
    objective = objectives.LogitKD(kd_weight=0.25, ce_weight=2.0)
    terms = objective(STUDENT, TEACHER, BATCH)
    loss, metrics = reduce_terms(terms)
    kl = losses.forward_kl(STUDENT.logits, TEACHER.logits)[0]
    ce = losses.cross_entropy(STUDENT.logits, BATCH["labels"])[0]
    np.testing.assert_allclose(loss, 0.25 * kl + 2.0 * ce, rtol=1e-6)
    assert {float(m.count) for m in metrics.values()} == {1.0}


def test_any_divergence():
    def skewed(student, teacher, *, temperature, where):
        return losses.skew_reverse_kl(
            student, teacher, skew=0.2, temperature=temperature, where=where
        )

    terms = objectives.LogitKD(divergence=skewed)(STUDENT, TEACHER, {})
    expected = losses.skew_reverse_kl(STUDENT.logits, TEACHER.logits, skew=0.2)
    np.testing.assert_allclose(terms["kd"].values, expected)


def test_schedules_take_the_step_from_the_batch():
    objective = objectives.LogitKD(
        temperature=lambda step: 1.0 + step, ce_weight=lambda step: 0.0 * step
    )
    terms = objective(STUDENT, TEACHER, {**BATCH, "step": 1})
    np.testing.assert_allclose(terms["kd"].weight, 4.0)
    assert float(terms["ce"].weight) == 0.0  # a schedule that may become positive


def test_no_labels_are_needed_without_their_weight():
    assert set(objectives.LogitKD()(STUDENT, TEACHER, {})) == {"kd"}
    with pytest.raises(ValueError, match=r"batch must have 'labels', got the keys"):
        objectives.LogitKD(ce_weight=0.1)(STUDENT, TEACHER, {"inputs": 0})


def test_a_missing_teacher_is_said():
    with pytest.raises(ValueError, match="LogitKD: teacher must have logits, got none"):
        objectives.LogitKD()(STUDENT, None, {})
    with pytest.raises(ValueError, match="student must have logits"):
        objectives.CrossEntropy()(Outputs(), None, BATCH)


def test_other_classes_and_bad_temperatures_are_said():
    other = Outputs(jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\).*[Ss]lice"):
        objectives.LogitKD()(STUDENT, other, {})
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        objectives.LogitKD(temperature=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ce_weight": float("nan")}, "ce_weight must be finite, got nan"),
        (
            {"divergence": losses.logit_mse, "temperature": 2.0},
            "divergence must take a temperature, got logit_mse.*forward_kl",
        ),
        (
            {"divergence": losses.attention_relation},
            "need no other options than .*, which needs num_relation_heads",
        ),
    ],
)
def test_what_is_no_distillation_is_refused_when_it_is_written(change, message):
    with pytest.raises(ValueError, match=message):
        objectives.LogitKD(**change)


@pytest.mark.parametrize("form", ["dense", "head"])
@pytest.mark.parametrize(
    "divergence",
    [
        losses.decoupled_kd,
        functools.partial(losses.decoupled_kd, non_target_weight=2.0),
        losses.logit_mse,
        losses.margin_mse,
        functools.partial(losses.hinge_ranking, k=2),
    ],
)
def test_losses_of_logits_get_what_they_take(divergence, form):
    """The labels, and the temperature: of those without one T = 1 is asked."""
    student, teacher, batch = heads()
    decoupled = getattr(divergence, "func", divergence) is losses.decoupled_kd
    own = {"labels": batch["labels"], "temperature": 2.0} if decoupled else {}
    objective = objectives.LogitKD(
        temperature=own.get("temperature", 1.0), ce_weight=0.5, divergence=divergence
    )
    z, v = student.logits(), teacher.logits()
    where = batch["loss_mask"]
    expected = losses.masked_mean(divergence(z, v, **own, where=where), where)
    expected *= objective.temperature**2
    ce = losses.cross_entropy(z, batch["labels"], where=where)
    expected += 0.5 * losses.masked_mean(ce, where)
    if form == "dense":
        student, teacher = z, v
    terms = objective(Outputs(student), Outputs(teacher), batch)
    loss, metrics = reduce_terms(terms)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert {"kd", "ce"} <= set(metrics)
    if decoupled:
        with pytest.raises(ValueError, match=r"have 'labels'.*divergence needs them"):
            objective(Outputs(student), Outputs(teacher), {})


@pytest.mark.parametrize("form", ["dense", "head"])
def test_standardized_logits(form):
    """LSKD: the scale of the teacher is free, and that of the student no matter."""
    student, teacher, batch = heads()
    objective = objectives.LogitKD(temperature=2.0, standardize=True)
    z, v = student.logits(), teacher.logits()
    pair = (losses.standardize_logits(x) for x in (z, v))
    kl = losses.forward_kl(*pair, temperature=2.0)
    expected = 4 * losses.masked_mean(kl, batch["loss_mask"])
    if form == "dense":
        student, teacher = z, v
        many = 3 * v + 1.0
    else:
        many = dataclasses.replace(teacher, scale=3.0)
    for other in (teacher, many):
        loss, _ = reduce_terms(objective(Outputs(student), Outputs(other), batch))
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
    sparse = Outputs(losses.SparseLogits.top_k(v, 3, (2.0,)))
    with pytest.raises(TypeError, match="dense array of logits, got SparseLogits"):
        objective(Outputs(student), sparse, batch)


def test_label_smoothing():
    terms = objectives.CrossEntropy(label_smoothing=0.1)(STUDENT, None, BATCH)
    np.testing.assert_allclose(terms["ce"].mean().value, 1.363629, rtol=1e-5)


def test_a_sparse_teacher_comes_in_the_batch():
    """As a store or a server gives it: the step learns from it, and logs the KL."""
    student = nnx.Linear(4, 12, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(student, optax.adam(0.1), wrt=nnx.Param)
    logits = 2 * jax.random.normal(jax.random.key(1), (4, 12))
    sparse = losses.SparseLogits.top_k(logits, 6, (1.0, 2.0))
    batch = {"inputs": jnp.eye(4), "teacher": Outputs(logits=sparse)}
    step = make_distill_step(objectives.LogitKD(temperature=2.0), None)
    metrics = [step(student, optimizer, batch) for _ in range(60)]
    assert metrics[-1]["kd"].value < 0.01 * metrics[0]["kd"].value
    assert metrics[-1]["kl"].value < 0.02 < metrics[0]["kl"].value
    assert metrics[-1]["agreement"].value == 1


# --- Heads ---------------------------------------------------------------------------


def heads():
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=shape) for shape in ((2, 5, 3), (3, 7), (2, 5, 4), (4, 7))
    ]
    h, k, teacher_h, teacher_k = (jnp.asarray(x, jnp.float32) for x in arrays)
    student = losses.LinearHead(h, k, softcap=3.0)
    batch = {
        "labels": jnp.asarray(rng.integers(0, 7, (2, 5))),
        "loss_mask": jnp.asarray(rng.random((2, 5)) > 0.3),
    }
    return student, losses.LinearHead(teacher_h, teacher_k), batch


@pytest.mark.parametrize(
    "objective",
    [
        objectives.LogitKD(temperature=2.0, kd_weight=0.7, ce_weight=0.3),
        objectives.LogitKD(divergence=losses.reverse_kl),
        objectives.CrossEntropy(label_smoothing=0.1),
    ],
)
def test_heads_give_what_logits_give(objective):
    """Loss, gradient and every name that is logged, from one fused term."""
    student, teacher, batch = heads()

    def fused(student):
        terms = objective(Outputs(student), Outputs(teacher), batch)
        assert len(terms) == 1
        return reduce_terms(terms)

    def plain(student):
        outputs = Outputs(student.logits()), Outputs(teacher.logits())
        return reduce_terms(objective(*outputs, batch))

    (loss, metrics), grads = jax.value_and_grad(fused, has_aux=True)(student)
    (expected, named), slopes = jax.value_and_grad(plain, has_aux=True)(student)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, mean in named.items():
        np.testing.assert_allclose(metrics[name].value, mean.value, rtol=1e-5)
        assert float(metrics[name].count) == float(mean.count)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grads,
        slopes,
    )


def test_two_terms_cannot_log_one_name():
    student, teacher, batch = heads()
    terms = objectives.LogitKD(ce_weight=0.5)(Outputs(student), Outputs(teacher), batch)
    again = Term(jnp.ones(3))
    with pytest.raises(ValueError, match=r"must differ, got \['ce'\] twice"):
        reduce_terms({**terms, "ce": again})


@pytest.mark.parametrize(
    "objective",
    [
        objectives.LogitKD(temperature=2.0, ce_weight=0.5, num_classes=6),
        objectives.CrossEntropy(num_classes=6),
    ],
)
def test_padded_classes_take_no_part(objective):
    """A student of 7 and a teacher of 9 know 6 classes: as if they had no others."""
    student, teacher, batch = heads()
    batch["labels"] = jnp.minimum(batch["labels"], 5)
    wide = jnp.concatenate(
        [teacher.kernel, 9 * jnp.ones((teacher.hidden.shape[-1], 2))], 1
    )
    padded = losses.LinearHead(teacher.hidden, wide)
    plain = dataclasses.replace(objective, num_classes=None)
    z, v = student.logits()[..., :6], teacher.logits()[..., :6]

    def logged(objective, z, v):
        def of(z):
            outputs = Outputs(z), Outputs(v)
            loss, metrics = reduce_terms(terms := objective(*outputs, batch))
            return loss, metrics | diagnostics(*outputs, batch, terms)

        (loss, metrics), grad = jax.value_and_grad(of, has_aux=True)(z)
        numbers = {name: float(mean.value) for name, mean in metrics.items()}
        return float(loss), numbers, grad

    loss, numbers, grad = logged(plain, z, v)
    for pair in ((student, padded), (student.logits(), padded.logits())):
        found, named, slope = logged(objective, *pair)
        np.testing.assert_allclose(found, loss, rtol=1e-5)
        for name, value in numbers.items():
            if name in named:
                np.testing.assert_allclose(named[name], value, rtol=1e-5, err_msg=name)
        assert named.keys() >= numbers.keys() - {"teacher_entropy", "agreement", "kl"}
    np.testing.assert_allclose(slope[..., :6], grad, rtol=1e-5, atol=1e-7)
    assert not slope[..., 6:].any()


def test_more_classes_than_there_are_is_an_error():
    student, teacher, batch = heads()
    objective = objectives.LogitKD(num_classes=8)
    with pytest.raises(ValueError, match=r"num_classes must .* got 8"):
        objective(Outputs(student.logits()), Outputs(teacher.logits()), batch)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        objectives.CrossEntropy(num_classes=0)
