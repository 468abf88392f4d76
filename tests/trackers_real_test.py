"""W&B and trackio as they are installed: what their files have of a run.

`make test-others` has both in an environment of its own; elsewhere this is skipped.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import environment
from tests.saved import records, saved_steps

internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
pytest.importorskip("trackio")
pytestmark = pytest.mark.slow

TINY = str(Path(__file__).parent / "cli" / "tiny.py")
Number = tuple[int, str, float]


@dataclass(frozen=True)
class Kept:
    """What a tracker has of one run, over all its restarts."""

    project: str
    name: str
    config: dict[str, Any]
    """As it was told last."""
    numbers: list[Number]
    """Step, name and value; what was logged twice is there twice."""


def in_order(numbers: list[Number]) -> list[Number]:
    """All but the seconds: each writer looks at the clock by itself."""
    return sorted(x for x in numbers if not x[1].endswith("/seconds"))


def start(folder: Path, *words: str, code: str | None = None) -> subprocess.Popen:
    """``distilljax ...``, or Python code, with trackers that write below a folder."""
    own = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    command = ["-c", code] if code else ["-m", "distilljax"]
    return subprocess.Popen(
        [sys.executable, *command, *words],
        env=environment(num_devices=1) | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def entries(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: a log as LevelDB writes it, of protobufs.

    Blocks of 32 KiB hold pieces, each with a checksum, its length, and whether it is
    whole (1), the first (2), in the middle (3) or the last of an entry (4).
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, entry = 7, b""
    while at < len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = internal.Record()
            record.ParseFromString(entry)
            yield record
            entry = b""


def in_wandb(workdir: Path) -> Kept:
    """What is in the files of a run that was offline: one for each start."""
    paths = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
    found = [record for path in paths for record in entries(path)]
    runs = [r.run for r in found if r.HasField("run")]
    assert len({(run.project, run.run_id) for run in runs}) == 1
    steps = [r.metric for r in found if r.HasField("metric")]
    assert {(m.glob_name, m.step_metric) for m in steps} == {("*", "step")}
    numbers = []
    for record in found:
        if record.HasField("history"):
            row = {"/".join(i.nested_key) or i.key: i for i in record.history.item}
            row = {name: json.loads(item.value_json) for name, item in row.items()}
            step = row.pop("step")
            own = {name for name in row if name.startswith("_")}
            numbers += [(step, name, row[name]) for name in row.keys() - own]
    config = {x.key: json.loads(x.value_json) for x in runs[-1].config.update}
    config.pop("_wandb")
    return Kept(runs[0].project, runs[0].run_id, config, in_order(numbers))


def in_trackio(workdir: Path, folder: Path) -> Kept:
    """What is in the database of the only project."""
    (path,) = (folder / "trackio").glob("*.db")
    name = (workdir / "trackio_run.txt").read_text().strip()
    with sqlite3.connect(path) as base:
        rows = base.execute(
            "SELECT step, metrics FROM metrics WHERE run_name = ?", [name]
        ).fetchall()
        ((config,),) = base.execute(
            "SELECT config FROM configs WHERE run_name = ?", [name]
        ).fetchall()
    numbers = [(step, *item) for step, row in rows for item in json.loads(row).items()]
    config = {k: x for k, x in json.loads(config).items() if not k.startswith("_")}
    return Kept(path.stem, name, config, in_order(numbers))


def expected(workdir: Path, project: str, tracker: str) -> Kept:
    """What a tracker should have: what is in the workdir."""
    config = json.loads((workdir / "config.json").read_text())
    del config["_type"]
    name = (workdir / f"{tracker}_run.txt").read_text().strip()
    numbers = [
        (record["step"], f"{split}/{name}", value)
        for split in ("train", "validation")
        for record in records(workdir, split)
        for name, value in record.items()
        if isinstance(value, int | float) and name != "step"
    ]
    return Kept(project, name, config, in_order(numbers))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """A run that was told to stop, and went on; its name has a slash."""
    folder = tmp_path_factory.mktemp("resumed")
    workdir = folder / "run"
    words = ["train", TINY, "--workdir", str(workdir), "--name=clouds/tiny"]
    words += ["--log=wandb,trackio", "--log-every-steps=5", "--eval-every-steps=20"]
    process = start(folder, *words, "--steps=100000")
    deadline = time.monotonic() + 120
    while len(records(workdir, "validation")) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finish(process)
    finish(start(folder, *words, f"--steps={saved_steps(workdir)[-1] + 12}"))
    return folder


def test_wandb_has_every_number_of_a_resumed_run_once(resumed):
    workdir = resumed / "run"
    assert in_wandb(workdir) == expected(workdir, "clouds_tiny", "wandb")


def test_trackio_has_every_number_of_a_resumed_run_once(resumed):
    workdir = resumed / "run"
    kept = in_trackio(workdir, resumed)
    assert kept == expected(workdir, "clouds_tiny", "trackio")


def test_runs_of_one_command_are_runs_of_their_own_in_the_project_of_the_environment(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    words = ["train", TINY, "--workdir", str(tmp_path), "--seeds=0,1"]
    words += ["--arms=hard_labels", "--log=wandb,trackio"]
    finish(start(tmp_path, *words))
    for seed in (0, 1):
        workdir = tmp_path / "hard_labels" / f"seed_{seed}"
        assert in_wandb(workdir) == expected(workdir, "mine", "wandb")
        kept = in_trackio(workdir, tmp_path)
        assert kept == expected(workdir, "mine", "trackio")
        assert kept.config["seed"] == seed


WRITER = """
import importlib, sys
from pathlib import Path
from distilljax.trackers import TrackerWriter

writer = TrackerWriter(importlib.import_module(sys.argv[1]), Path(sys.argv[2]), "a", {})
nan, inf = float("nan"), float("inf")
record = {"step": 3, "split": "train", "loss": 0.5, "kd": nan, "rate": inf}
writer.write({**record, "goodput": None})
writer.write({"step": 4, "split": "train", "loss": nan})
writer.write({"step": 5, "split": "train", "loss": 0.25})
writer.close()
"""


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_what_is_not_finite_is_left_out_and_the_rest_is_kept(tmp_path, tracker):
    finish(start(tmp_path, tracker, str(tmp_path), code=WRITER))
    if tracker == "wandb":
        kept = in_wandb(tmp_path)
    else:
        kept = in_trackio(tmp_path, tmp_path)
    assert kept.numbers == [(3, "train/loss", 0.5), (5, "train/loss", 0.25)]
