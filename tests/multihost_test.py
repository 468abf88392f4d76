"""Several processes on one machine, through the real command line (gloo, loopback).

Two processes with four devices each are one process with eight: the same parameters,
the same metrics, the same files, written once. A run that one of them is told to stop is
saved by both at the same step, and goes on in one process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from distilljax.config import load_experiment
from distilljax.workdir import TrainedRun

REPO = Path(__file__).parents[1]
CONFIG = REPO / "configs" / "digits" / "teacher.py"
TIMEOUT_SECS = 300
pytestmark = pytest.mark.slow


def start(workdir: Path, devices: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "distilljax", "train", str(CONFIG)]
    fixed = ["--mesh=data=4,fsdp=2", "--loader.batch-size=64", "--log-every-steps=5"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "DISTILLJAX_TRACEBACK": "1",
    }
    return subprocess.Popen(
        [*command, "--workdir", str(workdir), *fixed, *flags],
        env=environment,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(workdir: Path, *flags: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = ["--multihost", f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    return [
        start(workdir, 4, *group, f"--process-id={index}", *flags) for index in (0, 1)
    ]


def finish(*processes: subprocess.Popen) -> list[str]:
    """Wait for all; none outlives the test, and none may have failed."""
    try:
        outputs = [p.communicate(timeout=TIMEOUT_SECS)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(processes), outputs
    return outputs


def records(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def parameters(workdir: Path) -> list[np.ndarray]:
    state = nnx.state(TrainedRun(str(workdir))(), nnx.Param)
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_two_processes_equal_one(tmp_path):
    flags = ("--steps=20", "--eval-every-steps=10")
    outputs = finish(*start_two(tmp_path / "two", *flags))
    finish(start(tmp_path / "one", 8, *flags))

    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two) == 6  # process 0 alone writes
    timed = ("seconds", "examples_per_second")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {*timed, "split"}:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)
    for a, b in zip(
        parameters(tmp_path / "one"), parameters(tmp_path / "two"), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert "step 20/20" in outputs[0]
    assert "step 20/20" not in outputs[1]
    files = {p.name for p in (tmp_path / "two").iterdir()}
    assert files == {p.name for p in (tmp_path / "one").iterdir()}


def test_stopped_as_two_and_resumed_as_one(tmp_path):
    processes = start_two(tmp_path, "--steps=100000", "--checkpoint-every-steps=100000")
    deadline = time.monotonic() + TIMEOUT_SECS
    path = tmp_path / "metrics.jsonl"
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)  # to one of them alone
    outputs = finish(*processes)
    assert "stopped and saved at step" in outputs[0]
    (saved,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert f"at step {saved} of" in outputs[0]

    steps = saved + 5
    (output,) = finish(start(tmp_path, 8, f"--steps={steps}"))
    assert f"step {steps}/{steps}" in output
    after = [r for r in records(tmp_path) if r["split"] == "train"]
    assert [r["step"] for r in after if r["step"] > saved]
    numbers = [r["step"] for r in after]
    assert numbers == sorted(set(numbers))  # nothing is repeated
    config = load_experiment(CONFIG).config(0)
    assert len(parameters(tmp_path)) == 2 * (len(config.student.hidden) + 1)
