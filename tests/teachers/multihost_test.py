"""Two processes, each with devices of the teacher and of the student."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multihost_test import Processes, assert_close, run
from tests.processes import environment
from tests.saved import losses

pytestmark = pytest.mark.slow

PLACING = str(Path(__file__).with_name("placing.py"))
WORDS = ["--steps=10", "--mesh=data=-1", "--loader.batch-size=16"]


def test_two_processes_with_a_teacher_in_each_learn_what_one_learns(tmp_path):
    """Each sends what its own devices hold to its own devices."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(1, alone, *WORDS, config=PLACING)
    outputs = run(2, together, *WORDS, "--keep-last=9", config=PLACING)
    assert "the teacher on 4 devices (tensor=4)" in outputs[0]
    assert_close(alone, together, 10)
    for step, loss in losses(alone).items():
        assert losses(together)[step] == pytest.approx(loss, rel=1e-5)
    one, two = (json.loads((w / "results.json").read_text()) for w in (alone, together))
    assert two["machine"]["num_processes"] == 2
    assert two["teacher_fingerprint"] == one["teacher_fingerprint"]
    assert two["teacher_bytes_per_token"] == one["teacher_bytes_per_token"] == 12
    for who in ("student", "teacher"):
        assert two[who]["nll"] == pytest.approx(one[who]["nll"], rel=1e-4)


def test_a_teacher_of_one_process_alone_is_refused_with_the_alternative(tmp_path):
    """The runtime does not send from one process to another."""
    words = [*WORDS, "--teacher.devices", "4:8"]
    with Processes(2, tmp_path / "new", *words, config=PLACING) as processes:
        assert processes.codes() == [1, 1], processes.outputs
    assert "each process must have devices of both" in processes.outputs[0]
    assert "--teacher.in-step" in processes.outputs[0]
    assert not (tmp_path / "new/config.json").exists()
    words = [*WORDS, "--teacher.in-step", "True", "--teacher.mesh", "tensor=8"]
    run(2, tmp_path / "in_step", *words, config=PLACING)


SENDING = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
of = {d.process_index: d for d in jax.devices()}
x = jax.device_put(jax.numpy.arange(3.0), of[jax.process_index()])
other = of[1 - jax.process_index()]
try:
    jax.block_until_ready(jax.device_put(x, other))
except Exception as error:
    print("refused", type(error).__name__, str(error)[:200])
else:
    print("sent")
"""


def test_the_runtime_does_not_send_from_one_process_to_another(tmp_path):
    """If this fails, JAX has learnt to: a teacher can have its own processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SENDING, address, str(i)],
            env=environment(num_devices=1),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    refusal = "Cross-host transfers are not supported by this backend"
    assert all(refusal in text for text in told), told
