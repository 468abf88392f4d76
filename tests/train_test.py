from __future__ import annotations

import functools
import itertools
import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax import data, models, objectives, optimizers, students
from distilljax.checkpoints import Checkpoints
from distilljax.config import Config, load_experiment
from distilljax.metrics import NonFiniteError, Window
from distilljax.programs import Programs, Training
from distilljax.sharding import Rule, mesh_from_string
from distilljax.together import StopSignal
from distilljax.train import SELECTABLE, evaluate, train
from distilljax.workdir import TrainedRun
from tests.saved import losses, records, saved_arrays

TINY = Path(__file__).parent / "cli" / "tiny.py"


@pytest.fixture(scope="module")
def programs() -> Programs:
    """Shared: what is compiled for one test is compiled for all."""
    return Programs()


@pytest.fixture
def tiny() -> Config:
    return load_experiment(TINY).config(0)


@pytest.fixture(autouse=True)
def one_device(request, monkeypatch):
    """On one device, unless a test uses `all_devices`: compiling is much faster."""
    if "all_devices" not in request.fixturenames:
        only = jax.devices()[:1]
        monkeypatch.setattr(
            "distilljax.train.mesh_from_string",
            lambda text: mesh_from_string(text, only),
        )


@pytest.fixture
def all_devices():
    """On the eight simulated ones."""


def assert_same_run(a: Path, b: Path, step: int) -> None:
    """Bit for bit: every array, and every loss on the way."""
    left, right = saved_arrays(a, step), saved_arrays(b, step)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)
    assert losses(a) == losses(b)
    assert len(losses(a)) == step


# --- what a run leaves ----------------------------------------------------------------


def test_a_run_leaves_what_it_says(tmp_path, tiny, programs):
    results = train(tiny, tmp_path, programs=programs, arm="distilled")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["arm"] == "distilled"
    assert results["steps"] == 20
    assert results["examples_seen"] == 20 * 16
    assert results["num_examples"] == 40
    assert results["student"]["accuracy"] > 0.8 > results["teacher"]["accuracy"]
    with np.load(tmp_path / "predictions.npz") as predictions:
        correct = predictions["student"] == predictions["labels"]
        assert correct.mean() == pytest.approx(results["student"]["accuracy"])
        assert predictions["teacher"].shape == (40,)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.json",
        "events.jsonl",
        "metrics.jsonl",
        "predictions.npz",
        "results.json",
        "tensorboard",
    }
    validated = {r["step"]: r["accuracy"] for r in records(tmp_path, "validation")}
    assert validated.keys() == {10, 20}
    selected = results["selected"]
    assert selected["metric"] == "validation/accuracy"
    assert selected["value"] == max(validated.values()) == validated[selected["step"]]


def test_metrics_are_fetched_when_the_next_step_is_on_its_way(
    tmp_path, tiny, monkeypatch
):
    """Or the devices would wait for the host; what is saved is known to be finite."""
    seen: list[tuple[str, int]] = []
    made = Training.update.func

    def update(self):
        inner, count = made(self), itertools.count(1)

        def counted(state, batch):
            seen.append(("sent", next(count)))
            return inner(state, batch)

        return counted

    def read(self, real=Window.read):
        if self._closed is not None:
            seen.append(("read", self._closed[0][-1][0]))
        return real(self)

    monkeypatch.setattr(Training, "update", functools.cached_property(update))
    Training.update.__set_name__(Training, "update")
    monkeypatch.setattr(Window, "read", read)
    monkeypatch.setattr("distilljax.metrics.max_lead", lambda: 8)
    config = replace(tiny, log_every_steps=3, checkpoint_every_steps=12)
    train(config, tmp_path)
    waited = {10, 12, 20}  # validated, saved, the last
    told = [step for what, step in seen if what == "read"]
    assert told == [3, 6, 9, 10, 12, 15, 18, 20]
    for at, (what, step) in enumerate(seen):
        if what == "read":
            assert (("sent", step + 1) in seen[:at]) == (step not in waited), step
            assert ("sent", step + 2) not in seen[:at]


def test_a_run_may_leave_out_what_no_loss_needs_and_change_its_mind(tmp_path, tiny):
    """A run may be taken up with or without; both are the same up to rounding.

    They are two programs: where another sum needs an array too, XLA may fuse, and so
    order, the loss's own sum in another way (some versions do).
    """
    for name, first in (("with", True), ("without", False)):
        config = replace(tiny, diagnostics=first)
        train(replace(config, steps=10), tmp_path / name)
        train(replace(config, diagnostics=not first), tmp_path / name)
    left, right = (saved_arrays(tmp_path / name, 20) for name in ("with", "without"))
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_allclose(
            left[path], right[path], rtol=1e-5, atol=1e-6, err_msg=path
        )
    expected = pytest.approx(losses(tmp_path / "without"), rel=1e-5)
    assert losses(tmp_path / "with") == expected
    logged = {r["step"]: "accuracy" in r for r in records(tmp_path / "without")}
    assert logged == {step: step > 10 for step in range(1, 21)}


def test_a_run_writes_these_names(tmp_path, tiny, programs):
    """A metric that is computed and dropped is missed by nobody, until it is needed."""
    train(tiny, tmp_path, programs=programs)
    first, second = records(tmp_path)[:2]
    assert set(first) == {
        "step",
        "split",
        "seconds",
        "loss",
        "kd",
        "ce",
        "kl",
        "grad_norm",
        "accuracy",
        "agreement",
        "student_entropy",
        "teacher_entropy",
        "examples_per_second",
        "examples_per_second_per_chip",
        "flops_per_second_per_chip",
        "goodput",
        "share_data",
        "share_startup",
        "share_step",
    }
    assert set(first) - set(second) == {"share_startup"}
    assert first["step"] == 1
    assert second["seconds"] > first["seconds"]
    # loss = kd_weight T^2 kd + ce_weight ce, of tiny.py
    assert first["loss"] == pytest.approx(0.1 * 4 * first["kd"] + first["ce"], rel=1e-5)
    validated = records(tmp_path, "validation")[0]
    assert set(validated) == {"step", "split", "seconds", *SELECTABLE}


def test_tensorboard_has_the_same_numbers(tmp_path, tiny, programs):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import crc32c  # noqa: F401  the format's own check

    train(tiny, tmp_path, programs=programs)
    (file,) = (tmp_path / "tensorboard").iterdir()
    blob, found = file.read_bytes(), {}
    while blob:  # length, its checksum, the event, its checksum
        size = int.from_bytes(blob[:8], "little")
        event = Event.FromString(blob[12 : 12 + size])
        blob = blob[16 + size :]
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    for split in ("train", "validation"):
        for record in records(tmp_path, split):
            for name, value in record.items():
                if name not in ("step", "split", "seconds"):
                    assert found.pop((f"{split}/{name}", record["step"])) == (
                        pytest.approx(value, rel=1e-6)
                    )
    assert not found


def test_the_teacher_is_in_no_checkpoint_and_is_not_changed(tmp_path, tiny, programs):
    teacher = replace(tiny.teacher, width=123)  # an axis that nothing else has
    tiny = replace(tiny, teacher=teacher)
    train(tiny, tmp_path, programs=programs)
    found = saved_arrays(tmp_path, 20)
    assert not [path for path, x in found.items() if 123 in x.shape]
    assert max(x.size for x in found.values()) == 16 * 8  # the student's first kernel
    (loaded,) = [
        made
        for made in programs._made.values()
        if type(made).__name__ == "Teacher"
        and 123 in jax.tree.leaves(made.state)[0].shape
    ]
    fresh = nnx.to_pure_dict(nnx.state(teacher()))
    jax.tree.map(np.testing.assert_array_equal, loaded.state, fresh)


@dataclass(frozen=True)
class Sizes:
    """Examples of several sizes, with a text beside each."""

    def __call__(self):
        points = load_experiment(TINY).config(0).data()
        inputs = [np.append(x, np.ones(i % 3)) for i, x in enumerate(points.inputs)]
        labels = points.labels.tolist()
        return [
            {"inputs": x, "labels": label, "name": "a cloud"}
            for x, label in zip(inputs, labels, strict=True)
        ]


@dataclass(frozen=True)
class Cut(grain.transforms.Map):
    """Makes them equal, and leaves the text out."""

    def map(self, element):
        return {"inputs": element["inputs"][:8], "labels": element["labels"]}


def test_transforms_act_in_training_validation_and_test(tmp_path, tiny, programs):
    loader = replace(tiny.loader, transforms=(Cut(),))
    sizes = Sizes()
    config = replace(tiny, data=sizes, validation=sizes, test=sizes, loader=loader)
    found = train(config, tmp_path / "sizes", programs=programs)
    same = replace(tiny, validation=tiny.data, test=tiny.data)
    expected = train(same, tmp_path / "same", programs=programs)
    for key in ("accuracy", "nll"):
        assert found["student"][key] == expected["student"][key]


# --- the loop -------------------------------------------------------------------------


def guarded(monkeypatch, body=lambda: None):
    """Forbid implicit transfers from the second step of a run to its last."""
    update = Training.update.func
    seen = []

    def guarded_update(self):
        run = update(self)

        def step(state, batch):
            if len(seen) == 1:  # the first one compiles, and sends constants
                jax.config.update("jax_transfer_guard", "disallow")
            seen.append(None)
            body()
            return run(state, batch)

        return step

    monkeypatch.setattr(Training, "update", property(guarded_update))
    return seen


def quiet(config: Config) -> Config:
    """Nothing but steps: no line, no evaluation, no checkpoint until the end."""
    never = 10**6
    return replace(
        config,
        validation=None,
        test=None,
        log_every_steps=never,
        eval_every_steps=never,
        checkpoint_every_steps=never,
    )


@pytest.fixture
def unguarded():
    yield
    jax.config.update("jax_transfer_guard", "allow")


@pytest.mark.usefixtures("unguarded")
def test_the_loop_transfers_nothing_but_batches(tmp_path, tiny, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(
        jax, "device_get", lambda x: fetched.append(None) or device_get(x)
    )
    seen = guarded(monkeypatch)
    train(quiet(tiny), tmp_path)
    assert len(seen) == 20
    assert len(fetched) == 1  # the one window, at the end


@pytest.mark.usefixtures("unguarded")
def test_a_transfer_in_the_loop_would_be_seen(tmp_path, tiny, monkeypatch):
    guarded(monkeypatch, body=lambda: jnp.ones(3) + np.ones(3))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(quiet(tiny), tmp_path)


CHANGING = objectives.LogitKD(
    temperature=optimizers.Linear(1.0, 4.0, num_steps=20),
    kd_weight=optimizers.Linear(0.0, 1.0, num_steps=20),
    ce_weight=1.0,
)


def compilations(caplog, function: str) -> int:
    return sum(f"Compiling jit({function})" in r.getMessage() for r in caplog.records)


@pytest.mark.usefixtures("all_devices")
@pytest.mark.parametrize("mesh", ["data=8", "data=4,fsdp=2"])
def test_one_compilation_for_a_run_with_schedules_and_its_resumption(
    tmp_path, tiny, mesh, caplog
):
    programs = Programs()
    tiny = replace(tiny, objective=CHANGING, mesh=mesh)
    with jax.log_compiles():
        train(replace(tiny, steps=10), tmp_path, programs=programs)
        train(tiny, tmp_path, programs=programs)
    assert len(losses(tmp_path)) == 20
    assert compilations(caplog, "_update") == 1
    assert compilations(caplog, "init") == 1


def test_another_objective_is_another_compilation(tmp_path, tiny, caplog):
    """Or else the count above would prove nothing."""
    programs = Programs()
    with jax.log_compiles():
        train(quiet(tiny), tmp_path / "a", programs=programs)
        train(replace(quiet(tiny), seed=1), tmp_path / "b", programs=programs)
        assert compilations(caplog, "_update") == 1
        config = replace(quiet(tiny), objective=objectives.LogitKD(temperature=3.0))
        train(config, tmp_path / "c", programs=programs)
    assert compilations(caplog, "_update") == 2
    made = [m for m in programs._made.values() if isinstance(m, Training)]
    assert [m.step.pure._cache_size() for m in made] == [1, 1]


@pytest.mark.usefixtures("all_devices")
def test_eight_devices_learn_what_four_by_two_learn(tmp_path, tiny):
    for mesh in ("data=8", "data=4,fsdp=2"):
        config = replace(quiet(tiny), mesh=mesh)
        train(config, tmp_path / mesh, programs=Programs())
    a, b = (saved_arrays(tmp_path / m, 20) for m in ("data=8", "data=4,fsdp=2"))
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-4, atol=1e-5, err_msg=path)


# --- stop and go on -------------------------------------------------------------------


def variants(tiny: Config) -> dict[str, Config]:
    return {
        "dropout": tiny,
        "average, microbatches": replace(
            tiny, ema_decay=0.9, accumulate=2, seed=3, objective=everything()
        ),
        "batch statistics, augmentation": replace(
            tiny,
            student=models.ConvNet(num_classes=3, channels=(4,), dropout=0.3),
            student_forward=as_images,
            loader=replace(tiny.loader, in_memory=False),
            optimizer=optimizers.SGD(0.05),
        ),
    }


def everything() -> objectives.Sum:
    """Objectives with projections, with state, and with a schedule."""
    hint = objectives.FeatureKD(
        {"layers/0": "layers/0"},
        projection=students.Projection(16, 12),
        weight=optimizers.Linear(1.0, 0.0, num_steps=10),
    )
    crowd = objectives.ContrastiveKD(
        "layers/0", "layers/0", 16, 12, width=4, queue_size=64
    )
    return objectives.Sum(
        {
            "labels": objectives.CrossEntropy(),
            "hint": hint,
            "crowd": crowd,
            "taid": objectives.TAID(num_steps=20, rate=0.1),
        }
    )


def as_images(model, batch):
    return model(batch["inputs"].reshape(-1, 2, 4, 1))


class Killed(Exception):
    """Stands for a kill -9: nothing is saved, nothing is tidied up."""


@pytest.mark.parametrize(
    "name", ["dropout", "average, microbatches", "batch statistics, augmentation"]
)
def test_killed_and_resumed_equals_never_stopped(
    tmp_path, tiny, programs, monkeypatch, name
):
    tiny = variants(tiny)[name]
    train(tiny, tmp_path / "whole", programs=programs)

    update = Training.update.func
    deadly = {8, 16}

    def dying_update(self):
        run = update(self)

        def step(state, batch):
            if (at := int(state.step)) in deadly:
                deadly.remove(at)
                raise Killed
            return run(state, batch)

        return step

    monkeypatch.setattr(Training, "update", property(dying_update))
    for _ in range(2):
        with pytest.raises(Killed):
            train(tiny, tmp_path / "parts", programs=programs)
        assert not (tmp_path / "parts" / "results.json").exists()
    results = train(tiny, tmp_path / "parts", programs=programs)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20)
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    for key in ("accuracy", "nll", "kl_to_teacher"):
        assert results["student"][key] == whole["student"][key]
    assert results["selected"] == whole["selected"]


def test_sigterm_saves_and_the_run_goes_on_from_there(
    tmp_path, tiny, programs, monkeypatch
):
    train(tiny, tmp_path / "whole", programs=programs)
    update = Training.update.func

    def update_with_signal(self):
        run = update(self)

        def step(state, batch):
            if int(state.step) == 6:  # during the seventh step
                os.kill(os.getpid(), signal.SIGTERM)
            return run(state, batch)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", property(update_with_signal))
        stopped = train(tiny, tmp_path / "parts", programs=programs)
    assert stopped == {"stopped_at": 7}
    assert Checkpoints(tmp_path / "parts" / "checkpoints").latest() == 7
    train(tiny, tmp_path / "parts", programs=programs)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20)


def test_a_signal_of_the_caller_stops_a_run(tmp_path, tiny, programs):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        found = train(tiny, tmp_path, programs=programs, stop=stop)
    assert found == {"stopped_at": 1}


def test_a_finished_run_does_nothing_and_more_steps_go_on(tmp_path, tiny, programs):
    tiny = replace(tiny, optimizer=optimizers.AdamW(1e-3))
    train(tiny, tmp_path / "whole", programs=programs)
    short = replace(tiny, steps=10)
    first = train(short, tmp_path / "parts", programs=programs)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*")}
    again = train(short, tmp_path / "parts", programs=programs)
    assert again == {**first, "already_finished": True}
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*")} == before

    # what only the report reads is taken over
    told = replace(short, baseline="other", description="New.", focus_classes=(1,))
    found = train(told, tmp_path / "parts", programs=programs)
    new = {"baseline": "other", "description": "New.", "focus_classes": [1]}
    assert found == {**first, **new, "already_finished": True}
    for name in ("config.json", "results.json"):
        written = json.loads((tmp_path / "parts" / name).read_text())
        assert new.items() <= written.items()
    assert written["student"] == first["student"]

    results = train(tiny, tmp_path / "parts", programs=programs)
    assert results["steps"] == 20
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20)
    previous = (tmp_path / "parts" / "previous_results.json").read_text()
    assert json.loads(previous)["steps"] == 10

    with pytest.raises(ValueError, match="--steps must be at least 20"):
        train(short, tmp_path / "parts", programs=programs)
    assert json.loads((tmp_path / "parts" / "results.json").read_text()) == results


def test_a_run_that_died_before_its_results_only_measures(tmp_path, tiny, programs):
    results = train(tiny, tmp_path, programs=programs)
    (tmp_path / "results.json").unlink()
    again = train(tiny, tmp_path, programs=programs)
    assert again["student"]["nll"] == results["student"]["nll"]
    assert again["selected"] == results["selected"]
    assert len(losses(tmp_path)) == 20


def test_the_best_checkpoint_is_measured_and_survives(tmp_path, tiny, programs):
    """The learning rate explodes after step 10: what comes later is worse."""
    config = replace(
        tiny,
        optimizer=optimizers.SGD(optimizers.Linear(0.05, 30.0, 20), momentum=0.0),
        checkpoint_every_steps=1,
        eval_every_steps=2,
        select="nll",
    )
    results = train(config, tmp_path, programs=programs)
    validated = {r["step"]: r["nll"] for r in records(tmp_path, "validation")}
    best = min(validated, key=validated.get)
    assert best < 20
    assert results["selected"]["step"] == best
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 19, 20}
    # and it is what others see
    found = evaluate(config, tmp_path, split="validation", programs=programs)
    assert found["step"] == best
    assert found["student"]["nll"] == pytest.approx(validated[best], rel=1e-5)
    module = TrainedRun(str(tmp_path))()
    inputs = config.validation().inputs
    labels = config.validation().labels
    module.eval()
    z = jax.nn.log_softmax(module(jnp.asarray(inputs)))
    nll = -np.mean(np.asarray(z)[np.arange(len(labels)), labels])
    assert nll == pytest.approx(validated[best], rel=1e-4)


def test_the_moving_average_is_what_is_measured(tmp_path, tiny, programs):
    config = replace(tiny, ema_decay=0.9)
    results = train(config, tmp_path, programs=programs)
    found = saved_arrays(tmp_path, results["selected"]["step"])
    averaged = found["['ema']['layers']['0']['kernel']"]
    assert not np.array_equal(averaged, found["['params']['layers']['0']['kernel']"])
    assert results["student"]["parameters"] == 8 * 16 + 16 + 16 * 3 + 3
    module = TrainedRun(str(tmp_path))()
    np.testing.assert_array_equal(module.layers[0].kernel[...], averaged)


def test_what_the_objective_owns_is_saved_and_is_not_the_student(
    tmp_path, tiny, programs
):
    """As a teacher, evaluated, counted: only the student's part is read."""
    config = variants(tiny)["average, microbatches"]
    results = train(config, tmp_path, programs=programs)
    step = results["selected"]["step"]
    found = saved_arrays(tmp_path, step)
    queue = "['objective_state']['crowd']['queue']"
    own = "['objective']['hint']['layers/0']['projection']['kernel']"
    assert found[f"['params']{own}"].shape == found[f"['ema']{own}"].shape == (16, 12)
    assert any(own in path for path in found if path.startswith("['opt_state']"))
    assert found[f"{queue}['features']"].shape == (64, 4)
    assert found["['objective_state']['taid']['t']"] > 0.4
    assert results["student"]["parameters"] == 8 * 16 + 16 + 16 * 3 + 3
    again = evaluate(config, tmp_path, split="test", programs=programs)
    assert again["student"]["nll"] == results["student"]["nll"]
    module = TrainedRun(str(tmp_path))()
    averaged = found["['ema']['student']['layers']['0']['kernel']"]
    np.testing.assert_array_equal(module.layers[0].kernel[...], averaged)


def test_evaluate_changes_nothing(tmp_path, tiny, programs):
    results = train(tiny, tmp_path, programs=programs)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    found = evaluate(tiny, tmp_path, split="test", programs=programs)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert found["student"]["nll"] == results["student"]["nll"]
    assert found["step"] == results["selected"]["step"]
    with pytest.raises(ValueError, match="--split must be one that the config has"):
        evaluate(replace(tiny, test=None), tmp_path, split="test")
    with pytest.raises(ValueError, match="hold a run with a checkpoint"):
        evaluate(tiny, tmp_path / "nothing", split="test")
    assert not (tmp_path / "nothing").exists()


# --- bad input ------------------------------------------------------------------------


@dataclass(frozen=True)
class Some:
    """A source that cannot be loaded: it must be read example by example."""

    bad: str = "nothing"

    def __call__(self):
        return self

    def __len__(self):
        return 0 if self.bad == "empty" else 48

    def __getitem__(self, i):
        label, inputs = i % 3, np.full(8, i % 3, np.float32)
        if self.bad == "label" and i == 17:
            label = 3
        if self.bad == "huge" and i == 17:
            inputs = np.full(8, 1e30, np.float32)
        if self.bad == "nan" and i == 17:
            inputs = np.full(8, np.nan, np.float32)
        return {"inputs": inputs, "labels": label}


@dataclass(frozen=True)
class Many(Some):
    """Knows how many classes it has, and that is one more than the student."""

    num_classes: int = 4


def test_a_loss_that_is_not_finite_names_step_examples_and_cause(
    tmp_path, tiny, programs
):
    """Steps 1 to 3 see all 48 examples; example 17 makes infinite squares."""
    tiny = replace(
        tiny,
        data=Some("huge"),
        loader=replace(tiny.loader, shuffle=False),
        checkpoint_every_steps=1,
        validation=None,
        student=models.MLP(8, (16,), 3),
        objective=objectives.CrossEntropy(),
        optimizer=optimizers.SGD(1e-3, momentum=0.0),
    )
    with pytest.raises(NonFiniteError) as error:
        train(tiny, tmp_path)
    message = str(error.value)
    assert error.value.step == 2
    assert 17 in error.value.index.tolist()
    assert "at step 2" in message
    assert " 16, 17, 18" in message
    assert "lower the learning rate" in message
    assert "checkpoint of step 1 is from before it, and good" in message
    assert Checkpoints(tmp_path / "checkpoints").latest() == 1
    # the first checkpoint loads, and so the error comes again at the same step
    with pytest.raises(NonFiniteError, match="at step 2"):
        train(tiny, tmp_path)


def test_a_label_that_nobody_could_check_before_is_named(tmp_path, tiny):
    """Read ahead, of a source that does not know how many classes it has."""
    loader = replace(tiny.loader, in_memory=False, shuffle=False)
    config = replace(tiny, data=Some("label"), loader=loader)
    with pytest.raises(NonFiniteError, match="at step 2") as error:
        train(config, tmp_path)
    message = str(error.value)
    assert "labels of examples [17] are not in [0, 3), the classes" in message
    assert "learning rate" not in message


@pytest.mark.parametrize("in_memory", [True, False])
def test_nan_in_the_data_is_named(tmp_path, tiny, in_memory):
    """Before anything is computed, or where the example is first read."""
    loader = replace(tiny.loader, in_memory=in_memory, shuffle=False, prefetch=1)
    config = replace(tiny, data=Some("nan"), loader=loader, checkpoint_every_steps=1)
    with pytest.raises(ValueError, match="nan or inf at example 17") as error:
        train(config, tmp_path)
    if in_memory:
        assert not (tmp_path / "checkpoints").exists()
    else:
        assert "ahead of step" in str(error.value)


def test_a_diverging_loss_is_never_saved_nor_validated(tmp_path, tiny):
    config = replace(
        quiet(tiny),
        optimizer=optimizers.SGD(1e30, momentum=0.0),
        objective=Cubed(),
        validation=tiny.validation,
        eval_every_steps=5,
        select=None,
    )
    with pytest.raises(NonFiniteError, match="No checkpoint was written before it"):
        train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not records(tmp_path, "validation")


def jumps(step):
    """A learning rate that is no number from the tenth update on."""
    return jnp.where(step >= 9, jnp.inf, 1e-2)


@pytest.mark.parametrize("steps", [20, 10])
def test_parameters_that_are_not_finite_are_never_saved(tmp_path, tiny, steps):
    """The loss and the gradient of step 10 are finite, and no loss follows it."""
    tiny = replace(quiet(tiny), checkpoint_every_steps=5, steps=steps, test=tiny.test)
    config = replace(tiny, optimizer=optimizers.SGD(jumps, momentum=0.0))
    with pytest.raises(NonFiniteError, match=r"params must be finite.*at step 10"):
        train(config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").latest() == 5
    assert not (tmp_path / "results.json").exists()


@dataclass(frozen=True)
class Cubed:
    """Grows without bound."""

    def __call__(self, student, teacher, batch):
        from distilljax import Term

        return {"cube": Term(student.logits.sum(-1) ** 3)}


def changed(tiny: Config) -> dict[str, tuple[Config, str]]:
    """What can be wrong with a config, and what must be said about it."""
    student = tiny.student
    return {
        "mesh": (replace(tiny, mesh="data=3"), "number of devices, 8"),
        "axis": (replace(tiny, mesh="model=8"), "sizes of the axes data, fsdp"),
        "batch over devices": (
            replace(tiny, loader=data.Loader(batch_size=12)),
            r"loader.batch_size must be a multiple of data x fsdp = 8",
        ),
        "evaluation over devices": (
            replace(tiny, eval_batch_size=20),
            "eval_batch_size must be a multiple of data x fsdp = 8",
        ),
        "batch over microbatches": (
            replace(tiny, accumulate=3),
            "8 devices times accumulate=3, got 16",
        ),
        "classes of the teacher": (
            replace(tiny, teacher=replace(tiny.teacher, num_classes=5)),
            "the teacher must have the student's classes, 3, got 5",
        ),
        "labels": (
            replace(tiny, student=replace(student, num_classes=2)),
            r"data labels must lie in \[0, 2\), the classes of the student, got 2",
        ),
        "labels on disk": (
            replace(
                tiny,
                data=Some("label"),
                loader=replace(tiny.loader, in_memory=True),
            ),
            r"data labels must lie in \[0, 3\), the classes of the student, got 3",
        ),
        "labels of validation": (
            replace(tiny, validation=Some("label")),
            r"validation labels must lie in \[0, 3\), .* got 3",
        ),
        "classes of test": (
            replace(tiny, test=Many(), loader=replace(tiny.loader, in_memory=False)),
            r"test labels must lie in \[0, 3\), .* got 3",
        ),
        "inputs": (
            replace(tiny, student=replace(student, num_features=9)),
            "shape",
        ),
        "no teacher": (replace(tiny, teacher=None), "teacher must have logits"),
        "schedule": (
            replace(
                tiny,
                objective=objectives.LogitKD(
                    temperature=optimizers.Linear(4.0, 0.0, num_steps=5)
                ),
            ),
            "LogitKD: temperature at step 5 must be positive and finite, got 0.0",
        ),
        "measure": (
            replace(tiny, select="acuracy"),
            "--select must be None or one of accuracy, nll, ece, kl_to_teacher",
        ),
        "empty": (
            replace(tiny, data=Some("empty")),
            "at least one example",
        ),
        "empty validation": (
            replace(tiny, validation=Some("empty")),
            "at least one example",
        ),
        "group": (
            replace(
                tiny,
                optimizer=optimizers.AdamW(groups=(optimizers.Group("nothing", 0.0),)),
            ),
            "groups must match some parameter",
        ),
        "student_rules": (
            replace(tiny, student_rules=(Rule("kernel", ("fsdp",)),)),
            "have an entry for each axis",
        ),
        "no folder of the teacher": (
            replace(tiny, teacher=TrainedRun("nowhere")),
            "hold a finished run",
        ),
    }


@pytest.mark.usefixtures("all_devices")
@pytest.mark.parametrize("what", list(changed(load_experiment(TINY).config(0))))
def test_what_is_wrong_is_said_before_anything_is_computed(
    tmp_path, tiny, what, monkeypatch
):
    config, message = changed(tiny)[what]

    def never(*_):
        raise AssertionError("it computed")

    monkeypatch.setattr(Training, "update", property(never))
    with pytest.raises((ValueError, TypeError), match=message):
        train(config, tmp_path / "run")
    # so that the corrected config may use the same folder
    assert not (tmp_path / "run").exists()


def test_another_teacher_is_refused_and_nothing_is_overwritten(
    tmp_path, tiny, programs
):
    train(replace(tiny, steps=10), tmp_path, programs=programs)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    config = replace(tiny, teacher=replace(tiny.teacher, width=13))
    for steps in (10, 20):  # a finished run, and one that would go on
        with pytest.raises(ValueError, match="the teacher must be the one that"):
            train(replace(config, steps=steps), tmp_path, programs=programs)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_measures_that_may_be_selected_are_those_there_are(
    tmp_path, tiny, programs
):
    config = replace(tiny, teacher=None, objective=objectives.CrossEntropy())
    train(config, tmp_path, programs=programs)
    (first, *_) = records(tmp_path, "validation")
    assert set(first) == {"step", "split", "seconds", *list(SELECTABLE)[:3]}
