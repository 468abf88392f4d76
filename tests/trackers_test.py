"""W&B and trackio, as modules that remember what they were told."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from distilljax.cli import main
from distilljax.trackers import TRACKERS, TrackerWriter, load_trackers
from tests.saved import records

RECORD = {"step": 10, "split": "train", "loss": 0.5, "kd": float("nan"), "seconds": 1.5}


class Fake(ModuleType):
    """What both modules have of what is used."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))

    def define_metric(self, name, step_metric):
        self.calls.append(("define_metric", name, step_metric))

    def log(self, numbers, step=None):
        self.calls.append(("log", numbers, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def fakes(monkeypatch):
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    found = {name: Fake(name) for name in TRACKERS}
    for name, fake in found.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return found


@pytest.mark.parametrize("name", TRACKERS)
def test_numbers_go_under_their_split_and_step(tmp_path, fakes, name):
    config = {"_type": "distilljax.config:Config", "steps": 20}
    writer = TrackerWriter(fakes[name], tmp_path, "digits/teacher", config)
    writer.write(RECORD)
    writer.write({"step": 10, "split": "validation", "accuracy": 0.75, "seconds": 2.0})
    writer.close()
    (_, options), *_, first, second, last = fakes[name].calls
    assert options["project"] == "digits_teacher"  # no slash in W&B
    assert options["config"] == {"steps": 20}  # no underscore in trackio
    assert options["resume"] == "allow"
    # what is not finite is no number there
    numbers = {"train/loss": 0.5, "train/seconds": 1.5}
    if name == "wandb":
        assert ("define_metric", "*", "step") in fakes[name].calls
        assert first == ("log", {**numbers, "step": 10}, None)
    else:
        assert first == ("log", numbers, 10)
    assert second[1]["validation/accuracy"] == 0.75
    assert last == ("finish",)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_is_resumed_is_the_same_run_there(tmp_path, fakes, name):
    for workdir in ("a", "a", "b"):
        (tmp_path / workdir).mkdir(exist_ok=True)
        TrackerWriter(fakes[name], tmp_path / workdir, "digits", {})
    key = "id" if name == "wandb" else "name"
    first, again, other = (c[1][key] for c in fakes[name].calls if c[0] == "init")
    assert first == again != other


def test_the_project_may_be_named_by_the_environment(tmp_path, fakes, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    TrackerWriter(fakes["wandb"], tmp_path, "digits", {})
    assert fakes["wandb"].calls[0][1]["project"] == "mine"


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_not_installed_names_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'pip install "distilljax\[{name}\]"'):
        load_trackers([name])


def test_one_that_is_unknown_is_explained():
    with pytest.raises(ValueError, match="--log must be some of wandb, trackio, got"):
        load_trackers(["wanbd"])


TINY = "tests/cli/tiny.py"
SPLITS = ("train", "validation")


def test_a_command_logs_to_all_that_it_names(tmp_path, fakes, monkeypatch):
    import jax

    from distilljax.sharding import mesh_from_string

    only = jax.devices()[:1]
    monkeypatch.setattr(
        "distilljax.train.mesh_from_string", lambda text: mesh_from_string(text, only)
    )
    words = ["train", TINY, "--workdir", str(tmp_path), "--steps=3"]
    assert main([*words, "--log=wandb,trackio"]) == 0
    for fake in fakes.values():
        logged = [call for call in fake.calls if call[0] == "log"]
        assert len(logged) == 3 + 1  # three lines of training, one validation
        assert "train/loss" in logged[0][1]
        assert fake.calls[-1] == ("finish",)
        # to the last digit those of metrics.jsonl
        times = [x for c in logged for k, x in c[1].items() if k.endswith("/seconds")]
        assert times == [r["seconds"] for s in SPLITS for r in records(tmp_path, s)]


def test_a_command_without_it_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["train", TINY, "--workdir", str(tmp_path / "run"), "--log=wandb"]
    assert main(words) == 1
    assert 'pip install "distilljax[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
