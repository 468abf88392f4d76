"""The step. What these tests protect:

the mask and the padding change nothing; accumulation and sharding change nothing; the
teacher is frozen, is never copied, gets no gradient and stays sharded; what is not
trainable does not move; one compilation for a run, whatever the schedules do; the same
step for NNX modules in graph and in tree mode, for Flax Linen and for a plain function.
"""

from __future__ import annotations

import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import Mean, Outputs, Term, losses, make_distill_step, objectives
from distilljax.models import ConvNet
from distilljax.optimizers import Linear
from distilljax.sharding import Rule, batch_sharding, mesh_from_string
from distilljax.terms import DIAGNOSTICS, split_heads
from tests.meshes import assert_close, assert_placed, pieces, sharded


class Net(nnx.Module):
    """Two layers, with BatchNorm and dropout if asked for."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, norm=False, dropout=0.0):
        self.inner = nnx.Linear(8, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        x = self.inner(x)
        x = x if self.norm is None else self.norm(x)
        x = nnx.relu(x)
        x = x if self.dropout is None else self.dropout(x)
        return self.head(x)


def make_batch(size=16, seed=0):
    key = jax.random.key(seed)
    return {
        "inputs": jax.random.normal(key, (size, 8)),
        "labels": jax.random.randint(jax.random.fold_in(key, 1), (size,), 0, 4),
        "loss_mask": jnp.arange(size) % 5 != 1,  # uneven over any split
    }


@pytest.fixture
def teacher():
    return Net(32, nnx.Rngs(1))


BOTH = objectives.LogitKD(temperature=3.0, ce_weight=0.5)


def make_state(step, student, **kwargs):
    return step.init(student, **kwargs)


def run(objective, teacher, student, batch, *, steps=1, tx=None, **kwargs):
    """Some steps of the pure layer; the state and the last metrics."""
    tx = optax.sgd(0.1) if tx is None else tx
    step = make_distill_step(objective, teacher, student=student, tx=tx, **kwargs)
    state = step.init(student)
    metrics = {}
    for _ in range(steps):
        state, metrics = step.pure(state, step.teacher_state, batch)
    return state, metrics


# --- the loss and its gradient --------------------------------------------------------


def test_equals_a_hand_written_step(teacher):
    batch, student = make_batch(), Net(6, nnx.Rngs(0))
    state, metrics = run(BOTH, teacher, student, batch)

    graphdef, params = nnx.split(student)
    mask = batch["loss_mask"]

    def loss(params):
        z = nnx.merge(graphdef, params)(batch["inputs"])
        v = teacher(batch["inputs"])
        p, log_q = jax.nn.softmax(v / 3), jax.nn.log_softmax(z / 3)
        kd = 9 * jnp.sum(p * (jnp.log(p) - log_q), axis=-1)
        log_q = jax.nn.log_softmax(z)
        ce = -jnp.take_along_axis(log_q, batch["labels"][:, None], axis=-1)[:, 0]
        return jnp.sum((kd + 0.5 * ce) * mask) / jnp.sum(mask)

    value, grads = jax.value_and_grad(loss)(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert_close(metrics["loss"].value, value)
    assert_close(state.params, nnx.to_pure_dict(expected))
    assert_close(metrics["grad_norm"].value, optax.tree.norm(grads))


def test_metrics_are_sums_and_counts_of_what_is_valid(teacher):
    batch = make_batch()
    _, metrics = run(BOTH, teacher, Net(6, nnx.Rngs(0)), batch)
    valid = float(batch["loss_mask"].sum())
    names = {"kd", "ce", "kl", "accuracy", "agreement"}
    names |= {"student_entropy", "teacher_entropy"}
    assert set(metrics) == names | {"loss", "grad_norm"}
    assert {float(metrics[name].count) for name in names} == {valid}
    loss = 9 * metrics["kd"].value + 0.5 * metrics["ce"].value
    assert_close(metrics["loss"].value, loss)
    assert 0 <= float(metrics["accuracy"].sum) <= valid


def test_padding_changes_nothing(teacher):
    batch = make_batch()
    loud = jnp.where(batch["loss_mask"][:, None], batch["inputs"], 1e6)
    padded = batch | {"inputs": loud, "labels": jnp.where(batch["loss_mask"], 0, -100)}
    batch = batch | {"labels": jnp.zeros_like(batch["labels"])}
    student = Net(6, nnx.Rngs(0))
    clean, _ = run(BOTH, teacher, student, batch)
    dirty, _ = run(BOTH, teacher, student, padded)
    assert_close(dirty.params, clean.params)


def test_a_batch_in_which_nothing_counts_changes_nothing(teacher):
    student = Net(6, nnx.Rngs(0))
    batch = make_batch() | {"loss_mask": jnp.zeros(16, bool)}
    state, metrics = run(BOTH, teacher, student, batch)
    assert float(metrics["loss"].value) == 0.0
    assert_close(state.params, nnx.to_pure_dict(nnx.state(student)), rtol=0)


def test_a_mask_is_no_weight():
    values = jnp.array([1.0, 2.0, 6.0])
    assert Term(values, jnp.array([0.5, 0.0, 2.0])).mean() == Mean(7.0, 2.0)


def test_the_mean_of_a_term_may_be_made_by_the_loss():
    values = jnp.array([1.0, 2.0, 6.0])
    assert Term(Mean(3.0, 2.0)).mean() == Mean(3.0, 2.0)
    assert float(Term(values).mean().value) == 3.0
    with pytest.raises(ValueError, match="where must be None when values is a Mean"):
        Term(Mean(3.0, 2.0), where=values > 1).mean()


def test_terms_may_not_hide_what_is_always_logged(teacher):
    for name in ("kl", "loss"):
        with pytest.raises(ValueError, match=rf"names of terms.*got \['{name}'\]"):
            run(
                lambda s, t, b, name=name: {name: Term(s.logits.sum(-1))},
                teacher,
                Net(6, nnx.Rngs(0)),
                make_batch(),
            )


def test_an_objective_returns_terms_by_name():
    for wrong in (lambda s, t, b: s.logits.sum(), lambda s, t, b: {"x": s.logits}):
        with pytest.raises(TypeError, match="terms must map names to Term, got"):
            run(wrong, None, Net(6, nnx.Rngs(0)), make_batch())


def test_an_objective_without_terms_is_refused():
    with pytest.raises(ValueError, match="must have at least one term"):
        run(lambda s, t, b: {}, None, Net(6, nnx.Rngs(0)), make_batch())


# --- accumulation ---------------------------------------------------------------------


def two_masks(student, teacher, batch):
    """Two terms with different masks: each needs its own denominator."""
    kd = losses.forward_kl(student.logits, teacher.logits, where=batch["loss_mask"])
    easy = batch["labels"] < 2
    ce = losses.cross_entropy(student.logits, batch["labels"], where=easy)
    return {"kd": Term(kd, batch["loss_mask"]), "ce": Term(ce, easy, 0.3)}


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulation_is_exact_with_unequal_masks(teacher, accumulate):
    student, batch = Net(6, nnx.Rngs(0)), make_batch()
    # every microbatch has another count, and one of them has none at all
    batch["loss_mask"] = (jnp.arange(16) % 4 != 1) & (jnp.arange(16) > 2)
    whole, expected = run(two_masks, teacher, student, batch, steps=3)
    parts, metrics = run(
        two_masks, teacher, student, batch, steps=3, accumulate=accumulate
    )
    assert_close(parts.params, whole.params)
    assert_close(metrics, expected)


def test_the_counting_pass_runs_no_model(teacher):
    """The denominators come from the masks: the compiler drops the forward passes."""

    def dots(accumulate):
        step = make_distill_step(
            two_masks,
            teacher,
            student=(student := Net(6, nnx.Rngs(0))),
            tx=optax.sgd(0.1),
            accumulate=accumulate,
        )
        lowered = step.pure.lower(step.init(student), step.teacher_state, make_batch())
        return len(re.findall(r" dot\(", lowered.compile().as_text()))

    assert dots(4) == dots(1) > 0


def test_a_mask_that_depends_on_the_teacher_stays_exact(teacher):
    def confident(student, teacher, batch):
        where = jax.nn.softmax(teacher.logits).max(-1) > 0.4
        values = losses.forward_kl(student.logits, teacher.logits, where=where)
        return {"kd": Term(values, where)}

    student, batch = Net(6, nnx.Rngs(0)), make_batch()
    whole, _ = run(confident, teacher, student, batch)
    parts, metrics = run(confident, teacher, student, batch, accumulate=4)
    assert 0 < float(metrics["kd"].count) < 16
    assert_close(parts.params, whole.params)


def test_accumulate_must_divide_the_batch(teacher):
    with pytest.raises(ValueError, match=r"divisible by accumulate=3, got 16"):
        run(BOTH, teacher, Net(6, nnx.Rngs(0)), make_batch(), accumulate=3)
    scalar = make_batch() | {"weight": jnp.ones(())}
    with pytest.raises(ValueError, match="must have a batch axis where accumulate=2"):
        run(BOTH, teacher, Net(6, nnx.Rngs(0)), scalar, accumulate=2)
    for bad in (0, 2.5):
        with pytest.raises(ValueError, match=f"accumulate must be .*, got {bad}"):
            inspect.unwrap(make_distill_step)(BOTH, teacher, accumulate=bad)


@pytest.mark.parametrize("key", ["step", "teacher"])
def test_a_key_that_would_be_overwritten_is_refused(teacher, key):
    batch = make_batch() | {key: jnp.zeros(16)}
    with pytest.raises(ValueError, match=rf"must not have the keys .*got \['{key}'\]"):
        run(BOTH, teacher, Net(6, nnx.Rngs(0)), batch)


# --- the teacher ----------------------------------------------------------------------


def test_the_teacher_is_in_inference_mode_and_does_not_change():
    teacher = Net(32, nnx.Rngs(1), norm=True, dropout=0.5)
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(teacher)))
    student, batch = Net(6, nnx.Rngs(0)), make_batch()
    step = make_distill_step(BOTH, teacher, student=student, tx=optax.sgd(0.1))
    buffers = [x.unsafe_buffer_pointer() for x in _arrays(step.teacher_state)]
    state, seen = step.init(student), []
    for _ in range(3):
        state, metrics = step.pure(state, step.teacher_state, batch)
        seen.append(float(metrics["teacher_entropy"].value))
    assert len(set(seen)) == 1  # no dropout, no drift of the statistics
    after = [x.unsafe_buffer_pointer() for x in _arrays(step.teacher_state)]
    assert buffers == after  # the same buffers: never copied, never returned
    same = jax.tree.map(_equal, before, nnx.as_pure(nnx.state(teacher)))
    assert all(jax.tree.leaves(same))
    assert teacher.dropout.deterministic is False  # nor is the user's module touched


def _arrays(tree):
    return [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]


def _equal(a, b):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return bool(jnp.array_equal(a, b))


def test_the_teacher_gets_no_gradient():
    """Even where student and teacher are the same function of the same parameters."""
    weights = jnp.ones((8, 4)) * jnp.arange(4.0)

    def loss(teacher_state, state):
        step = make_distill_step(
            BOTH,
            teacher_state,
            teacher_forward=lambda w, batch: batch["inputs"] @ w,
            student_forward=lambda w, batch: batch["inputs"] @ w,
            tx=optax.sgd(0.1),
        )
        return step.pure(state, teacher_state, make_batch())[1]["loss"].value

    step = make_distill_step(
        BOTH, weights, teacher_forward=lambda w, b: w, tx=optax.sgd(1)
    )
    state = step.init(jnp.zeros((8, 4)))
    assert float(loss(weights, state)) > 0
    grad = jax.grad(loss)(weights, step.init(jnp.zeros((8, 4))))
    assert not grad.any()


def test_signals_in_the_batch_replace_the_teacher(teacher):
    student, batch = Net(6, nnx.Rngs(0)), make_batch()
    inline, expected = run(BOTH, teacher, student, batch)
    signal = Outputs(logits=teacher(batch["inputs"]))
    given, metrics = run(BOTH, None, student, batch | {"teacher": signal}, accumulate=2)
    assert_close(given.params, inline.params)
    assert_close(metrics, expected)
    _, bare = run(BOTH, None, student, batch | {"teacher": signal.logits})
    assert_close(bare, expected)


def test_the_teacher_may_have_a_view_of_its_own(teacher):
    student, batch = Net(6, nnx.Rngs(0)), make_batch()
    view = batch | {"teacher_inputs": batch["inputs"] + 1.0}
    _, same = run(BOTH, teacher, student, batch)
    _, other = run(BOTH, teacher, student, view)
    assert same["student_entropy"] == other["student_entropy"]
    assert same["teacher_entropy"] != other["teacher_entropy"]


def test_a_teacher_that_is_no_module_needs_a_forward():
    with pytest.raises(TypeError, match=r"teacher must be an nnx\.Module unless"):
        make_distill_step(BOTH, {"kernel": jnp.ones(3)})


# --- the student ----------------------------------------------------------------------


def test_batch_statistics_and_dropout_of_the_student_move_on(teacher):
    student = Net(6, nnx.Rngs(0), norm=True, dropout=0.5)
    student.eval()  # the step trains in training mode whatever the module is in
    batch = make_batch()
    state, first = run(BOTH, teacher, student, batch, tx=optax.sgd(0.0))
    again, second = run(BOTH, teacher, student, batch, tx=optax.sgd(0.0), steps=2)
    assert first["loss"] != second["loss"]  # other dropout, same parameters
    assert int(state.rest["dropout"]["rngs"]["count"]) == 1
    assert int(again.rest["dropout"]["rngs"]["count"]) == 2
    mean = student.inner(batch["inputs"]).mean(0)
    assert_close(state.rest["norm"]["mean"], 0.01 * mean, rtol=1e-4, atol=1e-6)


def test_a_module_in_inference_mode_is_trained_in_training_mode(teacher):
    def one_step(mode):
        student = Net(6, nnx.Rngs(0), norm=True, dropout=0.5)
        getattr(student, mode)()
        optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
        metrics = make_distill_step(BOTH, teacher)(student, optimizer, make_batch())
        assert student.dropout.deterministic is (mode == "eval")  # as it was
        return float(metrics["loss"].value), student.norm.mean[...]

    (loss, mean), (other_loss, other_mean) = one_step("train"), one_step("eval")
    assert loss == other_loss
    np.testing.assert_array_equal(mean, other_mean)
    assert mean.any()


def test_only_what_is_trainable_moves(teacher):
    student = Net(6, nnx.Rngs(0), norm=True)
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    state, _ = run(BOTH, teacher, student, make_batch(), trainable=head, steps=2)
    assert set(state.params) == {"head"}
    before = nnx.to_pure_dict(nnx.state(student, nnx.Param))
    assert_close(state.rest["inner"], before["inner"], rtol=0, atol=0)
    moved = jnp.abs(state.params["head"]["kernel"] - before["head"]["kernel"])
    assert float(moved.max()) > 0


def test_bfloat16_compute_keeps_float32_parameters(teacher):
    student, batch = Net(6, nnx.Rngs(0), dropout=1e-6), make_batch()
    exact, expected = run(BOTH, teacher, student, batch)
    step = make_distill_step(
        BOTH,
        teacher,
        student=student,
        tx=optax.sgd(0.1),
        compute_dtype=jnp.bfloat16,
    )
    state = step.init(student)
    text = step.pure.lower(state, step.teacher_state, batch).as_text()
    products = re.findall(r"dot_general.*?: \((.*?)\) ->", text)
    assert products
    assert all("bf16" in types for types in products)
    state, metrics = step.pure(state, step.teacher_state, batch)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert_close(metrics["loss"].value, expected["loss"].value, rtol=2e-2)
    assert_close(state.params, exact.params, rtol=0, atol=2e-2)


def test_batch_statistics_stay_float32_under_bfloat16_compute():
    student = ConvNet(num_classes=4, channels=(4, 6))(nnx.Rngs(0))
    batch = make_batch() | {"inputs": jnp.ones((16, 8, 8, 1))}
    kwargs = {"student": student, "tx": optax.sgd(0.1), "compute_dtype": jnp.bfloat16}
    step = make_distill_step(objectives.CrossEntropy(), None, **kwargs)
    text = step.pure.lower(step.init(student), None, batch).as_text()
    convolutions = re.findall(r"convolution.*?: \((.*?)\) ->", text)
    assert convolutions
    assert all("bf16" in types for types in convolutions)
    state, _ = step.pure(step.init(student), None, batch)
    assert {x.dtype for x in jax.tree.leaves(state.rest)} == {jnp.dtype("float32")}


def test_batch_statistics_of_the_teacher_stay_float32():
    seen = []

    def forward(model, batch):
        seen.append((model.inner.kernel.dtype, model.norm.mean.dtype))
        return model(batch["inputs"])

    teacher = Net(6, nnx.Rngs(1), norm=True)
    kwargs = {"compute_dtype": jnp.bfloat16, "teacher_forward": forward}
    run(BOTH, teacher, Net(6, nnx.Rngs(0)), make_batch(), **kwargs)
    assert set(seen) == {(jnp.dtype("bfloat16"), jnp.dtype("float32"))}


def test_the_moving_average_follows_the_parameters(teacher):
    student, batch = Net(6, nnx.Rngs(0)), make_batch()
    average = nnx.to_pure_dict(nnx.state(student))
    for steps in (1, 2, 3):
        state, _ = run(BOTH, teacher, student, batch, steps=steps, ema_decay=0.9)
        average = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, average, state.params)
        assert_close(state.ema, average)
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\), got 1.0"):
        make_distill_step(BOTH, teacher, ema_decay=1.0)


def test_a_step_keeps_the_moving_average_of_one_student(teacher):
    def make(seed):
        student = Net(6, nnx.Rngs(seed))
        return student, nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)

    step = make_distill_step(BOTH, teacher, ema_decay=0.5)
    student, optimizer = make(0)
    step(student, optimizer, make_batch())
    now, saved = step.ema, jax.tree.map(np.array, step.ema)
    with pytest.raises(ValueError, match="must be the one whose moving average"):
        step(*make(1), make_batch())
    # a loop that was resumed: the same average as one that was not
    resumed = make_distill_step(BOTH, teacher, ema_decay=0.5)
    resumed.load_ema(saved)
    copies = make(0)
    nnx.update(copies[0], jax.tree.map(jnp.copy, nnx.state(student)))
    step(student, optimizer, make_batch())
    resumed(*copies, make_batch())
    assert_close(resumed.ema, step.ema)
    assert_close(now, saved)  # what was looked at is not donated to the next step


# --- compilation ----------------------------------------------------------------------


def test_schedules_do_not_recompile(teacher):
    objective = objectives.LogitKD(
        temperature=Linear(1.0, 5.0, num_steps=4),
        kd_weight=Linear(1.0, 0.0, num_steps=2),
        ce_weight=Linear(0.0, 1.0, num_steps=2),
    )
    student, batch = Net(6, nnx.Rngs(0)), make_batch()
    step = make_distill_step(objective, teacher, student=student, tx=optax.adam(1e-2))
    state = step.init(student)
    for i in range(5):
        state, metrics = step.pure(state, step.teacher_state, batch)
        weight = min(i / 2, 1.0)
        kd = (1 - weight) * (1.0 + min(i, 4)) ** 2 * metrics["kd"].value
        assert_close(metrics["loss"].value, kd + weight * metrics["ce"].value)
    assert step.pure._cache_size() == 1


def test_the_state_is_donated(teacher):
    student = Net(6, nnx.Rngs(0))
    step = make_distill_step(BOTH, teacher, student=student, tx=optax.adam(1e-2))
    state = step.init(student)
    state = jax.tree.map(jnp.copy, state)  # the module keeps its own arrays
    step.pure(state, step.teacher_state, make_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.opt_state))
    assert not any(x.is_deleted() for x in _arrays(step.teacher_state))


# --- sharding -------------------------------------------------------------------------


TENSOR = (
    Rule("inner/kernel", ("fsdp", "tensor")),
    Rule("inner/bias", ("tensor",)),
    Rule("head/kernel", ("tensor", None)),
)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("data=8", ()),
        ("data=2,fsdp=4", ()),
        ("data=2,fsdp=2,tensor=2", TENSOR),
        ("data=2,fsdp=2,tensor=2", (Rule("kernel", ("fsdp", "tensor")),)),
    ],
)
def test_eight_devices_equal_one(teacher, mesh, rules, accumulate):
    student, batch = Net(16, nnx.Rngs(0)), make_batch()
    one, expected, _ = sharded("data=1", BOTH, teacher, student, batch, devices=1)
    eight, metrics, shardings = sharded(
        mesh, BOTH, teacher, student, batch, rules, accumulate=accumulate
    )
    assert_close(metrics, expected, rtol=1e-5, atol=1e-6)
    assert_close(eight.params, one.params, rtol=1e-5, atol=1e-6)
    assert_placed(eight, shardings)
    kernel = eight.opt_state[0].mu["inner"]["kernel"]
    parts = {"data=8": 1, "data=2,fsdp=4": 4, "data=2,fsdp=2,tensor=2": 4}[mesh]
    assert {np.prod(p) * parts for p in pieces(kernel)} == {kernel.size}


def test_the_outputs_of_the_teacher_are_sharded_as_the_batch(teacher):
    """Not replicated: on a pod [batch, time, vocabulary] would not fit one device."""
    found = []

    def objective(student, teacher, batch):
        jax.debug.inspect_array_sharding(teacher.logits, callback=found.append)
        return BOTH(student, teacher, batch)

    sharded(
        "data=2,fsdp=2,tensor=2",
        objective,
        teacher,
        Net(16, nnx.Rngs(0)),
        make_batch(),
        TENSOR,
    )
    assert found
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    wanted = batch_sharding(mesh)
    for sharding in found:
        assert sharding.is_equivalent_to(wanted, 2)


# --- every kind of model --------------------------------------------------------------


@pytest.mark.parametrize("graph", [True, False])
def test_nnx_modules_are_updated_in_place_in_both_modes(teacher, graph):
    batch = make_batch()
    expected, metrics = run(
        BOTH, teacher, Net(6, nnx.Rngs(0)), batch, steps=3, tx=optax.adam(1e-2)
    )
    with nnx.set_graph_mode(graph):
        student = Net(6, nnx.Rngs(0))
        optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
        step = make_distill_step(BOTH, teacher, ema_decay=0.5)
        assert step.ema is None
        for _ in range(3):
            found = step(student, optimizer, batch)
    assert_close(found, metrics)
    assert_close(nnx.to_pure_dict(nnx.state(student)), expected.params)
    assert int(optimizer.step[...]) == 3
    assert int(optimizer.opt_state[0].count[...]) == 3
    assert step._in_place.compiled._cache_size() == 1
    assert jax.tree.structure(step.ema) == jax.tree.structure(
        nnx.as_pure(nnx.state(student))
    )


def test_the_optimizer_and_the_step_must_agree_on_what_is_trained(teacher):
    student = Net(6, nnx.Rngs(0))
    head = nnx.PathContains("head")
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=head)
    with pytest.raises(
        ValueError, match=r"optimizer\.wrt must be the step's trainable"
    ):
        make_distill_step(BOTH, teacher)(student, optimizer, make_batch())
    make_distill_step(BOTH, teacher, trainable=head)(student, optimizer, make_batch())


def test_a_student_that_shares_arrays_with_its_teacher_is_refused(teacher):
    student = nnx.clone(teacher)
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    step = make_distill_step(BOTH, teacher)
    with pytest.raises(ValueError, match="must not share arrays with the teacher"):
        step(student, optimizer, make_batch())
    nnx.update(student, jax.tree.map(jnp.copy, nnx.state(student)))  # as it says
    step(student, optimizer, make_batch())
    assert not any(x.is_deleted() for x in jax.tree.leaves(nnx.state(teacher)))


def test_a_plain_function_is_a_student_and_a_teacher(teacher):
    """The same numbers as the NNX module that computes the same."""
    batch, student = make_batch(), Net(6, nnx.Rngs(0))
    expected, metrics = run(BOTH, teacher, student, batch, steps=2)

    def apply(params, batch):
        x = batch["inputs"] @ params["inner"]["kernel"] + params["inner"]["bias"]
        return nnx.relu(x) @ params["head"]["kernel"] + params["head"]["bias"]

    step = make_distill_step(
        BOTH,
        nnx.to_pure_dict(nnx.state(teacher)),
        teacher_forward=apply,
        student_forward=apply,
        tx=optax.sgd(0.1),
    )
    state = step.init(nnx.to_pure_dict(nnx.state(student)))
    for _ in range(2):
        state, found = step.pure(state, step.teacher_state, batch)
    assert_close(state.params, expected.params)
    assert_close(found, metrics)


class LinenNet(nn.Module):
    """Flax Linen, with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x)))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(x))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_flax_linen_with_batch_statistics_and_dropout(accumulate):
    model, batch = LinenNet(), make_batch()
    variables = model.init(jax.random.key(0), batch["inputs"], train=False)

    def student_forward(params, rest, batch, rng):
        logits, updated = model.apply(
            {"params": params, **rest},
            batch["inputs"],
            train=True,
            rngs={"dropout": rng},
            mutable=["batch_stats"],
        )
        return logits, updated

    step = make_distill_step(
        BOTH,
        variables,
        teacher_forward=lambda v, batch: model.apply(v, batch["inputs"], train=False),
        student_forward=student_forward,
        tx=optax.sgd(0.0),
        accumulate=accumulate,
    )

    def losses_of(seed):
        state = step.init(
            jax.tree.map(jnp.copy, variables["params"]),
            rest={"batch_stats": jax.tree.map(jnp.copy, variables["batch_stats"])},
            rng=jax.random.key(seed, impl="rbg" if accumulate > 1 else None),
        )
        found = []
        for _ in range(2):
            state, metrics = step.pure(state, step.teacher_state, batch)
            found.append(float(metrics["loss"].value))
        return found, state

    first, state = losses_of(0)
    assert first == losses_of(0)[0] != losses_of(1)[0]
    assert first[0] != first[1]  # another step, another dropout
    statistics = state.rest["batch_stats"]["BatchNorm_0"]["mean"]
    assert jnp.abs(statistics).max() > 0
    assert not step.teacher_state["batch_stats"]["BatchNorm_0"]["mean"].any()


def test_a_model_of_tokens_is_called_with_positions_and_segments():
    class Tokens(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)

        def __call__(self, tokens, positions=None, segment_ids=None):
            assert positions is None
            assert segment_ids is not None
            return self.embed(tokens)

    batch = {
        "tokens": jnp.arange(12).reshape(2, 6) % 7,
        "segment_ids": jnp.ones((2, 6), jnp.int32),
        "labels": jnp.zeros((2, 6), jnp.int32),
    }
    _, metrics = run(objectives.CrossEntropy(), None, Tokens(nnx.Rngs(0)), batch)
    assert float(metrics["ce"].count) == 12
    with pytest.raises(ValueError, match=r"batch must have 'inputs' or 'tokens', got"):
        run(
            objectives.CrossEntropy(), None, Tokens(nnx.Rngs(0)), {"x": batch["tokens"]}
        )


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_was_sown_is_not_kept(teacher):
    class Sows(Net):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", x)
            return super().__call__(x)

    state, _ = run(BOTH, teacher, Sows(6, nnx.Rngs(0)), make_batch(), steps=2)
    assert state.rest == {}


def test_the_pure_layer_needs_an_optimizer(teacher):
    step = make_distill_step(BOTH, teacher, student=Net(6, nnx.Rngs(0)))
    with pytest.raises(ValueError, match="tx must be given to make_distill_step"):
        step.init(Net(6, nnx.Rngs(0)))
    step = make_distill_step(BOTH, teacher, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="student must be given to make_distill_step"):
        step.init(Net(6, nnx.Rngs(0)))


# --- Heads ---------------------------------------------------------------------------


class Decoder(nnx.Module):
    """Tied embeddings; its outputs are a head, or the logits that it would make."""

    def __init__(self, width, as_head, rngs):
        self.embedding = nnx.Embed(50, width, rngs=rngs)
        self.as_head = as_head

    def __call__(self, tokens, positions=None, segment_ids=None):
        hidden = jnp.tanh(self.embedding(tokens))
        kernel = self.embedding.embedding[...].T
        head = losses.LinearHead(hidden, kernel, softcap=5.0)
        return Outputs(head if self.as_head else head.logits())


def test_a_step_over_heads_is_the_step_over_logits():
    """With accumulation and unequal masks; the metrics come out of the fused pass."""
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 50, (4, 9))),
        "labels": jnp.asarray(rng.integers(0, 50, (4, 9))),
        "loss_mask": jnp.asarray(rng.random((4, 9)) > np.array([[0.1], [0.9]] * 2)),
    }
    objective = objectives.LogitKD(temperature=2.0, ce_weight=0.3)
    results = []
    for as_head, accumulate in ((False, 1), (True, 1), (True, 2)):
        student = Decoder(4, as_head, nnx.Rngs(0))
        teacher = Decoder(6, as_head, nnx.Rngs(1))
        step = make_distill_step(objective, teacher, accumulate=accumulate)
        optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
        metrics = step(student, optimizer, batch)
        values = {name: mean.value for name, mean in metrics.items()}
        results.append((values, student.embedding.embedding[...]))
    expected, weights = results[0]
    for values, found in results[1:]:
        assert values.keys() == expected.keys() | {"logit_kd"}
        for name, value in expected.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_head", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_diagnostics_less_is_computed_of_the_same_step(as_head, accumulate):
    """Entropies and the likeliest classes are read by nobody then, and compiled out."""
    rng = np.random.default_rng(0)
    tokens, labels = jnp.asarray(rng.integers(0, 50, (2, 4, 9)))
    batch = {"tokens": tokens, "labels": labels}
    student, teacher = (Decoder(4, as_head, nnx.Rngs(i)) for i in range(2))
    found = {}
    for diagnostics in (True, False):
        step = make_distill_step(
            objectives.LogitKD(temperature=2.0, ce_weight=0.3),
            teacher,
            student=student,
            tx=optax.sgd(0.1),
            accumulate=accumulate,
            diagnostics=diagnostics,
        )
        state = step.init(student)
        compiled = step.pure.lower(state, step.teacher_state, batch).compile()
        flops = compiled.cost_analysis()["flops"]
        found[diagnostics] = (flops, *compiled(state, step.teacher_state, batch))
    (more, *whole), (fewer, *bare) = found[True], found[False]
    assert fewer < more
    assert_close(bare[0].params, whole[0].params)
    terms = {"logit_kd"} if as_head else set()
    assert set(bare[1]) == {"kd", "ce", "loss", "grad_norm"} | terms
    assert set(whole[1]) - set(bare[1]) == DIAGNOSTICS
    for name, mean in bare[1].items():
        assert_close(mean.value, whole[1][name].value)


def test_terms_may_have_names_of_diagnostics_that_there_are_none_of(teacher):
    """Without logits of both there is no KL to hide: a term of that name is logged."""

    def objective(student, teacher, batch):
        return {"kl": Term(jnp.square(student.logits).sum(-1), batch["loss_mask"])}

    for diagnostics in (True, False):
        how = {"diagnostics": diagnostics, "tx": optax.sgd(0.1)}
        _, found = run(objective, None, Net(6, nnx.Rngs(0)), make_batch(), **how)
        assert found["kl"].value == found["loss"].value
        assert ("student_entropy" in found) == diagnostics


@pytest.mark.parametrize("accumulate", [1, 4])
def test_outputs_in_the_batch_are_as_good_as_a_teacher_in_the_step(accumulate):
    """A provider sends hidden states; the kernel stays with the step."""
    key = jax.random.key(3)
    hidden, kernel = jax.random.normal(key, (16, 8)), jax.random.normal(key, (8, 4))
    batch = make_batch()

    def forward(_, batch):
        del batch
        return Outputs(losses.LinearHead(hidden, kernel, scale=0.5))

    def update(teacher, batch, **how):
        student = Net(16, nnx.Rngs(0))
        optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
        objective = objectives.LogitKD(temperature=2.0)
        step = make_distill_step(objective, teacher, accumulate=accumulate, **how)
        metrics = step(student, optimizer, batch)
        return nnx.state(student, nnx.Param), metrics

    sent, head = split_heads(forward(None, None))
    assert sent.logits.kernel is None
    assert head.hidden is None
    got, metrics = update(None, {**batch, "teacher": sent}, teacher_head=head)
    if accumulate == 1:
        want, _ = update({}, batch, teacher_forward=forward)
    else:
        want, _ = update(None, {**batch, "teacher": Outputs(head_of(sent, head))})
    assert_close(got, want)
    assert float(metrics["kl"].value) > 0


def head_of(sent, head):
    return losses.LinearHead(sent.logits.hidden, head.kernel, scale=head.scale).logits()
