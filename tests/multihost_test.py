"""Several processes with eight devices together, as on machines: gloo over loopback.

They learn what one process learns, go on where any number of them stopped, and end
together: when one of them is told to, and when one is lost.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distilljax._functional import freeze
from distilljax.workdir import TrainedRun, fingerprint
from tests.processes import Command, environment
from tests.saved import losses, records, saved_arrays, saved_steps

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
DIGITS = str(REPOSITORY / "configs" / "digits" / "teacher.py")
DISTILLED = str(REPOSITORY / "configs" / "digits" / "all_data.py")
OWNING = str(REPOSITORY / "tests" / "cli" / "owning.py")
SHORT = ["--student.hidden", "32", "--student.dropout=0", "--student.input-dropout=0"]
SHORT += ["--loader.batch-size=96", "--mesh=data=4,fsdp=2", "--log-every-steps=1"]
SHORT += ["--checkpoint-every-steps=5", "--eval-every-steps=10"]


class Processes(Command):
    """A short run of digits."""

    def __init__(
        self,
        count: int,
        workdir: Path,
        *words: str,
        config: str = DIGITS,
        verb: str = "train",
    ):
        super().__init__(
            count, [verb, config, *SHORT, "--workdir", str(workdir), *words]
        )


def run(count: int, workdir: Path, *words: str, **options: str) -> list[str]:
    with Processes(count, workdir, *words, **options) as processes:
        assert processes.codes() == [0] * count, processes.outputs
        return processes.outputs


def assert_close(a: Path, b: Path, step: int) -> None:
    one, other = saved_arrays(a, step), saved_arrays(b, step)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(
            one[path], other[path], rtol=1e-5, atol=1e-5, err_msg=path
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The reference: one process with eight devices, and a checkpoint on the way."""
    workdir = tmp_path_factory.mktemp("alone")
    run(1, workdir, "--steps=30", "--keep-last=9")
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, list[str]]:
    workdir = tmp_path_factory.mktemp("together")
    return workdir, run(2, workdir, "--steps=20")


def test_two_processes_learn_what_one_learns(alone, together):
    workdir, outputs = together
    assert_close(alone, workdir, 20)
    ours = [r for r in records(alone, "validation") if r["step"] == 20]
    theirs = [r for r in records(workdir, "validation") if r["step"] == 20]
    assert len(ours) == len(theirs) == 1
    for name in ("accuracy", "nll"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4)
    results = json.loads((workdir / "results.json").read_text())
    assert results["machine"]["num_processes"] == 2
    # process 0 alone speaks, and writes
    assert "test accuracy" in outputs[0]
    assert "step 20/20" in outputs[0]
    assert "accuracy" not in outputs[1]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [(r["split"], r["step"]) for r in map(json.loads, lines)]
    assert len(set(found)) == len(found) == 20 + 2
    assert len(list((workdir / "tensorboard").iterdir())) == 1


def test_one_process_goes_on_where_two_stopped(alone, together, tmp_path):
    """Also in the data: its state does not know how many read it."""
    workdir = tmp_path / "more"
    shutil.copytree(together[0], workdir)
    (output,) = run(1, workdir, "--steps=30")
    assert "step 21/30" in output
    assert "step 20/30" not in output
    assert_close(alone, workdir, 30)


def test_four_processes_go_on_where_one_stopped(alone, tmp_path):
    """Each reads a quarter of the rows that the one would have read next."""
    run(1, tmp_path, "--steps=20")
    outputs = run(4, tmp_path, "--steps=30")
    assert "step 21/30" in outputs[0]
    assert "step 20/30" not in outputs[0]
    assert_close(alone, tmp_path, 30)
    ours, theirs = losses(tmp_path), losses(alone)
    assert list(ours) == list(theirs) == list(range(1, 31))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_two_processes_fall_back_together_and_save_by_one_clock(alone, tmp_path):
    """Process 0 finds the damage, and its clock says when a checkpoint is due."""
    workdir = tmp_path / "run"
    run(2, workdir, "--steps=20")
    newest = workdir / "checkpoints" / "20"
    path = max(newest.rglob("d/*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    words = ["--steps=25", "--checkpoint-every-steps=100", "--keep-last=99"]
    outputs = run(2, workdir, *words, "--checkpoint-every-secs=1e-6")
    assert "the checkpoint of step 20 must be complete" in outputs[0]
    assert "Going on from that of step 15" in outputs[0]
    assert "step 16/25" in outputs[0]
    assert "must be complete" not in outputs[1]
    assert saved_steps(workdir)[-10:] == list(range(16, 26))
    assert_close(alone, workdir, 25)


def test_a_teacher_is_restored_onto_the_mesh_of_two_processes(alone, tmp_path):
    """Its arrays are split over both: none of them has the whole."""
    words = ["--teacher.workdir", str(alone), "--steps=2", "--mesh=fsdp=8"]
    run(2, tmp_path, *words, config=DISTILLED)
    results = json.loads((tmp_path / "results.json").read_text())
    _, state = freeze(TrainedRun(str(alone))(), None)
    assert results["teacher_fingerprint"] == fingerprint(state)
    teacher = json.loads((alone / "results.json").read_text())["student"]
    assert results["teacher"]["accuracy"] == teacher["accuracy"]
    assert results["teacher"]["nll"] == pytest.approx(teacher["nll"], rel=1e-5)


def numbers(record: dict) -> dict[str, float]:
    """What does not depend on the clock."""
    left_out = ("split", "seconds", "examples_per", "flops_per", "goodput", "share_")
    return {name: x for name, x in record.items() if not name.startswith(left_out)}


def test_what_an_objective_owns_is_the_same_on_two_processes(tmp_path):
    """A projection with its moments, and a queue of what all of them have seen."""
    words = ["--seeds=0", "--steps=10"]
    run(1, tmp_path / "alone", *words, config=OWNING)
    run(2, tmp_path / "together", *words, config=OWNING)
    for arm, owned in (
        ("projection", "['params']['objective']['hint']"),
        ("queue", "['objective_state']['crowd']['queue']"),
    ):
        one, two = (tmp_path / who / arm / "seed_0" for who in ("alone", "together"))
        assert any(path.startswith(owned) for path in saved_arrays(two, 10))
        assert_close(one, two, 10)
        ours, theirs = ([numbers(r) for r in records(w)] for w in (one, two))
        assert len(ours) == len(theirs) == 10
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("count", "told"), [(2, 1), (4, 2)])
def test_sigterm_to_one_of_several_saves_the_same_step_on_all(tmp_path, count, told):
    """Each writes its shards: what is saved is whole, and all of it of one step."""
    words = ["--steps=100000", "--checkpoint-every-steps=100000"]
    words += ["--eval-every-steps=100000"]
    with Processes(count, tmp_path, *words) as processes:
        processes.until(lambda: "step 20/" in processes.outputs[0])
        processes.running[told].send_signal(signal.SIGTERM)
        assert processes.codes() == [0] * count, processes.outputs
        (step,) = saved_steps(tmp_path)
        assert f"stopped and saved at step {step} of 100000" in processes.outputs[0]
    assert saved_arrays(tmp_path, step)["['step']"] == step


@pytest.mark.parametrize(("count", "killed"), [(2, 1), (2, 0), (4, 2)])
def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(
    count, killed, alone, tmp_path
):
    """In bounded time, with words; and nothing that was saved is lost."""
    words = ["--steps=30", "--keep-last=9", "--peer-timeout-secs=8"]
    with Processes(count, tmp_path, *words) as processes:
        processes.until(lambda: "step 11/" in processes.outputs[0])
        start = time.monotonic()
        processes.running[killed].kill()
        codes = processes.codes(timeout_secs=60)
        assert 0 not in codes, processes.outputs
        assert time.monotonic() - start < 45
    del processes.outputs[killed]
    told = f"process {killed} of {count} must answer within 8 s"
    aborted = "its runtime aborted, as it may when another process is gone"
    for output in processes.outputs:  # gloo or JAX may abort any of them, in its words
        (line,) = [x for x in output.splitlines() if x.startswith("error: distilljax:")]
        assert told in line or aborted in line
        assert killed != 0 or "process 0" in line
    run(count, tmp_path, "--steps=30", "--keep-last=9")
    assert_close(alone, tmp_path, 30)


def test_four_processes_learn_what_one_learns_and_two_go_on(alone, tmp_path):
    outputs = run(4, tmp_path, "--steps=20")
    assert_close(alone, tmp_path, 20)
    assert "test accuracy" in outputs[0]
    assert not any("accuracy" in output for output in outputs[1:])
    outputs = run(2, tmp_path, "--steps=30")
    assert "step 21/30" in outputs[0]
    assert_close(alone, tmp_path, 30)


def test_an_error_of_the_folder_ends_both(together):
    """Process 0 refuses; the other must not wait for it."""
    workdir, _ = together
    before = (workdir / "config.json").read_bytes()
    with Processes(2, workdir, "--steps=20", "--optimizer.b1=0.5") as processes:
        assert processes.codes() == [1, 1], processes.outputs
        assert "optimizer.b1: 0.9 -> 0.5" in processes.outputs[0]
        assert "process 0" in processes.outputs[1]
    assert (workdir / "config.json").read_bytes() == before


def test_two_processes_evaluate_as_one_and_the_first_speaks(together):
    workdir, _ = together
    words = ["--split", "test"]
    outputs = run(2, workdir, *words, "--steps=20", verb="evaluate")
    results = json.loads((workdir / "results.json").read_text())
    accuracy = f"{results['student']['accuracy']:.4f}"
    assert accuracy[:5] in outputs[0], outputs
    assert accuracy[:5] not in outputs[1]


FAILING = """
from dataclasses import dataclass, replace
from distilljax.config import load_experiment


@dataclass(frozen=True)
class Failing:
    data: object

    def __call__(self):
        import jax

        if jax.process_index() == 1:
            raise RuntimeError("a shard that cannot be read")
        return self.data()


def config(seed=0):
    found = load_experiment({path!r}).config(seed)
    return replace(found, data=Failing(found.data))
"""


def test_a_process_that_fails_ends_the_other_at_once(tmp_path):
    """Its error is of a user's code, on one host; the other is not left waiting."""
    path = tmp_path / "failing.py"
    path.write_text(FAILING.format(path=DIGITS))
    words = ["--steps=20", "--peer-timeout-secs=40"]
    with Processes(2, tmp_path / "run", *words, config=str(path)) as processes:
        processes.running[1].wait(timeout=120)
        start = time.monotonic()
        assert processes.codes(timeout_secs=60) == [1, 1], processes.outputs
        assert time.monotonic() - start < 30
    assert "a shard that cannot be read" in processes.outputs[1]
    assert "process 1 of 2" in processes.outputs[0]
    assert "an error there, which it has printed" in processes.outputs[0]


def test_several_processes_without_a_coordinator_are_told_what_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "distilljax", "train", DIGITS, "--workdir", tmp_path,
         "--multihost"],
        capture_output=True, text=True, env=environment(num_devices=1), timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--coordinator HOST:PORT --num-processes N --process-id I" in done.stderr
    assert "Traceback" not in done.stderr
