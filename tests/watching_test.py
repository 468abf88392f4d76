"""How runs are doing, read from folders of every kind."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from distilljax.cli import main
from distilljax.watching import find_statuses, is_locked, status_of

HERE = "this boot"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr("distilljax.watching.this_boot", lambda: HERE)


def at(event, step, **more):
    clocks = {"time": time.time(), "monotonic": time.monotonic(), "boot": HERE}
    return {"event": event, "step": step, **clocks, **more}


def line(step, split="train", **more):
    return {"step": step, "split": split, "seconds": 2.0 * step, "loss": 1.0, **more}


def make(path: Path, *, steps=100, events=(), lines=(), finished=False) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / ".lock").touch()
    (path / "config.json").write_text(json.dumps({"name": "digits", "steps": steps}))
    for name, records in (("events", events), ("metrics", lines)):
        text = "".join(json.dumps(r) + "\n" for r in records)
        (path / f"{name}.jsonl").write_text(text)
    if finished:
        (path / "results.json").write_text(json.dumps({"steps": steps}))
    return path


BEGUN = [at("start", 0), at("first_step", 1)]


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"events": BEGUN}, "killed"),
        ({"events": [*BEGUN, at("stop", 5, reason="stopped")]}, "stopped"),
        ({"events": [*BEGUN, at("stop", 5, reason="ValueError")]}, "ValueError"),
        ({"events": [at("start", 0, boot="another")]}, "elsewhere"),
        ({"events": [*BEGUN, at("stop", 100, reason="done")]}, "killed"),
        (
            {"events": [*BEGUN, at("stop", 100, reason="done")], "finished": True},
            "finished",
        ),
        ({}, "killed"),
    ],
)
def test_whether_a_run_lives(tmp_path, options, state):
    path = make(tmp_path, **options)
    assert status_of(path).state == state
    with (path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_locked(path / ".lock")
        assert status_of(path).state == "running"
    assert status_of(path).state == state


def test_looking_does_not_take_the_lock(tmp_path):
    """A run that starts at that moment would be refused."""
    (tmp_path / ".lock").touch()
    before = os.stat(tmp_path / ".lock")
    assert not is_locked(tmp_path / ".lock")
    assert os.stat(tmp_path / ".lock").st_atime_ns == before.st_atime_ns
    assert not is_locked(tmp_path / "nothing")
    assert not is_locked(tmp_path / ".lock", table=tmp_path / "no table")


def test_what_is_known_of_a_run(tmp_path):
    events = [*BEGUN, at("checkpoint", 10), at("start", 10), at("checkpoint", 20)]
    lines = [line(10, loss=2.0), line(20), line(20, "validation", accuracy=0.75)]
    path = make(tmp_path, events=events, lines=lines)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "split": "tra')  # it is being written
    found = status_of(path)
    assert (found.name, found.step, found.steps) == ("digits", 20, 100)
    assert found.train["loss"] == 1.0
    assert found.validation["accuracy"] == 0.75
    assert found.seconds_left == pytest.approx(80 * 2.0)
    assert (found.checkpoint, found.restarts) == (20, 1)
    assert 0 <= found.checkpoint_secs < 60
    assert 0 <= found.silent_secs < 60


def test_of_a_long_log_the_end_is_read(tmp_path):
    lines = [line(step, note="x" * 1000) for step in range(1, 2001)]
    found = status_of(make(tmp_path, steps=4000, lines=lines))
    assert found.step == 2000
    assert found.seconds_left == pytest.approx(4000.0)


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"steps": 3'])
def test_files_that_are_half_there_are_no_error(tmp_path, broken):
    path = make(tmp_path)
    for name in ("config.json", "events.jsonl", "metrics.jsonl", "results.json"):
        (path / name).write_text(broken)
    assert status_of(path).step == 0


def test_all_runs_below_some_folders_are_found_once(tmp_path):
    for name in ("a/arm/seed_1", "a/arm/seed_0", "b"):
        make(tmp_path / name)
    make(tmp_path / "b" / "checkpoints" / "1")  # no run
    (tmp_path / "config.json").write_text("{}")  # something else's
    found = find_statuses([tmp_path, tmp_path / "b"])
    names = [str(run.path.relative_to(tmp_path)) for run in found]
    assert names == ["a/arm/seed_0", "a/arm/seed_1", "b"]


FULL = {
    "kd": 0.25,
    "tokens_per_second": 1234.0,
    "flops_per_second_per_chip": 1.5e14,
    "mfu": 0.42,
    "memory_peak_bytes": 3 * 2**30,
    "share_data": 0.1,
    "share_step": 0.9,
    "goodput": 0.875,
}


def test_one_run_is_shown_in_detail(tmp_path, capsys):
    events = [*BEGUN, at("checkpoint", 20), at("start", 20)]
    lines = [line(10), line(20, **FULL), line(20, "validation", accuracy=0.75)]
    make(tmp_path, events=events, lines=lines)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for shown in (
        "digits killed",
        "20/100",
        "kd 0.25",
        "accuracy 0.75 (step 20)",
        "1,234 tokens/s",
        "150 TFLOP/s per chip MFU 42 %",
        "3.00 GiB",
        "data 10 % step 90 %",
        "goodput │ 88 %".replace("│ ", ""),
        "step 20, ",
        "1 restarts",
    ):
        assert shown in out, (shown, out)
    assert "left" not in out  # of a run that is not running


def headers(out: str) -> list[str]:
    return next(line.split() for line in out.splitlines() if "state" in line)


@pytest.mark.parametrize(
    ("columns", "more", "shown"),
    [
        ("160", {"mfu": 0.42}, ["validation", "speed", "MFU"]),
        ("160", {"mfu": None}, ["validation", "speed"]),
        ("80", {"mfu": 0.42}, ["validation"]),
        ("90", {"mfu": 0.42}, ["validation", "speed"]),
        ("60", {"mfu": 0.42}, []),
    ],
)
def test_headers_and_cells_are_whole_and_columns_without_a_value_are_left_out(
    tmp_path, capsys, monkeypatch, columns, more, shown
):
    monkeypatch.setenv("COLUMNS", columns)
    full = FULL | {"mfu": None, "tokens_per_second": 1234567.0, "loss": 0.0123} | more
    lines = [line(10_000), line(20_000, **full)]
    lines += [line(20_000, "validation", accuracy=0.9876)]
    paths = [tmp_path / f"soft_{i}" for i in range(2)]
    for path in paths:
        make(path, lines=lines, steps=100_000)
    with (paths[0] / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["watch", str(tmp_path), "--once"]) == 0
        out = capsys.readouterr().out
    assert headers(out) == ["run", "state", "step", "loss", *shown, "left"]
    assert "44:26:40" in out
    assert "…" not in out
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "left" not in headers(capsys.readouterr().out)  # nothing to wait for


@pytest.mark.parametrize("columns", ["60", "80", "160"])
def test_several_runs_are_a_table(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for arm in ("soft", "hard"):
        for seed in range(2):
            lines = [line(20, **FULL)]
            path = tmp_path / arm / f"seed_{seed}"
            make(path, lines=lines, steps=20, finished=seed == 0)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert out.count("20/20") == 4
    assert out.count("finish") == out.count("killed") == 2
    assert "soft/seed_1" in out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_it_ends_when_all_are_finished(tmp_path, capsys):
    make(tmp_path, steps=20, lines=[line(20)], finished=True)
    assert main(["watch", str(tmp_path)]) == 0
    assert "finished" in capsys.readouterr().out


def test_it_follows_a_run_until_it_is_interrupted(tmp_path, capsys, monkeypatch):
    path, looks = make(tmp_path, lines=[line(10)]), []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line(10 + len(looks))) + "\n")

    monkeypatch.setattr("distilljax.cli.watch.time.sleep", sleep)
    assert main(["watch", str(tmp_path), "--every-secs=0.5"]) == 0
    assert looks == [0.5] * 3
    assert "12/100" in capsys.readouterr().out


def test_no_folder_and_no_run(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "nowhere"), "--once"]) == 1
    assert "W must be a folder that exists" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "no run here yet" in capsys.readouterr().out
