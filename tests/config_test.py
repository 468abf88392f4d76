from __future__ import annotations

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import distilljax
from distilljax import data, losses, models, objectives, optimizers
from distilljax.config import (
    Config,
    from_json,
    load_experiment,
    to_json,
)
from distilljax.programs import Programs
from distilljax.resume import RESUMABLE, differences, resumable
from distilljax.run import ONLY_REPORTED
from distilljax.sharding import Rule, mesh_from_string
from distilljax.train import evaluate, train
from distilljax.workdir import TrainedRun

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = Path(__file__).parent / "cli" / "tiny.py"
# what begins with an underscore is shared by several
CONFIGS = sorted((REPOSITORY / "configs").rglob("[!_]*.py"))


@pytest.fixture
def tiny() -> Config:
    return load_experiment(TINY).config(0)


# --- configs as files and as JSON -----------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_every_config_is_saved_and_read_back(path):
    experiment = load_experiment(path)
    for seed in (0, 3):
        for config in (experiment.config(seed), *experiment.arms(seed).values()):
            assert config.seed == seed
            text = json.dumps(to_json(config))
            assert from_json(json.loads(text)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_every_config_says_what_it_should_reach(path):
    experiment = load_experiment(path)
    assert experiment.config(0).expected
    arms = experiment.arms(0)
    for arm in arms.values():
        assert arm.description
        assert arm.baseline is None or arm.baseline in arms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def config(seed): return 3", "config.* must be a Config, got a int"),
        ("def arms(seed): return [1]", "arms.* must be a Mapping, got a list"),
        ("def arms(seed): return {'a': 1}", "'a', must be a Config, got a int"),
        ("def config(seed): return int(x=3)", "invalid keyword argument"),
    ],
)
def test_what_a_file_returns_is_checked(tmp_path, text, message):
    path = tmp_path / "mine.py"
    more = "def config(seed): ...\n" if "arms" in text else ""
    path.write_text(more + text)
    experiment = load_experiment(path)
    with pytest.raises(TypeError, match=message):
        experiment.arms(0) if more else experiment.config(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": objectives.LogitKD}, r"got the class LogitKD. Write LogitKD\("),
        ({"optimizer": optimizers.AdamW}, "optimizer must be an instance"),
        ({"loader": data.Loader}, "loader must be an instance"),
    ],
)
def test_a_field_of_another_kind_is_refused(tiny, change, message):
    with pytest.raises(TypeError, match=message):
        replace(tiny, **change)


def test_functions_filters_and_partials_are_saved_by_name(tiny):
    config = replace(
        tiny,
        trainable=nnx.Param,
        student_forward=functools.partial(as_images, size=4),
        objective=objectives.LogitKD(divergence=losses.reverse_kl),
        student_rules=(Rule("kernel", (None, "tensor")),),
    )
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again.trainable is nnx.Param
    assert again.student_forward.func is as_images
    assert again.student_forward.keywords == {"size": 4}
    assert again.objective == config.objective
    assert again.student_rules == config.student_rules


def as_images(model, batch, size=2):
    return model(batch["inputs"].reshape(-1, size, 2, 1))


@pytest.mark.parametrize("part", [lambda: 0, optax.adam(0.1), {1, 2}])
def test_what_cannot_be_saved_is_refused(tiny, part):
    with pytest.raises(TypeError, match="to_json: a part of the config must be"):
        to_json(replace(tiny, data=part))


def test_arrays_are_told_apart_but_not_read_back():
    source = data.Arrays(np.zeros((3, 2), np.uint8), np.arange(3))
    other = data.Arrays(np.ones((3, 2), np.uint8), np.arange(3))
    assert to_json(source) == to_json(data.Arrays(source.inputs.copy(), np.arange(3)))
    assert to_json(source) != to_json(other)
    with pytest.raises(TypeError, match="Arrays are not saved with a config"):
        from_json(to_json(source))


def test_numbers_of_numpy_are_numbers():
    assert to_json({"a": np.float32(0.5), "b": np.int64(3)}) == {"a": 0.5, "b": 3}


def test_differences_name_the_innermost_field(tiny):
    other = replace(tiny, loader=replace(tiny.loader, scale=2.0), steps=7)
    assert differences(to_json(tiny), to_json(other)) == {
        "loader.scale": "1.0 -> 2.0",
        "steps": "20 -> 7",
    }
    assert resumable("steps")
    assert not resumable("loader.scale")
    known = {f.name for f in dataclasses.fields(Config)}
    known |= {f"loader.{f.name}" for f in dataclasses.fields(data.Loader)}
    assert known >= RESUMABLE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("accumulate", 0),
        ("log_every_steps", 0),
        ("eval_every_steps", -1),
        ("eval_batch_size", 0),
        ("checkpoint_every_steps", 0),
        ("keep_last", 0),
        ("seed", -1),
        ("seed", 2**31),
    ],
)
def test_values_out_of_range_are_refused(tiny, name, value):
    with pytest.raises(ValueError, match=f"Config: {name} must"):
        replace(tiny, **{name: value})


def test_a_run_starts_from_arrays_in_memory(tmp_path, tiny):
    """In a notebook, data is often an array."""
    source = tiny.data()
    config = replace(tiny, data=source, validation=None, test=None, mesh="data=-1")
    train(config, tmp_path, programs=Programs())
    other = replace(config, data=data.Arrays(source.inputs + 1, source.labels, 3))
    with pytest.raises(ValueError, match=r"data\.inputs\._array"):
        train(other, tmp_path)


# --- every field is read --------------------------------------------------------------


@dataclass(frozen=True)
class Untrained:
    """A teacher for images of 8 x 8."""

    def __call__(self, mesh, rules):
        del mesh, rules
        return models.ConvNet(num_classes=10, channels=(4,))(nnx.Rngs(0))


def flat(model, batch):
    return model(batch["inputs"])


def teachers_view(model, batch):
    return model(batch.get("teacher_inputs", batch["inputs"]))


def first_config() -> Config:
    """A student that learns from a teacher; everything from memory."""
    digits = data.Tfds("digits", "train")
    return Config(
        name="first",
        description="d",
        expected="e",
        baseline="b",
        focus_classes=(3,),
        student=models.MLP(64, (8,), 10, input_dropout=0.1, dropout=0.1),
        teacher=Untrained(),
        objective=objectives.LogitKD(
            temperature=optimizers.Linear(1.0, 2.0, 4), ce_weight=0.1
        ),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(1e-3, 4, warmup_steps=1, end=1e-4),
            weight_decay=0.1,
            clip_norm=1.0,
            groups=(optimizers.Group("bias", 0.5),),
        ),
        data=data.WithoutClasses(data.Few(digits, 20), (3,)),
        validation=data.Stratified(data.Tfds("digits", "validation"), 20),
        test=data.Slice(data.Tfds("digits", "test"), 0, 24),
        loader=data.Loader(
            8, augment=data.RandomShift(1), teacher_view="clean", scale=16.0
        ),
        student_forward=flat,
        teacher_forward=teachers_view,
        student_rules=(Rule("kernel", (None, None)),),
        teacher_rules=(Rule("scale", (None,)),),
        ema_decay=0.9,
        steps=4,
        eval_every_steps=2,
        eval_batch_size=8,
        select="nll",
    )


def second_config() -> Config:
    """The labels alone; read by Grain."""
    return replace(
        first_config(),
        student=models.ConvNet(num_classes=10, channels=(4,), dropout=0.1),
        teacher=None,
        student_forward=None,
        teacher_forward=None,
        student_rules=(),
        teacher_rules=(),
        objective=objectives.CrossEntropy(label_smoothing=0.1),
        optimizer=optimizers.SGD(0.1, nesterov=True, weight_decay=0.1, clip_norm=1.0),
        loader=data.Loader(8, shuffle=False, in_memory=False, num_threads=1),
        compute_dtype="bfloat16",
        trainable=nnx.Param,
    )


# Their files are other tests' business: tests/data reads every one of their fields.
ELSEWHERE = {"Arrays", "ArrayRecord", "Idx", "TrainedRun"}
ELSEWHERE |= {"Outputs", "Term", "Mean"}  # no parts of configs
# So are these: tests/objectives calls every one of them with each of its fields.
ELSEWHERE |= set(vars(objectives)) - {"LogitKD", "CrossEntropy"}
ELSEWHERE |= {
    "DecoderConfig",
    "EncoderConfig",
    "ResNetConfig",
    "Rope",
    "ViTConfig",
}  # tests/models reads files that set each of its fields


def parts_of_configs() -> dict[str, type]:
    """Every dataclass of the public modules that a config is made of."""
    modules = (models, objectives, optimizers, data)
    found = [getattr(module, name) for module in modules for name in dir(module)]
    return {
        kind.__name__: kind
        for kind in (Config, Rule, TrainedRun, *found)
        if isinstance(kind, type)
        and dataclasses.is_dataclass(kind)
        and kind.__module__.startswith("distilljax")
    }


def test_every_field_is_read(tmp_path, monkeypatch):
    """A field that nothing reads is a promise that nobody keeps.

    Reads by dataclasses themselves, by to_json and by checks do not count.
    """
    kinds = {k: v for k, v in parts_of_configs().items() if k not in ELSEWHERE}
    package = str(Path(distilljax.__file__).parent)
    read = {name: set() for name in kinds}

    def recording(kind):
        def get(self, name):
            frame = sys._getframe(1).f_code
            ours = frame.co_filename.startswith(package)
            checks = frame.co_name in ("__post_init__", "to_json", "key_of")
            if ours and not checks and not frame.co_filename.endswith("config.py"):
                read[kind.__name__].add(name)
            return object.__getattribute__(self, name)

        return get

    only = jax.devices()[:1]
    monkeypatch.setattr(
        "distilljax.train.mesh_from_string", lambda text: mesh_from_string(text, only)
    )
    configs = {"first": first_config(), "second": second_config()}
    for kind in kinds.values():
        monkeypatch.setattr(kind, "__getattribute__", recording(kind), raising=False)
    for name, config in configs.items():
        programs = Programs()
        train(config, tmp_path / name, programs=programs)
        evaluate(config, tmp_path / name, split="test", programs=programs)
    monkeypatch.undo()

    # the report reads these in the results, to which they are copied as json
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    read["Config"] |= set(ONLY_REPORTED) & results.keys()
    read["Tfds"].add("download")  # only where the data set is not there yet
    unread = {
        f"{name}.{field.name}"
        for name, kind in kinds.items()
        for field in dataclasses.fields(kind)
        if field.name not in read[name]
    }
    assert not unread


def test_the_parts_of_configs_are_found():
    """An empty list would make the test above pass."""
    few = {"Config", "Loader", "AdamW", "SGD", "LogitKD", "CrossEntropy", "MLP", "Rule"}
    assert few | {"ConvNet", "Tfds", "Few", "RandomShift"} <= parts_of_configs().keys()
