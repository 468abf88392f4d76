"""Whether a folder is taken up, refused, or begun from where another run was."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from distilljax.cli import main
from distilljax.config import Config, load_experiment
from distilljax.events import read_events
from distilljax.programs import Programs
from distilljax.sharding import mesh_from_string
from distilljax.train import train
from tests.saved import losses, records, saved_arrays, saved_steps

TINY = Path(__file__).parent / "cli" / "tiny.py"


@pytest.fixture(scope="module")
def programs() -> Programs:
    return Programs()


@pytest.fixture
def tiny() -> Config:
    return replace(load_experiment(TINY).config(0), validation=None, keep_last=9)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    only = jax.devices()[:1]
    monkeypatch.setattr(
        "distilljax.train.mesh_from_string", lambda text: mesh_from_string(text, only)
    )


def assert_same(a: Path, b: Path, step: int) -> None:
    left, right = saved_arrays(a, step), saved_arrays(b, step)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, programs):
    """A run of 20 steps with checkpoints every 5."""
    workdir = tmp_path_factory.mktemp("whole")
    only = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "distilljax.train.mesh_from_string",
            lambda text: mesh_from_string(text, only),
        )
        config = load_experiment(TINY).config(0)
        train(replace(config, validation=None, keep_last=9), workdir, programs=programs)
    return workdir


@pytest.mark.parametrize("at", [5, 10, None])
def test_from_a_checkpoint_of_another_run_it_is_the_same_run(
    tmp_path, tiny, programs, whole, at
):
    """State, random streams and the position in the data; nothing there is changed."""
    origin = whole if at is None else whole / "checkpoints" / str(at)
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    steps = 25 if at is None else 20
    workdir = tmp_path / "other"
    found = train(replace(tiny, steps=steps), workdir, programs=programs, resume=origin)
    at = at or 20
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before
    assert list(losses(workdir)) == list(range(at + 1, steps + 1))
    assert saved_steps(workdir)[0] == at
    if steps == 20:
        assert_same(whole, workdir, 20)
        assert losses(workdir).items() <= losses(whole).items()
    where = str((whole / "checkpoints" / str(at)).resolve())
    assert found["origin"] == where
    assert read_events(workdir / "events.jsonl")[0]["origin"] == where
    # the same command again, and the plain one, say that it is finished
    again = {"steps": steps}
    for options in ({"resume": origin}, {}):
        done = train(replace(tiny, **again), workdir, programs=programs, **options)
        assert done["already_finished"]


def test_one_that_was_begun_from_another_resumes_by_itself(
    tmp_path, tiny, programs, whole, monkeypatch
):
    """Killed before its first own checkpoint: it must not begin from nothing."""
    from distilljax.programs import Training

    update = Training.update.func

    def dying(self):
        def step(state, batch):
            raise KeyboardInterrupt

        return step

    origin = whole / "checkpoints" / "10"
    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", property(dying))
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "other", programs=programs, resume=origin)
    assert update is Training.update.func
    found = train(tiny, tmp_path / "other", programs=programs)
    assert list(losses(tmp_path / "other")) == list(range(11, 21))
    assert found["origin"].endswith("checkpoints/10")
    assert_same(whole, tmp_path / "other", 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"--resume must be of the same config.*seed: 0 -> 1"),
        ({"accumulate": 2}, r"--resume must be of the same config.*accumulate: 1 -> 2"),
        (
            {"steps": 10},
            "at least 20, which the run of --resume has.*Ask for more steps, or",
        ),
    ],
)
def test_another_run_must_be_of_the_same_config(
    tmp_path, tiny, programs, whole, change, message
):
    with pytest.raises(ValueError, match=message):
        train(replace(tiny, **change), tmp_path / "a", programs=programs, resume=whole)
    assert not (tmp_path / "a" / "config.json").exists()


def test_a_path_that_is_no_run_is_explained(tmp_path, tiny, programs, whole):
    for path in (tmp_path / "nothing", whole / "checkpoints"):
        with pytest.raises(ValueError, match="--resume must be auto, never, or the"):
            train(tiny, tmp_path / "a", programs=programs, resume=path)
    steps = "checkpoints/7'. Those of this run are of steps: 5, 10, 15, 20"
    with pytest.raises(ValueError, match=steps):
        train(
            tiny,
            tmp_path / "a",
            programs=programs,
            resume=whole / "checkpoints" / "7",
        )
    with pytest.raises(ValueError, match="name another run than that of --workdir"):
        train(replace(tiny, steps=30), whole, programs=programs, resume=whole)


def test_never_refuses_what_is_there_and_deletes_nothing(
    tmp_path, tiny, programs, whole
):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"hold no run for --resume never.*4 checkpoi"):
        train(replace(tiny, steps=30), whole, programs=programs, resume="never")
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before
    train(replace(tiny, steps=2), tmp_path, programs=programs, resume="never")
    assert len(losses(tmp_path)) == 2


def test_a_half_written_newest_checkpoint_falls_back_and_ends_the_same(
    tmp_path, tiny, programs, whole, capfd
):
    train(replace(tiny, steps=15), tmp_path / "a", programs=programs)
    newest = tmp_path / "a" / "checkpoints" / "15"
    files = [p for p in newest.rglob("*") if p.is_file() and p.name != "files.json"]
    largest = max(files, key=os.path.getsize)
    os.truncate(largest, os.path.getsize(largest) // 2)
    train(tiny, tmp_path / "a", programs=programs)
    err = capfd.readouterr().err
    assert "the checkpoint of step 15 must be complete" in err
    assert "Going on from that of step 10" in err
    assert_same(whole, tmp_path / "a", 20)
    assert losses(tmp_path / "a") == losses(whole)
    starts = [
        e["step"]
        for e in read_events(tmp_path / "a" / "events.jsonl")
        if e["event"] == "start"
    ]
    assert starts == [0, 10]


def test_what_killed_runs_left_is_removed(tmp_path, tiny, programs):
    train(replace(tiny, steps=5), tmp_path, programs=programs)
    left = [tmp_path / f".{n}.123.tmp" for n in ("config.json", "results.json")]
    others = [tmp_path / ".report.json.123.tmp", tmp_path / ".notes.tmp"]
    for path in (*left, *others):
        path.write_text("{")
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    train(replace(tiny, steps=10), tmp_path, programs=programs)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)  # somebody else's
    assert saved_steps(tmp_path) == [5, 10]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_checkpoints_by_time(tmp_path, tiny, programs, monkeypatch):
    """A second of the monotonic clock for each step, whatever the date does."""
    now = [0.0]
    monkeypatch.setattr("distilljax.together.time.monotonic", lambda: now[0])
    from distilljax.programs import Training

    update = Training.update.func

    def ticking(self):
        run = update(self)

        def step(state, batch):
            now[0] += 1.0
            return run(state, batch)

        return step

    monkeypatch.setattr(Training, "update", property(ticking))
    config = replace(tiny, checkpoint_every_steps=100, checkpoint_every_secs=6.0)
    train(config, tmp_path, programs=programs)
    assert saved_steps(tmp_path) == [6, 12, 18, 20]


def test_by_the_command_line(tmp_path, capsys, whole):
    words = ["train", str(TINY), "--validation.num-examples=40"]
    first = [*words, "--workdir", str(tmp_path / "a"), "--steps=10"]
    assert main(first) == 0
    assert main([*first[:-1], "--steps=12", "--resume=never"]) == 1
    assert "--resume auto" in capsys.readouterr().err
    other = ["--workdir", str(tmp_path / "b"), "--steps=12"]
    assert main([*words, *other, "--resume", str(tmp_path / "a")]) == 0
    assert [r["step"] for r in records(tmp_path / "b")] == [11, 12]
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert results["origin"].endswith("a/checkpoints/10")
    with pytest.raises(SystemExit) as stop:
        main([*words, "--workdir", str(tmp_path / "c"), "--seeds=0", *other[2:],
              "--resume", str(tmp_path / "a")])  # fmt: skip
    assert stop.value.code == 2
