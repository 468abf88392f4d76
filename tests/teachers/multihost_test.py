"""Two processes, each with devices of the teacher and of the student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.multihost_test import Processes, assert_close, run
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
