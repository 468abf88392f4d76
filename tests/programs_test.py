from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import grain
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import data, objectives, students
from distilljax.config import load_experiment
from distilljax.programs import Programs, batch_shapes, check_sizes
from distilljax.sharding import Rule, batch_sharding, mesh_from_string
from distilljax.terms import Outputs
from tests.meshes import pieces

TINY = Path(__file__).parent / "cli" / "tiny.py"


@pytest.fixture
def tiny():
    return load_experiment(TINY).config(0)


@pytest.fixture
def mesh():
    return mesh_from_string("data=2", jax.devices()[:2])


def test_seeds_and_data_share_everything_compiled(tiny, mesh):
    programs = Programs()
    first = programs.training(tiny, mesh)
    other = replace(tiny, seed=1, data=replace(tiny.data, seed=5), steps=7)
    assert programs.training(other, mesh) is first
    assert programs.student(other, mesh) is programs.student(tiny, mesh)


@pytest.mark.parametrize(
    "change",
    [
        {"objective": objectives.CrossEntropy()},
        {"accumulate": 2},
        {"ema_decay": 0.9},
        {"compute_dtype": "bfloat16"},
        {"student_rules": (Rule("kernel", (None, None)),)},
        {"mesh": "data=-1,fsdp=1"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_step_is_another_step(tiny, mesh, change):
    programs = Programs()
    first = programs.training(tiny, mesh)
    assert programs.training(replace(tiny, **change), mesh) is not first


def test_arms_share_the_teacher_and_the_evaluation(tiny, mesh):
    programs = Programs()
    arm = replace(tiny, objective=objectives.CrossEntropy())
    assert programs.training(arm, mesh) is not programs.training(tiny, mesh)
    assert programs.student(arm, mesh) is programs.student(tiny, mesh)
    assert programs.teacher(arm, mesh) is programs.teacher(tiny, mesh)


def test_an_objective_without_a_teacher_does_not_pay_for_one(tiny, mesh):
    programs = Programs()
    arm = replace(tiny, objective=objectives.CrossEntropy())
    assert programs.training(arm, mesh).step.teacher_apply is None
    assert programs.training(tiny, mesh).step.teacher_apply is not None


def test_a_teacher_is_put_onto_the_mesh_once(tiny):
    """A teacher that was built on one device would be sent again in every step."""
    mesh = mesh_from_string("data=2,fsdp=4")
    config = replace(tiny, teacher=replace(tiny.teacher, width=256))
    programs = Programs()
    teacher = programs.teacher(config, mesh)
    state = programs.training(config, mesh).step.teacher_state
    for x in jax.tree.leaves(state):
        assert x.sharding.device_set == set(mesh.devices.flat)
    kernel = state["layers"][0]["kernel"]
    assert kernel.shape == (8, 256)
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 64)
    fresh = nnx.to_pure_dict(nnx.state(config.teacher()))
    jax.tree.map(np.testing.assert_array_equal, state, fresh)
    assert (
        teacher.fingerprint
        == Programs()
        .teacher(config, mesh_from_string("data=1", jax.devices()[:1]))
        .fingerprint
    )


def test_what_an_objective_owns_is_placed_with_the_rest(tiny):
    """A projection and its moments are parameters; of a queue each device reads all."""
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    hint = objectives.FeatureKD(
        {"layers/0": "layers/0"}, projection=students.Projection(64, 32)
    )
    crowd = objectives.ContrastiveKD(
        "layers/0", "layers/0", 64, 32, width=32, queue_size=64
    )
    config = replace(
        tiny,
        student=replace(tiny.student, hidden=(64,)),
        teacher=replace(tiny.teacher, width=32),
        objective=objectives.Sum({"hint": hint, "crowd": crowd}),
        student_rules=(Rule("hint/.*/projection/kernel", (None, "tensor")),),
        ema_decay=0.9,
    )
    with jax.set_mesh(mesh):
        state = Programs().training(config, mesh).init(0)
    moments = [optax.tree.get(state.opt_state, name) for name in ("mu", "nu")]
    for tree in (state.params, state.ema, *moments):
        own = tree["objective"]
        by_rule = own["hint"]["layers/0"]["projection"]["kernel"]
        assert pieces(by_rule) == {(64, 16)}
        assert pieces(own["crowd"]["projection"]["kernel"]) == {(32, 32)}  # over fsdp
        assert pieces(own["crowd"]["projection"]["bias"]) == {(32,)}
    assert pieces(state.objective_state["crowd"]["queue"].features) == {(64, 32)}


EVALUATED = []


def counted_teacher(model, batch):
    """As it is, and every time that it runs is counted."""
    jax.debug.callback(lambda: EVALUATED.append(None))
    return model(batch["inputs"])


def test_a_frozen_teacher_is_evaluated_once_on_each_source(tiny, monkeypatch):
    mesh = mesh_from_string("data=1", jax.devices()[:1])
    tiny = replace(tiny, teacher_forward=counted_teacher)
    programs = Programs()
    student = programs.student(tiny, mesh)

    def evaluations(config, part, seed=0):
        """How often the teacher ran, and what was found."""
        EVALUATED.clear()
        state = programs.training(tiny, mesh).init(seed)
        source = programs.source(part, config.loader)
        found = student.evaluate(config, state.params, state.rest, source)
        jax.effects_barrier()
        return len(EVALUATED), found

    batches, first = evaluations(tiny, tiny.validation)
    assert batches == 3
    again, other = evaluations(tiny, tiny.validation, seed=1)
    assert again == 0
    assert other.teacher == first.teacher
    assert other.student["kl_to_teacher"] != first.student["kl_to_teacher"]
    np.testing.assert_array_equal(other.teacher_predictions, first.teacher_predictions)
    teacher, validation = tiny.teacher(), tiny.validation()
    predicted = np.argmax(teacher(jax.numpy.asarray(validation.inputs)), axis=-1)
    np.testing.assert_array_equal(first.teacher_predictions, predicted)

    # other examples, or the same as the teacher has not seen them
    assert evaluations(tiny, tiny.test)[0] == 3
    scaled = replace(tiny, loader=replace(tiny.loader, scale=9.0))
    assert evaluations(scaled, tiny.validation)[0] == 3
    # and what is too much to be kept
    monkeypatch.setattr("distilljax.pair.KEPT_BYTES", 500)
    assert [evaluations(tiny, tiny.data)[0] for _ in range(2)] == [3, 3]


def features_alone(model, batch):
    return Outputs(features={"hidden": batch["inputs"]})


def test_a_student_is_measured_beside_a_teacher_without_logits(tiny):
    mesh = mesh_from_string("data=1", jax.devices()[:1])
    objective = objectives.CrossEntropy()
    config = replace(tiny, teacher_forward=features_alone, objective=objective)
    programs = Programs()
    state = programs.training(config, mesh).init(0)
    student = programs.student(config, mesh)
    source = programs.source(config.test, config.loader)
    found, _ = student.measure(config, state.params, state.rest, source)
    assert found["teacher"] is None
    assert found["student"]["parameters"] > 0


OPENED = []


@dataclass(frozen=True)
class Counted:
    """Counts how often it is opened."""

    def __call__(self):
        OPENED.append(None)
        return [{"inputs": np.zeros(2, np.uint8), "labels": 0}]


def test_sources_are_opened_once_and_kept_as_the_loader_says():
    programs = Programs()
    assert isinstance(programs.source(Counted()), data.Arrays)
    assert programs.source(Counted()) is programs.source(Counted())
    assert len(OPENED) == 1
    assert isinstance(programs.source(Counted(), data.Loader(1, in_memory=False)), list)
    assert len(OPENED) == 2
    # what transforms have not seen yet may be of several sizes
    transforms = (grain.transforms.Map,)
    for fields in ({"transforms": transforms}, {"eval_transforms": transforms}):
        assert isinstance(programs.source(Counted(), data.Loader(1, **fields)), list)


@pytest.mark.parametrize(
    ("mesh", "batch", "evaluation", "accumulate", "message"),
    [
        ("data=2", 16, 16, 1, None),
        ("data=2,fsdp=4", 16, 8, 2, None),
        ("data=2,tensor=4", 2, 2, 1, None),  # tensor does not split the batch
        ("data=2,fsdp=4", 12, 16, 1, "loader.batch_size"),
        ("data=2,fsdp=4", 16, 12, 1, "eval_batch_size"),
        ("data=2,fsdp=4", 24, 16, 2, "accumulate=2"),
    ],
)
def test_batches_must_divide(tiny, mesh, batch, evaluation, accumulate, message):
    config = replace(
        tiny,
        loader=data.Loader(batch_size=batch),
        eval_batch_size=evaluation,
        accumulate=accumulate,
    )
    count = 2 if mesh == "data=2" else 8
    mesh = mesh_from_string(mesh, jax.devices()[:count])
    if message is None:
        check_sizes(config, mesh)
    else:
        with pytest.raises(ValueError, match=message):
            check_sizes(config, mesh)


def narrow(rngs):
    return nnx.Linear(4, 3, rngs=rngs)


def test_what_a_model_raises_says_what_it_was_given(tiny, mesh):
    """A model of one's own, whose error knows nothing of the data."""
    config = replace(tiny, student=narrow)
    student = Programs().student(config, mesh)
    batch = batch_shapes({"inputs": np.zeros((16, 8), np.float32)})
    with pytest.raises(TypeError) as error:
        student.num_classes(batch)
    note = "(The student was called with a batch of inputs (16, 8).)"
    assert note in error.value.__notes__


def test_shapes_of_a_batch_are_those_that_are_sent(tiny):
    mesh = mesh_from_string("data=8")
    batch = next(tiny.loader(tiny.data(), seed=0))
    sent, _ = next(data.prefetch_to_device([batch], batch_sharding(mesh)))
    shapes = batch_shapes(batch)
    assert {k: (x.shape, x.dtype) for k, x in sent.items()} == {
        k: (x.shape, x.dtype) for k, x in shapes.items()
    }
