"""A plan is of the step that is trained: its bytes, its operations, its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import jax
import numpy as np
import pytest

from distilljax import data, models, objectives, students
from distilljax.config import Config, load_experiment, to_json
from distilljax.planning import open_topology, plan
from distilljax.planning.hlo import Program
from distilljax.planning.page import page
from distilljax.planning.words import gib, lines
from distilljax.programs import Programs
from distilljax.sharding import mesh_from_string
from distilljax.teachers import Placed
from distilljax.workdir import TrainedRun
from tests.planning.small import SMALL, language_model, needs_libtpu

RECIPES = Path(__file__).resolve().parents[2] / "configs/lm"


def test_owners_are_what_a_run_holds_on_a_device(here):
    """Compared with arrays that are there, device by device."""
    config = language_model()
    mesh = mesh_from_string(config.mesh)
    programs = Programs()
    with jax.set_mesh(mesh):
        training = programs.training(config, mesh)
        state = training.init(0)
        teacher = programs.teacher(config, mesh).state

    def held(tree) -> int:
        device = mesh.devices.flat[0]
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        return sum(s.data.nbytes for s in shards if s.device == device)

    owners = here.programs["step"].memory.owners
    assert owners["teacher parameters"] == held(teacher)
    assert owners["student parameters"] == held((state.params, state.rest))
    assert owners["optimizer state"] == held(state.opt_state)
    # two rows of 64 tokens, four integers and a mask
    assert owners["batch"] == 8 // 4 * 64 * (4 * 4 + 1)


def test_operations_are_those_of_the_models(here):
    """2 per parameter and token, but for the embedding; and attention, half of T^2."""
    tokens, width, vocabulary = 8 * 64, 32, 264
    layer = 2 * tokens * (4 * width * width + 3 * width * 48)
    # blocks of scores are whole: one of 64 x 64, forward
    attention = 2 * 2 * tokens * 64 * width
    head = 2 * tokens * width * vocabulary
    assert here.flops.teacher == 4 * (layer + attention) + head
    assert here.flops.student == 3 * (2 * (layer + attention) + head)
    assert here.flops.executed >= here.flops.model


def test_what_is_sent_is_named_by_its_axes(here):
    sent = here.programs["step"].sent
    assert {axis for one in sent for axis in one.axes} == {"fsdp", "tensor"}
    # neither the logits of all tokens nor a kernel along the classes
    assert all(shape.size < 8 * 64 * 264 // 8 for one in sent for shape in one.shapes
               if one.kind == "all-gather")  # fmt: skip


def test_a_plan_is_said_printed_and_drawn(here):
    said = "\n".join(lines(here))
    result = json.loads(json.dumps(here.to_json()))
    drawn = page(result)
    for owner in ("teacher parameters", "optimizer state", "gradients"):
        assert owner in said
        assert owner in drawn
    assert "8 devices of this machine" in said
    assert result["chip"] is None
    assert result["seconds"] is None  # nobody knows what this CPU can do
    assert result["fits"] is None  # nor how much of its memory there is for it
    sent = here.programs["step"].sent_by_part
    assert sent["teacher"] > 0
    assert f"of all that: teacher {gib(sent['teacher'])}, student" in said
    assert f"Of all that: teacher {gib(sent['teacher'])}, student" in drawn
    assert "its compiler says" not in drawn  # on a CPU it states no peak
    assert "in 1 parts" not in drawn
    assert drawn.startswith("<!doctype html>")
    assert "http" not in drawn  # it needs no other file


@pytest.mark.parametrize(
    ("programs", "fits"),
    [
        ((True, True), True),
        ((True, None), None),
        ((None, None), None),
        ((True, False), False),
        ((None, False), False),
    ],
)
def test_a_plan_fits_if_all_its_programs_are_known_to(here, programs, fits):
    used = here.programs["step"].memory.allocated
    limits = {True: used, False: used - 1, None: None}
    step, teacher = (replace(here.programs["step"], limit=limits[x]) for x in programs)
    assert replace(here, programs={"step": step, "teacher": teacher}).fits is fits


@pytest.mark.slow
def test_a_streamed_teacher_is_a_program_of_its_own():
    teacher = students.Untrained(replace(SMALL, num_layers=4))
    config = language_model(
        teacher=Placed(teacher, mesh="tensor=2"),
        mesh="data=6",
        loader=data.Loader(batch_size=12),
        eval_batch_size=12,
    )
    found = plan(config)
    assert {n: prod(p.mesh.values()) for n, p in found.programs.items()} == {
        "step": 6,
        "teacher": 2,
    }
    step, own = (found.programs[name].memory.owners for name in ("step", "teacher"))
    # of the teacher the student's devices have its head
    assert step["teacher parameters"] == pytest.approx(32 * 264 * 4, abs=8)
    assert own["teacher parameters"] > 3 * step["teacher parameters"]
    # in the teacher's own program all that is sent is the teacher's
    sent = found.programs["teacher"].sent_by_part
    assert {part for part, nbytes in sent.items() if nbytes} == {"teacher"}
    assert found.programs["step"].sent_by_part["teacher"] == 0
    # hidden states come with the batch: 2 rows, 64 tokens, 32 channels
    assert step["batch"] == 2 * 64 * (4 * 4 + 1) + 2 * 64 * 32 * 4


@pytest.mark.parametrize(
    ("topology", "rule"),
    [
        ("v5p", "GENERATION:SHAPE"),
        ("v9:2x2", "GENERATION:SHAPE"),
        ("h100:8", "GENERATION:SHAPE"),
        ("v4:2x2x2", "GENERATION:SHAPE"),
        ("v5e:4x4x4", "have 2 dimensions for v5e"),
        ("v5p:4x4", "have 3 dimensions for v5p"),
        ("cpu:900", "at most 8 devices"),
    ],
)
def test_what_is_no_topology_is_refused(topology, rule):
    with pytest.raises(ValueError, match=rule):
        open_topology(topology)


@needs_libtpu
def test_a_slice_that_the_compiler_does_not_know_is_refused():
    with pytest.raises(ValueError, match="be a slice that the TPU's compiler knows"):
        open_topology("v5e:3x5")


def test_a_batch_that_does_not_divide_is_refused_before_any_compilation():
    with pytest.raises(ValueError, match="be a multiple of data x fsdp = 4"):
        plan(language_model(loader=data.Loader(batch_size=6)))


@pytest.mark.slow
def test_pretrained_models_are_planned_without_their_files():
    named = students.Pretrained("nobody/has-this", scan=True, shape=SMALL)
    config = language_model(student=students.Copied(named), teacher=named)
    found = plan(config)
    assert found.flops.student == 3 * found.flops.teacher


def test_a_trained_run_is_planned_as_the_teacher_from_its_config_alone(tmp_path):
    """Its checkpoints are not read: only what its student was."""
    student = models.MLP(num_features=4, hidden=(16,), num_classes=3)
    (tmp_path / "config.json").write_text(json.dumps({"student": to_json(student)}))
    config = Config(
        name="taught",
        student=models.MLP(num_features=4, hidden=(8,), num_classes=3),
        teacher=TrainedRun(str(tmp_path)),
        objective=objectives.LogitKD(),
        data=data.Arrays(np.zeros((16, 4), np.float32), np.zeros(16, np.int64)),
        loader=data.Loader(batch_size=16),
        eval_batch_size=16,
        steps=1,
    )
    found = plan(config)
    assert found.flops.teacher == 2 * 16 * (4 * 16 + 16 * 3)
    owners = found.programs["step"].memory.owners
    assert owners["teacher parameters"] == 4 * (4 * 16 + 16 + 16 * 3 + 3)


@needs_libtpu
@pytest.mark.slow
def test_a_recipe_compiles_for_a_slice_that_is_not_here():
    """The smallest form of a recipe, with the kernels of a TPU."""
    config = load_experiment(RECIPES / "gemma2_9b_to_2b.py").arms(0)["smoke"]
    found = plan(replace(config, mesh="fsdp=2,tensor=2"), "v5e:2x2")
    step = found.programs["step"]
    assert found.fits
    assert step.limit == 15.75 * 2**30
    assert step.roofline.bound_by in ("compute", "memory", "interconnect")
    assert found.seconds[0] <= found.seconds[1]
    assert found.to_json()["versions"]["libtpu"]
    assert {axis for one in step.sent for axis in one.axes} <= {"fsdp", "tensor"}


@needs_libtpu
@pytest.mark.slow
def test_the_walk_finds_the_peak_and_the_facts_of_a_program_compiled_now():
    """As for the pods in benchmarks/scale.py, whose results are older than the code."""
    sizes = replace(
        SMALL, vocab_size=32_000, width=1024, num_layers=4, num_heads=8, head_dim=128,
        num_kv_heads=4, ffn_width=2816,
    )  # fmt: skip
    config = language_model(
        student=replace(sizes, width=512, num_layers=2, num_heads=4),
        teacher=students.Untrained(sizes),
        mesh="fsdp=2,tensor=2",
    )
    context = 1280  # no width of either model
    config = replace(config, data=replace(config.data, context=context))
    found = plan(config, "v5e:2x2")
    memory = found.programs["step"].memory
    assert memory.predicted_peak > 200e6
    assert memory.predicted_peak == pytest.approx(memory.peak, rel=0.05)
    program = Program(found.programs["step"].text)
    shapes = [
        shape
        for name in program.times
        if name not in program.inside_fusions
        for one in program.computations[name].instructions.values()
        for shape in one.shapes
    ]
    assert any(context in shape.dims for shape in shapes)
    assert not [s for s in shapes if sum(n == context for n in s.dims) > 1]
    logits = 4 * context * 32_000 // 2  # of a device: four rows, half of the classes
    assert not [
        s for s in shapes if {32_000, 16_000} & set(s.dims) and s.size >= logits
    ]


LARGE = """
from distilljax import data, models, objectives
from distilljax.config import Config
import numpy as np


def config(seed=0):
    images = data.Arrays(np.zeros((8, 32768), np.float32), np.zeros(8, np.int64))
    return Config(
        name="large",
        student=models.MLP(num_features=32768, hidden=(131072,), num_classes=10),
        objective=objectives.CrossEntropy(),
        data=images,
        loader=data.Loader(batch_size=8, in_memory=True),
        eval_batch_size=8,
        steps=1,
        seed=seed,
    )
"""


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_an_answer(tmp_path):
    """16 GiB of parameters, and three times that with the optimizer's, on 16 GiB."""
    path = tmp_path / "large.py"
    path.write_text(LARGE)
    done = subprocess.run(
        [sys.executable, "-m", "distilljax", "plan", path, "--topology", "v5e:2x2",
         "--out", tmp_path / "out"],
        capture_output=True, text=True, timeout=300, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "out/plan.json").read_text())
    step = result["programs"]["step"]
    assert not result["fits"]
    assert step["needs"] > 3 * 16 * 2**30
    assert step["owners"]["student parameters"] == 4 * (
        32768 * 131072 + 131072 * 11 + 10
    )
    assert "does not fit" in (tmp_path / "out/plan.html").read_text()


def test_arrays_of_a_config_are_looked_at_for_their_shapes():
    images = data.Arrays(np.zeros((16, 4), np.float32), np.zeros(16, np.int64))
    config = Config(
        name="images",
        student=models.MLP(num_features=4, hidden=(8,), num_classes=3),
        objective=objectives.CrossEntropy(),
        data=images,
        loader=data.Loader(batch_size=16),
        eval_batch_size=16,
        steps=1,
    )
    found = plan(config)
    assert found.flops.student == 3 * 2 * 16 * (4 * 8 + 8 * 3)
    assert found.flops.teacher == 0
    assert found.programs["step"].memory.owners["teacher parameters"] == 0
