"""`distilljax cache`, as it is typed; and in two processes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distilljax.cli import main
from distilljax.teachers import SignalStore
from tests.processes import environment
from tests.saved import records

CONFIG = Path(__file__).with_name("cached.py")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "store"
    assert main(["cache", str(CONFIG), "--out", str(out), "--kind", "hidden"]) == 0
    return out


def test_a_store_is_written_described_and_verified(store, capsys):
    assert main(["cache", str(CONFIG), "--out", str(store), "--kind", "hidden"]) == 0
    written = capsys.readouterr().out
    assert "already finished" in written
    assert main(["cache", "info", str(store)]) == 0
    shown = capsys.readouterr().out
    assert shown in written
    assert "hidden (dtype=same) of 264 classes" in shown
    assert "licence     data: CC0" in shown
    assert main(["cache", "info", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == 1
    assert main(["cache", "verify", str(store), "--rows", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 4
    assert found["logits"]["relative_to_rms"] < 1e-4


def test_a_student_is_trained_from_it(store, tmp_path):
    for arm in ("online", "cached"):
        words = ["--workdir", str(tmp_path / arm), "--arms", arm]
        if arm == "cached":
            words += [f"--teacher.store={store}"]
        assert main(["train", str(CONFIG), *words]) == 0
    online, cached = (
        [
            r["loss"]
            for r in records(tmp_path / arm / arm / "seed_0")
            if r["split"] == "train"
        ]
        for arm in ("online", "cached")
    )
    np.testing.assert_allclose(cached, online, rtol=1e-5)


def test_the_grid_has_the_temperature_of_the_objective(tmp_path, capsys):
    out = tmp_path / "store"
    words = ["cache", str(CONFIG), "--out", str(out), "--kind", "top_k", "--k=4"]
    assert main([*words, "--objective.temperature=3"]) == 0
    assert SignalStore(out).kind.temperatures == (1.0, 3.0)
    assert "coding      costs" in capsys.readouterr().out


def test_another_teacher_is_noticed(store, tmp_path, capsys):
    from distilljax.teachers.store import digest_of

    other = shutil.copytree(store, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["config"]["teacher"]["seed"] = 8
    manifest["digest"] = digest_of(manifest)
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert main(["cache", "verify", str(other)]) == 1
    assert "the teacher must be the one that was asked" in capsys.readouterr().err


def test_other_answers_are_noticed(store, tmp_path, capsys):
    """A store whose bytes are whole, of a teacher that says something else."""
    from distilljax.teachers.store import digest_of

    words = ["cache", str(CONFIG), "--out", str(tmp_path / "other"), "--kind", "hidden"]
    assert main([*words, "--teacher.seed=8"]) == 0
    theirs = json.loads((tmp_path / "other" / "manifest.json").read_text())
    ours = json.loads((store / "manifest.json").read_text())
    theirs |= {"teacher": ours["teacher"], "config": ours["config"]}
    theirs["digest"] = digest_of(theirs)
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(theirs))
    capsys.readouterr()
    assert main(["cache", "verify", str(tmp_path / "other")]) == 1
    assert json.loads(capsys.readouterr().out)["same"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache"], "required"),
        (["cache", str(CONFIG), "--out", "x"], "--kind"),
        (["cache", str(CONFIG), "--out", "x", "--kind", "all"], "invalid choice"),
        (["cache", "info"], "DIR"),
    ],
)
def test_a_wrong_command_says_what_is_missing(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_a_folder_without_a_store_is_named(tmp_path, capsys):
    assert main(["cache", "info", str(tmp_path)]) == 1
    assert "Write it: distilljax cache CONFIG --out DIR" in capsys.readouterr().err


def test_help_says_which_kind_is_for_what(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    assert "30 bytes per token" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_write_what_one_does_and_either_is_read_by_both(tmp_path):
    """Sampled, so that another rounding would be another byte."""
    words = ["--kind", "hidden", "--shard-rows", "4", "--eval-batch-size=8"]
    for count in (2, 1):
        out = str(tmp_path / f"by{count}")
        run(count, ["cache", str(CONFIG), "--out", out, *words])
    one, two = (SignalStore(tmp_path / f"by{count}") for count in (1, 2))
    keys = np.arange(one.manifest["counts"]["units"])
    (a, _), (b, _) = (s.decode(s.units(keys)) for s in (one, two))
    np.testing.assert_allclose(a["hidden"], b["hidden"], rtol=1e-5, atol=1e-6)
    assert len(two.manifest["shards"]) == len(one.manifest["shards"]) > 2
    losses = []
    for count, store in ((1, "by2"), (2, "by1")):
        workdir = tmp_path / f"run{count}"
        words = ["--workdir", str(workdir), "--arms", "cached"]
        run(count, ["train", str(CONFIG), *words,
                    f"--teacher.store={tmp_path / store}"])  # fmt: skip
        found = records(workdir / "cached" / "seed_0")
        losses.append([r["loss"] for r in found if r["split"] == "train"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def run(count: int, words: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for i in range(count):
        command = [sys.executable, "-m", "distilljax", *words]
        if count > 1:
            command += ["--multihost", "--coordinator", f"127.0.0.1:{port}"]
            command += ["--num-processes", str(count), "--process-id", str(i)]
        running.append(
            subprocess.Popen(
                command,
                env=environment(num_devices=8 // count),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        for process in running:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()
