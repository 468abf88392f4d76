"""A config's teacher on devices of its own, or with a sharding of its own."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import data, objectives
from distilljax.caching import cache
from distilljax.cli import main
from distilljax.config import load_experiment
from distilljax.metrics import Window
from distilljax.programs import Programs, check_sizes
from distilljax.sharding import Rule, mesh_from_string
from distilljax.teachers import CachedTeacher, Dense, Placed, Provider
from distilljax.teachers.placed import beside, teacher_meshes
from distilljax.teachers.streamed import Stream
from distilljax.terms import Outputs, Term
from distilljax.train import evaluate, train
from tests.meshes import pieces
from tests.saved import losses, records, saved_arrays, saved_steps

TINY = Path(__file__).parents[1] / "cli" / "tiny.py"
PLACING = Path(__file__).with_name("placing.py")
RULES = (Rule("layers/0/kernel", (None, "tensor")),)


def shortened(config):
    student = replace(config.student, dropout=0.0)
    teacher = replace(config.teacher, width=16)
    rules = {"teacher_rules": RULES}
    return replace(
        config, steps=6, eval_every_steps=3, student=student, teacher=teacher, **rules
    )


@pytest.fixture(scope="module")
def tiny():
    return shortened(load_experiment(TINY).config(0))


@pytest.fixture(scope="module")
def inline(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("inline")
    return workdir, train(tiny, workdir)


def assert_same_losses(one, other):
    assert losses(one).keys() == losses(other).keys()
    for step, loss in losses(one).items():
        assert losses(other)[step] == pytest.approx(loss, rel=1e-5)


PLACES = [
    {"mesh": "tensor=4"},
    {"mesh": "data=2,tensor=2", "devices": "4:8", "depth": 3},
    {"mesh": "tensor=8", "devices": "all"},
    {"mesh": "tensor=8", "in_step": True},
]


@pytest.mark.parametrize("fields", PLACES, ids=lambda fields: str([*fields.values()]))
def test_a_placed_teacher_teaches_the_same(tmp_path, tiny, inline, fields, capsys):
    """Losses, the measures of both models, and who it is."""
    config = replace(tiny, teacher=Placed(tiny.teacher, **fields))
    results = train(config, tmp_path)
    workdir, expected = inline
    assert_same_losses(workdir, tmp_path)
    for who in ("student", "teacher"):
        for name in ("nll", "accuracy", "kl_to_teacher", "parameters", "bytes"):
            if expected[who].get(name) is not None:
                assert results[who][name] == pytest.approx(expected[who][name], 1e-5)
        assert results[who]["latency_ms"]["median"] > 0
    assert results["teacher_fingerprint"] == expected["teacher_fingerprint"]
    away = not fields.get("in_step")
    assert results["teacher_bytes_per_token"] == (12 if away else None)
    assert ("12 bytes per token cross" in capsys.readouterr().err) == away
    found = evaluate(config, tmp_path, split="test")
    assert found["teacher"]["nll"] == pytest.approx(expected["teacher"]["nll"], 1e-5)


def test_where_student_teacher_and_outputs_lie(tiny):
    teacher = Placed(tiny.teacher, "tensor=4")
    config = replace(tiny, teacher=teacher)
    programs = Programs()
    mesh = mesh_from_string(config.mesh, **beside(config.teacher, config.mesh))
    assert [d.id for d in mesh.devices.flat] == [0, 1, 2, 3]
    loaded = programs.teacher(config, mesh)
    kernel = loaded.module.layers[0].kernel[...]
    assert {d.id for d in kernel.sharding.device_set} == {4, 5, 6, 7}
    assert pieces(kernel) == {(8, 4)}  # by the rule, over the teacher's own axis
    with jax.set_mesh(mesh):
        source = programs.source(config.data, config.loader)
        provider = programs.provider(config, mesh, source)
        assert isinstance(provider, Provider)
        assert provider is programs.provider(replace(config, seed=1), mesh, source)
        training = programs.training(config, mesh, provider)
        assert training.step.teacher_state is None  # no head, and no weights
        batches = data.prefetch_to_device(
            config.loader(source, seed=0), provider.sharding
        )
        batch, _ = next(provider.on_devices(batches))
    assert pieces(batch["teacher"].logits) == {(4, 3)}
    assert batch["teacher"].logits.sharding.device_set == set(mesh.devices.flat)
    labels = replace(config, objective=objectives.CrossEntropy())
    assert programs.provider(labels, mesh, source) is None


def test_its_own_sharding_in_one_program_is_that_of_its_mesh(tiny):
    config = replace(tiny, teacher=Placed(tiny.teacher, "tensor=8", in_step=True))
    programs, mesh = Programs(), mesh_from_string("data=8")
    assert programs.provider(config, mesh, []) is None
    with jax.set_mesh(mesh):
        training = programs.training(config, mesh)
    kernel = training.step.teacher_state["layers"][0]["kernel"]
    assert pieces(kernel) == {(8, 2)}
    assert programs.teacher(config, mesh).mesh.shape["tensor"] == 8


# --- the command line -----------------------------------------------------------------


def run(workdir, *words):
    return main(["train", str(PLACING), "--workdir", str(workdir), *words])


def test_arms_with_one_teacher_and_with_two(tmp_path, capsys):
    """Each on its own devices; and whoever needs none has none."""
    words = ["--steps=4", "--eval-every-steps=2", "--loader.batch-size=16"]
    assert run(tmp_path / "placed", "--seeds=0", *words) == 0
    said = capsys.readouterr().err
    assert "the teacher on 4 devices (tensor=4), others; 12 bytes per token" in said
    assert "teacher 'a' on 2 devices (tensor=2), teacher 'b' on 2 devices" in said
    results = {
        arm: json.loads((tmp_path / "placed" / arm / "seed_0/results.json").read_text())
        for arm in ("hard_labels", "one", "two")
    }
    per_token = {arm: r["teacher_bytes_per_token"] for arm, r in results.items()}
    assert per_token == {"hard_labels": None, "one": 12, "two": 24}
    # the same teachers in the student's step
    config = load_experiment(PLACING).arms(0)["two"]
    teachers = {name: placed.teacher for name, placed in config.teacher.items()}
    config = replace(config, teacher=teachers, steps=4, eval_every_steps=2)
    expected = train(config, tmp_path / "inline")
    assert_same_losses(tmp_path / "inline", tmp_path / "placed/two/seed_0")
    assert results["two"]["teacher_fingerprint"] == expected["teacher_fingerprint"]
    nll = expected["teacher"]["nll"]
    assert results["two"]["teacher"]["nll"] == pytest.approx(nll, rel=1e-5)


def test_devices_are_chosen_on_the_command_line(tmp_path, capsys):
    words = ["--steps=2", "--teacher.devices", "6:8", "--teacher.mesh=data=2"]
    words += ["--loader.batch-size=12", "--eval-batch-size=12", "--mesh=data=6"]
    assert run(tmp_path / "away", *words) == 0
    assert "the teacher on 2 devices (data=2)" in capsys.readouterr().err
    words[1:4] = ["--teacher.in-step", "True", "--teacher.mesh=tensor=8"]
    words[-3:] = ["--loader.batch-size=16"]
    assert run(tmp_path / "in_step", *words) == 0
    assert "bytes per token" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher.devices=4:12:0"], "--teacher.devices must be slices of the 8"),
        (["--teacher.devices", "8:9"], "--teacher.devices must be slices of the 8"),
        (["--teacher.devices", "4:8,6:7"], "devices that do not overlap"),
        (["--teacher.devices", "four"], "--teacher.devices must be slices of the 8"),
        (["--teacher.devices", "4:6"], "multiply to the number of devices, 2"),
        (["--teacher.mesh", "tensor=8"], "--teacher.mesh must leave devices to the"),
        (["--teacher.mesh", "tensor=-1"], "--teacher.mesh must say how many devices"),
        (["--teacher.mesh", "model=4"], "be sizes of the axes data, fsdp, tensor"),
        (["--mesh", "data=2"], "--mesh must use the devices that no teacher has, 4 of"),
        (["--mesh", "data=8"], "--mesh must use the devices that no teacher has, 4 of"),
        (["--teacher.devices", "0:8"], "--mesh must use the devices that no teacher"),
        (["--loader.batch-size", "12", "--teacher.mesh", "tensor=5"], "multiple of"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_placed_is_refused(tmp_path, words, message, capsys):
    assert run(tmp_path / "new", *words) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_fields_that_contradict_each_other_are_refused(tiny):
    with pytest.raises(ValueError, match="Placed: depth must be at least 1, got 0"):
        Placed(tiny.teacher, depth=0)
    with pytest.raises(ValueError, match='Placed: devices must be "all" for a teacher'):
        Placed(tiny.teacher, in_step=True, devices="4:8")


def test_teachers_do_not_share_devices_and_are_not_mixed(tiny):
    def refused(teachers, message):
        with pytest.raises(ValueError, match=message):
            beside(teachers, "data=-1")

    one = Placed(tiny.teacher, "tensor=2", devices="4:6")
    refused({"a": one, "b": one}, "--teacher.b.devices must name devices that no other")
    refused({"a": one, "b": tiny.teacher}, "each be Placed, or none of them, got .'b'")
    in_step = Placed(tiny.teacher, "tensor=8", in_step=True)
    refused({"a": one, "b": in_step}, "all be part of the student's step, or none")
    config = replace(tiny, teacher=Placed(tiny.teacher, "tensor=3"))
    mesh = mesh_from_string("data=-1", jax.devices()[:5])
    config = replace(config, loader=data.Loader(batch_size=5), eval_batch_size=15)
    with pytest.raises(ValueError, match="multiple of the teacher's devices, 3, got 5"):
        check_sizes(config, mesh)


def test_a_known_student_leaves_the_rest(tiny):
    teacher = Placed(tiny.teacher, "data=2,tensor=-1")
    (found,) = teacher_meshes(
        teacher, "data=2", mesh_from_string("data=2", **beside(teacher, "data=2"))
    ).values()
    assert [d.id for d in found.devices.flat] == [2, 3, 4, 5, 6, 7]
    assert dict(found.shape) == {"data": 2, "fsdp": 1, "tensor": 3}


# --- stopping and going on ------------------------------------------------------------


def assert_same_run(a, b, step):
    left, right = saved_arrays(a, step), saved_arrays(b, step)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)
    assert losses(a) == losses(b)
    assert len(losses(a)) == step


def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path, tiny):
    """What the teacher had already seen is not what the student has been trained on."""
    teacher = Placed(tiny.teacher, "tensor=4", depth=3)
    config = replace(tiny, teacher=teacher, steps=8, checkpoint_every_steps=4)
    programs = Programs()
    train(config, tmp_path / "whole", programs=programs)
    half = replace(config, steps=4)
    train(half, tmp_path / "half", programs=programs)
    train(config, tmp_path / "half", programs=programs)
    assert_same_run(tmp_path / "whole", tmp_path / "half", 8)


def test_sigterm_while_it_streams_saves_and_the_same_command_goes_on(
    tmp_path, tiny, monkeypatch
):
    teacher = Placed(tiny.teacher, "tensor=4", depth=2)
    config = replace(tiny, teacher=teacher, steps=8, eval_every_steps=8)
    programs = Programs()
    train(config, tmp_path / "whole", programs=programs)
    taken, original = [], Stream.__next__

    def signalled(stream):
        taken.append(None)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(stream)

    monkeypatch.setattr(Stream, "__next__", signalled)
    stopped = train(config, tmp_path / "stopped", programs=programs)
    assert stopped == {"stopped_at": 3}
    assert saved_steps(tmp_path / "stopped") == [3]
    train(config, tmp_path / "stopped", programs=programs)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 8)
    assert [r["step"] for r in records(tmp_path / "stopped")] == list(range(1, 9))


# --- features, and the teacher's own view ---------------------------------------------


def with_features(model, batch):
    """What an encoder does: features that not every objective wants."""
    x = batch.get("teacher_inputs", batch["inputs"])
    z = model(x)
    return Outputs(z, {"large": jnp.tile(x, 50), "wanted": jnp.tanh(z)})


def own_objective(student, teacher, batch):
    """One that names nothing, and reads a feature."""
    values = jnp.mean((jnp.tanh(student.logits) - teacher.features["wanted"]) ** 2, -1)
    return {"own": Term(values)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_features_that_are_not_read_do_not_travel(tmp_path, tiny, accumulate):
    objective = objectives.Sum({"kd": objectives.LogitKD(), "own": own_objective})
    config = replace(
        tiny,
        teacher_forward=with_features,
        objective=objective,
        accumulate=accumulate,
        validation=None,
        test=None,
        select=None,
        mesh="data=-1" if accumulate == 1 else "data=4",
    )
    placed = replace(config, teacher=Placed(tiny.teacher, "tensor=4"))
    results = train(placed, tmp_path / "placed")
    assert results["teacher_bytes_per_token"] == 2 * 12  # logits, and a feature of 3
    config = replace(config, mesh="data=8" if accumulate == 1 else "data=4,tensor=2")
    train(config, tmp_path / "inline")
    assert_same_losses(tmp_path / "inline", tmp_path / "placed")
    in_step = Placed(tiny.teacher, "tensor=8", in_step=True)
    train(replace(config, teacher=in_step), tmp_path / "in_step")
    assert_same_losses(tmp_path / "inline", tmp_path / "in_step")


def test_a_placed_teacher_can_be_asked_for_a_store(tmp_path, tiny):
    """Where nobody trains beside it, it has all devices."""
    config = replace(tiny, teacher=Placed(tiny.teacher, "tensor=4"))
    cache(config, tmp_path / "store", logits=Dense())
    stored = CachedTeacher(str(tmp_path / "store"), teacher=config.teacher)
    train(replace(config, teacher=stored), tmp_path / "stored")
    train(tiny, tmp_path / "inline")
    assert_same_losses(tmp_path / "inline", tmp_path / "stored")


# --- the loop -------------------------------------------------------------------------


def test_the_host_is_no_further_ahead_than_the_teacher(tiny, monkeypatch):
    """On real devices it may be 8 steps ahead; with outputs in memory, `depth`."""
    monkeypatch.setattr("distilljax.metrics.max_lead", lambda: 8)
    assert Window()._max_lead == 8
    assert Window(lead=2)._max_lead == 2
    monkeypatch.setattr("distilljax.metrics.max_lead", lambda: 0)
    assert Window(lead=2)._max_lead == 0
