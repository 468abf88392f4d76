"""Who teaches. What is protected: means are of what they say they are of; an example is
taught by its own teacher; the student's average teaches in inference mode, without
gradient; sums keep the names, parameters and state of their parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import Outputs, Term, losses, make_distill_step, reduce_terms
from distilljax.objectives import (
    TAID,
    CrossEntropy,
    FeatureKD,
    HardDistillation,
    LogitKD,
    MeanOfLogits,
    MeanOfProbabilities,
    MultiTeacher,
    Only,
    Routed,
    SelfDistillation,
    Sum,
)

V = {
    "a": jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 0.0, 0.0]]),
    "b": jnp.array([[0.0, 0.0, 4.0, 0.0], [1.0, 0.0, 0.0, -2.0]]),
}
TEACHERS = {name: Outputs(v) for name, v in V.items()}
STUDENT = Outputs(jnp.array([[0.5, 1.0, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]]))


class Net(nnx.Module):
    def __init__(self, seed, dropout=0.0):
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(self.hidden(x))))


BATCH = {
    "inputs": jax.random.normal(jax.random.key(3), (8, 5)),
    "labels": jnp.arange(8) % 3,
    "teacher_index": jnp.arange(8) % 2,
}


def kd(objective, batch=None):
    return objective(STUDENT, TEACHERS, batch or {})["kd"].values


# --- several teachers -----------------------------------------------------------------


def test_the_mean_of_probabilities_is_taken_at_the_temperature():
    for temperature, weights in ((1.0, {}), (4.0, {"b": 3.0})):
        combine = MeanOfProbabilities(weights)
        found = kd(MultiTeacher(LogitKD(temperature=temperature), combine))
        share = np.array([1.0, weights.get("b", 1.0)])
        p = np.average(
            [jax.nn.softmax(v / temperature) for v in V.values()], axis=0, weights=share
        )
        log_q = jax.nn.log_softmax(STUDENT.logits / temperature)
        expected = np.sum(p * (np.log(p) - log_q), axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_sum_is_taught_at_the_temperature_of_its_parts():
    """A part alone and in a sum learn the same; parts that differ need means each."""
    soft = LogitKD(temperature=4.0)
    alone = MultiTeacher(soft)
    expected = kd(alone)
    inside = Sum({"soft": soft, "hard": CrossEntropy()})
    batch = {"labels": jnp.array([0, 2])}
    terms = MultiTeacher(inside)(STUDENT, TEACHERS, batch)
    np.testing.assert_allclose(terms["soft/kd"].values, expected, rtol=1e-6)
    # the student's own average is no mean of teachers
    own = Sum({"soft": soft, "own": SelfDistillation(LogitKD())})
    terms = MultiTeacher(own)(STUDENT, TEACHERS, {"average": STUDENT})
    np.testing.assert_allclose(terms["soft/kd"].values, expected, rtol=1e-6)
    differ = Sum({"a": soft, "b": LogitKD(temperature=1.0)})
    with pytest.raises(ValueError, match=r"have one temperature.*got 4\.0, 1\.0"):
        MultiTeacher(differ)
    for combine in (MeanOfLogits(), Routed(("a", "b")), Only("a")):
        MultiTeacher(differ, combine)  # these do not depend on it


def test_the_mean_of_logits():
    found = kd(MultiTeacher(LogitKD(temperature=2.0), MeanOfLogits({"a": 3.0})))
    expected = losses.forward_kl(
        STUDENT.logits, 0.75 * V["a"] + 0.25 * V["b"], temperature=2.0
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_example_has_its_own_teacher():
    routed = MultiTeacher(LogitKD(), Routed(("b", "a")))
    found = kd(routed, {"teacher_index": jnp.array([1, 0])})
    own = jnp.stack([V["a"][0], V["b"][1]])
    np.testing.assert_allclose(found, losses.forward_kl(STUDENT.logits, own))
    for outside in (-1, 2):
        found = kd(routed, {"teacher_index": jnp.array([outside, 0])})
        np.testing.assert_array_equal(jnp.isnan(found), [True, False])


@pytest.mark.parametrize(
    ("objective", "batch", "message"),
    [
        (MultiTeacher(LogitKD(), Routed(("a", "c"))), {}, "names must be teachers"),
        (MultiTeacher(LogitKD(), Routed(("a", "b"))), {}, "have 'teacher_index'"),
        (
            MultiTeacher(LogitKD(), Routed(("a", "b"))),
            {"teacher_index": jnp.zeros(2)},
            r"integers of shape \(2,\), got float32",
        ),
        (MultiTeacher(LogitKD(), Only("c")), {}, "Only: name must be a teacher"),
        (MultiTeacher(LogitKD(), MeanOfLogits({"c": 1.0})), {}, "name teachers, a, b"),
        (
            MultiTeacher(LogitKD(), MeanOfLogits({"a": 0.0, "b": 0.0})),
            {},
            "weights must be positive for one of a, b",
        ),
        (LogitKD(), {}, "teacher must be one model, got several, a, b"),
    ],
)
def test_bad_combinations_are_said(objective, batch, message):
    with pytest.raises(ValueError, match=message):
        objective(STUDENT, TEACHERS, batch)


def test_one_teacher_and_features_without_a_name_are_refused():
    with pytest.raises(ValueError, match="teacher must be several, by name, got one"):
        MultiTeacher(LogitKD())(STUDENT, STUDENT, {})
    with pytest.raises(ValueError, match=r"combine must be Only\(name\)"):
        MultiTeacher(FeatureKD({"h": "h"}))


@pytest.mark.parametrize("source", ["modules", "batch"])
def test_several_teachers_in_the_step(source):
    """Features of one and the mean of both, from modules or from the batch."""
    hint = MultiTeacher(FeatureKD({"hidden": "hidden"}), Only("b"))
    objective = Sum({"logits": MultiTeacher(LogitKD()), "hint": hint})
    teachers = {"a": Net(1), "b": Net(2)}
    batch = dict(BATCH)
    for net in teachers.values():
        net.eval()
    outputs = {
        name: Outputs(net(batch["inputs"]), {"hidden": net.hidden(batch["inputs"])})
        for name, net in teachers.items()
    }
    if source == "batch":
        batch["teacher"], teachers = outputs, None
    student = Net(0)
    step = make_distill_step(objective, teachers, student=student, tx=optax.sgd(0.1))
    _, metrics = step.pure(step.init(student), step.teacher_state, batch)
    hidden = student.hidden(batch["inputs"])
    expected = np.mean((hidden - outputs["b"].features["hidden"]) ** 2)
    np.testing.assert_allclose(metrics["hint/hidden"].value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["logits/kd"].value, metrics["kl"].value, rtol=1e-5
    )
    with pytest.raises(ValueError, match="begin with the name of one, a, b"):
        make_distill_step(FeatureKD({"hidden": "hidden"}), {"a": Net(1), "b": Net(2)})


# --- the student's own average --------------------------------------------------------


def test_the_average_teaches_in_inference_mode():
    """Its value: dropout of 0.5 would move it; and its features are captured."""
    objective = Sum(
        {
            "soft": SelfDistillation(LogitKD()),
            "hint": SelfDistillation(FeatureKD({"hidden": "hidden"})),
        }
    )
    student = Net(0, dropout=0.5)
    seen = []

    def spy(student, teacher, batch):
        seen.append(teacher)
        return {
            **objective(student, teacher, batch),
            "average": Term(batch["average"].logits[:, 0]),
        }

    for name in ("student_features", "average_features", "uses_average"):
        setattr(spy, name, getattr(objective, name))
    step = make_distill_step(spy, student=student, tx=optax.sgd(0.1), ema_decay=0.9)
    state = step.init(student)
    for _ in range(2):
        average = nnx.clone(student)
        nnx.update(average, state.ema, state.rest)
        average.eval()
        expected = jnp.mean(average(BATCH["inputs"])[:, 0])
        ema = jax.tree.map(np.array, state.ema)
        state, metrics = step.pure(state, None, BATCH)
        np.testing.assert_allclose(metrics["average"].value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        state.ema["out"]["bias"],
        0.9 * ema["out"]["bias"] + 0.1 * state.params["out"]["bias"],
        rtol=1e-6,
    )
    assert metrics["soft/kd"].value > 0
    assert metrics["hint/hidden"].value > 0
    assert seen[0] is None


def test_the_average_gets_no_gradient_and_is_needed():
    def loss(v):
        batch = {"average": Outputs(v)}
        return reduce_terms(SelfDistillation(LogitKD())(STUDENT, None, batch))[0]

    assert not jax.grad(loss)(V["a"]).any()
    with pytest.raises(ValueError, match="ema_decay must be given for an objective"):
        make_distill_step(SelfDistillation(LogitKD()))


# --- the teacher's decision -----------------------------------------------------------


def test_hard_distillation_is_that_of_deit():
    token = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    student = Outputs(STUDENT.logits, {"token": token})
    batch = {"labels": jnp.array([0, 2]), "loss_mask": jnp.array([True, True])}
    objective = HardDistillation("token")
    loss, _ = reduce_terms(objective(student, TEACHERS["a"], batch))
    decided = -jax.nn.log_softmax(token)[jnp.arange(2), jnp.array([0, 1])]
    hard = -jax.nn.log_softmax(STUDENT.logits)[jnp.arange(2), batch["labels"]]
    np.testing.assert_allclose(
        loss, 0.5 * decided.mean() + 0.5 * hard.mean(), rtol=1e-6
    )
    alone = HardDistillation(ce_weight=0.0)(STUDENT, TEACHERS["a"], {})
    assert set(alone) == {"kd"}
    assert objective.student_features == ("token",)


# --- TAID -----------------------------------------------------------------------------


def test_taid_is_the_published_number_and_gradient():
    """Mixing probabilities instead of logits, or a gradient through the mixture, would
    give another gradient: q - p_t."""
    z, v = jnp.array([[0.5, 1.0, 0.0, 0.0]]), Outputs(V["a"][:1])

    def loss(z, t):
        return reduce_terms(TAID(interpolation=t)(Outputs(z), v, {}))[0]

    value, grad = jax.value_and_grad(loss)(z, 0.4)
    np.testing.assert_allclose(value, 0.058177, rtol=1e-4)
    expected = [[-0.147418, 0.059238, 0.021792, 0.066387]]
    np.testing.assert_allclose(grad, expected, atol=2e-6)
    np.testing.assert_allclose(loss(z, 1.0), losses.forward_kl(z, v.logits)[0])
    np.testing.assert_allclose(loss(z, 0.0), 0.0, atol=1e-7)


def test_taid_keeps_classes_that_are_switched_off():
    gone = jnp.array([[0.0, 1.0, -jnp.inf, 0.0]])
    for t in (0.0, 0.5, 1.0):
        objective = TAID(interpolation=t)
        terms = objective(Outputs(gone), Outputs(2 * gone), {})
        assert jnp.isfinite(terms["taid"].values).all()


def test_taid_moves_as_its_authors_say():
    """Against a plain loop; the first loss only sets the mark."""
    objective = TAID(num_steps=10, start=0.1, rate=0.5, momentum=0.9)
    state, t, m, before = objective.init_state(), 0.1, 0.0, None
    for step, loss in enumerate([2.0, 1.0, 0.5, 0.7, 0.1]):
        seen = {
            "loss": losses_of(loss),
            "step": jnp.array([step, step]),
        }
        state = objective.next_state(state, seen)
        if before is not None:
            m = 0.9 * m + 0.1 * (before - loss) / before
            faster = 0.5 / (1 + np.exp(-m)) * (1 - t)
            t = min(1.0, max(0.1 + 0.9 * step / 10, t + faster))
        before = loss
        np.testing.assert_allclose([state["t"], state["momentum"]], [t, m], rtol=1e-5)
    nothing = objective.next_state(
        state, {"loss": losses_of(0.0, 0.0), "step": jnp.array([5, 5])}
    )
    np.testing.assert_allclose(nothing["t"], state["t"])


def losses_of(value, count=3.0):
    """The loss of two microbatches, as the step stacks it."""
    from distilljax import Mean

    return Mean(jnp.array([value * count, 0.0]), jnp.array([count, 0.0]))


@pytest.mark.parametrize("in_place", [False, True], ids=["pure", "nnx"])
def test_taid_in_the_step_is_the_same_with_microbatches(in_place):
    objective = Sum({"taid": TAID(num_steps=5, rate=0.5), "ce": CrossEntropy()})
    teacher = nnx.Linear(5, 3, rngs=nnx.Rngs(1))
    batch = {**BATCH, "loss_mask": jnp.arange(8) % 3 != 1}
    found = []
    for accumulate in (1, 2):
        student = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        tx = optax.sgd(0.1)
        if in_place:
            step = make_distill_step(objective, teacher, accumulate=accumulate)
            optimizer = nnx.Optimizer(student, tx, wrt=nnx.Param)
            for _ in range(2):
                step(student, optimizer, batch)
            # saved, and loaded into a new step, as `ema` is
            saved = jax.tree.map(np.array, step.objective_state)
            again = make_distill_step(objective, teacher, accumulate=accumulate)
            again.load_objective_state(saved)
            for other in ({"x": 1}, None, jax.tree.map(lambda x: x[None], saved)):
                with pytest.raises(ValueError, match="state must have arrays as those"):
                    again.load_objective_state(other)
            again(student, optimizer, batch)
            found.append(again.objective_state)
            assert step._in_place.compiled._cache_size() == 1
        else:
            step = make_distill_step(
                objective, teacher, student=student, tx=tx, accumulate=accumulate
            )
            state = step.init(student)
            for _ in range(3):
                state, _ = step.pure(state, step.teacher_state, batch)
            found.append(state.objective_state)
            assert step.pure._cache_size() == 1
    assert float(found[0]["taid"]["t"]) > 0.4 + 0.6 * 2 / 5 - 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TAID(), "num_steps must be at least 1 without interpolation"),
        (lambda: TAID(num_steps=1, start=2.0), r"start must lie in \[0, 1\]"),
        (lambda: TAID(interpolation=1.5), r"interpolation must lie in \[0, 1\]"),
        (lambda: TAID(num_steps=1, temperature=0.0), "temperature must be positive"),
        (lambda: Sum({}), "at least one objective"),
        (lambda: TAID(num_steps=1, start=0.9, end=0.5), r"start must be at most end"),
        (lambda: TAID(num_steps=1, rate=-1.0), r"TAID: rate must lie in \[0, inf\]"),
        (lambda: TAID(num_steps=1, weight=float("nan")), "weight must be finite"),
        (
            lambda: TAID(num_steps=1, divergence=losses.logit_mse),
            "TAID: divergence must take a temperature, got logit_mse",
        ),
        (
            lambda: TAID(num_steps=1, divergence=losses.decoupled_kd),
            "TAID: divergence must need no other options.*which needs labels",
        ),
        (lambda: Sum({"a": LogitKD()}, {"b": 1.0}), "weights must name parts, a"),
        (
            lambda: Sum({"a": LogitKD()}, {"a": float("nan")}),
            r"Sum: weights\['a'\] must be finite, got nan",
        ),
        (lambda: MeanOfProbabilities({"a": -1.0}), r"weights\['a'\] must lie in"),
        (lambda: MeanOfLogits({"a": float("inf")}), r"weights\['a'\] must be finite"),
        (lambda: Routed(()), "names must be a tuple of at least one teacher"),
        (lambda: HardDistillation(kd_weight=float("nan")), "kd_weight must be finite"),
        (lambda: HardDistillation(label_smoothing=2.0), r"label_smoothing must lie in"),
        (lambda: CrossEntropy(label_smoothing=-1.0), "label_smoothing must lie in"),
        (lambda: LogitKD(ce_weight=-1.0), r"ce_weight must lie in \[0, inf\]"),
        (lambda: FeatureKD({"h": "h"}, weight=float("nan")), "weight must be finite"),
    ],
)
def test_bad_settings_are_said_when_the_config_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_that_changes_its_form_is_refused():
    class Growing:
        def init_state(self):
            return jnp.zeros(1)

        def __call__(self, student, teacher, batch, *, state):
            return {"x": Term(student.logits[:, 0])}, None

        def next_state(self, state, seen):
            return jnp.concatenate([state, state])

    student = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    step = make_distill_step(Growing(), student=student, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"next_state must have arrays as those"):
        step.pure(step.init(student), None, BATCH)


# --- sums -----------------------------------------------------------------------------


def test_a_sum_weighs_its_parts_by_number_or_schedule():
    objective = Sum(
        {"soft": LogitKD(temperature=2.0), "hard": CrossEntropy()},
        {"soft": 0.5, "hard": lambda step: 0.1 * step},
    )
    batch = {"labels": jnp.array([0, 2]), "step": 3}
    loss, metrics = reduce_terms(objective(STUDENT, TEACHERS["a"], batch))
    expected = 0.5 * 4 * metrics["soft/kd"].value + 0.3 * metrics["hard/ce"].value
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert objective.uses_teacher
    assert not Sum({"hard": CrossEntropy()}).uses_teacher
