"""Logits in their several forms. What is protected: an objective over heads is what it
is over their logits, in value and in gradient, under every name that is logged; a form
that it cannot take is an error of its own, and never another loss.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import Outputs, losses, make_distill_step, reduce_terms
from distilljax.objectives import (
    TAID,
    CrossEntropy,
    HardDistillation,
    LogitKD,
    MeanOfLogits,
    MeanOfProbabilities,
    MultiTeacher,
    Routed,
    SelfDistillation,
    Sum,
)
from distilljax.terms import diagnostics

LEAD, CLASSES = (3, 5), 7


def head(width, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((*LEAD, width), (width, CLASSES), (CLASSES,))
    arrays = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    hidden, kernel, bias = arrays
    return losses.LinearHead(hidden, kernel, bias, softcap=5.0)


STUDENT, TEACHERS = head(2, 0), {"a": head(3, 1), "b": head(4, 2)}
BATCH = {
    "labels": jnp.arange(15).reshape(LEAD) % CLASSES,
    "loss_mask": jnp.arange(15).reshape(LEAD) % 4 != 1,
    "teacher_index": jnp.array([1, 0, 1]),
    "average": Outputs(head(2, 3)),
    "step": 0,
}
ONE = Outputs(TEACHERS["a"])
MANY = {name: Outputs(x) for name, x in TEACHERS.items()}


def whole(outputs):
    """The same with logits as arrays."""
    if isinstance(outputs, dict):
        return {name: whole(x) for name, x in outputs.items()}
    return dataclasses.replace(outputs, logits=outputs.logits.logits())


def logged(objective, student, teacher, batch):
    """The loss, and whatever the step logs."""
    terms = objective(Outputs(student), teacher, batch)
    loss, metrics = reduce_terms(terms)
    found = metrics | diagnostics(Outputs(student), teacher, batch, terms)
    return loss, {name: mean.value for name, mean in found.items()}


OBJECTIVES = {
    "logit": (LogitKD(temperature=2.0, ce_weight=0.5), ONE),
    "labels": (CrossEntropy(label_smoothing=0.1), None),
    "hard": (HardDistillation(label_smoothing=0.1), ONE),
    "taid": (TAID(interpolation=0.4, temperature=2.0), ONE),
    "probabilities": (
        MultiTeacher(LogitKD(temperature=2.0), MeanOfProbabilities({"a": 3.0})),
        MANY,
    ),
    "logits": (MultiTeacher(LogitKD(), MeanOfLogits({"b": 2.0})), MANY),
    "routed": (MultiTeacher(TAID(interpolation=0.4), Routed(("a", "b"))), MANY),
    "self": (SelfDistillation(LogitKD(temperature=2.0)), None),
    "sum": (
        Sum(
            {
                "labels": CrossEntropy(),
                "soft": LogitKD(temperature=2.0, ce_weight=0.1),
                "own": SelfDistillation(LogitKD()),
            }
        ),
        ONE,
    ),
}


@pytest.mark.parametrize("teacher_form", ["head", "dense"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_heads_are_what_their_logits_are(name, teacher_form):
    objective, teacher = OBJECTIVES[name]
    dense_teacher = None if teacher is None else whole(teacher)
    dense_batch = {**BATCH, "average": whole(BATCH["average"])}
    if teacher_form == "dense":
        teacher = dense_teacher
    # nan where nothing counts reaches neither the loss nor the kernel
    where = BATCH["loss_mask"]
    broken = jnp.where(where[..., None], STUDENT.hidden, jnp.nan)
    student = dataclasses.replace(STUDENT, hidden=broken)

    @jax.jit
    def of_heads(student):
        return logged(objective, student, teacher, BATCH)

    @jax.jit
    def of_logits(student):
        return logged(objective, student.logits(), dense_teacher, dense_batch)

    (loss, found), grads = jax.value_and_grad(of_heads, has_aux=True)(student)
    (other, expected), slopes = jax.value_and_grad(of_logits, has_aux=True)(STUDENT)
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    found.pop("logit_kd", None)  # the sum of both, in one pass
    extra = {key for key in found if key.endswith("/logit_kd")}
    assert found.keys() - extra >= expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, err_msg=key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        grads,
        slopes,
    )


def test_the_likeliest_class_of_a_sparse_teacher_is_a_label():
    v = TEACHERS["a"].logits()
    for sparse in (
        losses.SparseLogits.top_k(v, 3),
        losses.SparseLogits(  # in any order
            *(x[..., ::-1] for x in _ids_and_probs(v)), jnp.zeros((*LEAD, 1))
        ),
    ):
        objective = HardDistillation()
        found = objective(Outputs(STUDENT), Outputs(sparse), BATCH)
        expected = objective(Outputs(STUDENT), Outputs(v), BATCH)
        np.testing.assert_allclose(
            found["kd"].mean().value, expected["kd"].mean().value, rtol=1e-6
        )


def _ids_and_probs(v):
    sparse = losses.SparseLogits.top_k(v, 3)
    return sparse.ids, sparse.log_probs


SPARSE = Outputs(losses.SparseLogits.top_k(TEACHERS["a"].logits(), 3))
SAMPLED = Outputs(
    losses.SampledLogits.draw(jax.random.key(0), TEACHERS["a"].logits(), 4)
)


@pytest.mark.parametrize("form", ["dense", "head"])
@pytest.mark.parametrize(
    ("objective", "teacher", "message"),
    [
        (TAID(interpolation=0.4), SPARSE, "TAID: teacher must be a dense array"),
        (TAID(interpolation=0.4), SAMPLED, "TAID: teacher must be a dense array"),
        (
            HardDistillation(),
            SAMPLED,
            "HardDistillation: teacher must have a",
        ),
        *(
            (
                MultiTeacher(LogitKD(), combine),
                {"a": ONE, "b": other},
                f"{type(combine).__name__}: the logits of teacher 'b' must be an array",
            )
            for combine in (MeanOfProbabilities(), MeanOfLogits(), Routed(("a", "b")))
            for other in (SPARSE, SAMPLED)
        ),
    ],
)
def test_a_form_that_says_too_little_is_refused(objective, teacher, message, form):
    student = Outputs(STUDENT if form == "head" else STUDENT.logits())
    with pytest.raises(TypeError, match=message):
        objective(student, teacher, BATCH)


def test_the_logits_of_a_taid_teacher_have_the_shape_of_the_students():
    wide = Outputs(jnp.zeros((*LEAD, CLASSES + 1)))
    for student in (STUDENT, STUDENT.logits()):
        with pytest.raises(ValueError, match=r"TAID: teacher must have the shape"):
            TAID(interpolation=0.4)(Outputs(student), wide, BATCH)


class Speaker(nnx.Module):
    """A language model in small: its logits are a head."""

    def __init__(self, width, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(CLASSES, width, rngs=rngs)

    def __call__(self, tokens):
        hidden = nnx.tanh(self.embed(tokens))
        return Outputs(losses.LinearHead(hidden, self.embed.embedding[...].T))


def test_teachers_with_heads_in_the_step():
    """With microbatches, on a mesh, with the state of TAID and all that is logged."""
    objective = Sum(
        {
            "taid": MultiTeacher(TAID(num_steps=5), MeanOfLogits()),
            "soft": MultiTeacher(LogitKD(temperature=2.0)),
            "own": SelfDistillation(LogitKD()),
        }
    )
    tokens = jnp.arange(64).reshape(16, 4) % CLASSES
    batch = {"inputs": tokens, "loss_mask": tokens != 3}
    found = []
    for shape, accumulate in (((1, 1), 1), ((1, 1), 2), ((4, 2), 1)):
        student = Speaker(4, 0)
        step = make_distill_step(
            objective,
            {"a": Speaker(6, 1), "b": Speaker(5, 2)},
            student=student,
            tx=optax.sgd(0.1),
            accumulate=accumulate,
            ema_decay=0.5,
        )
        kinds = (jax.sharding.AxisType.Auto,) * 2
        with jax.set_mesh(jax.make_mesh(shape, ("data", "fsdp"), axis_types=kinds)):
            state = step.init(student)
            for _ in range(2):
                state, metrics = step.pure(state, step.teacher_state, batch)
        found.append({name: float(mean.value) for name, mean in metrics.items()})
    assert {"taid/taid", "soft/kd", "own/kd", "kl", "agreement"} <= set(found[0])
    for name, value in found[0].items():
        for other in found[1:]:
            np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)
