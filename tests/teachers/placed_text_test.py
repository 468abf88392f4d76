"""Language models whose teachers have devices of their own, by the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distilljax.cli import main
from tests.processes import environment
from tests.saved import losses, records, saved_steps

TEXT = Path(__file__).with_name("placing_text.py")
TRAIN = ["train", str(TEXT), "--seeds", "0"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arm", "bytes_per_token"),
    [
        ("inline", 2 * 16 * 4),  # hidden states, and the feature that is read
        ("int8", 2 * 16 * 4),
        ("two", (16 + 24) * 4),
    ],
)
def test_hidden_states_and_features_travel_and_the_losses_stay(
    tmp_path, arm, bytes_per_token
):
    """With gradient accumulation, int8 weights, two teachers; kernels are sent once."""
    away = "away" if arm == "inline" else f"{arm}_away"
    words = [*TRAIN, "--workdir", str(tmp_path), "--arms", f"{arm},{away}"]
    assert main(words) == 0
    one, other = (tmp_path / name / "seed_0" for name in (arm, away))
    assert len(losses(one)) == 6
    for step, loss in losses(one).items():
        assert losses(other)[step] == pytest.approx(loss, rel=1e-5)
    found = json.loads((other / "results.json").read_text())
    assert found["teacher_bytes_per_token"] == bytes_per_token


def test_a_teacher_that_raises_ends_the_run_in_its_own_words(tmp_path):
    """What was saved before is good, and the same command goes on from it."""

    def run(workdir: Path, answers: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "distilljax", *TRAIN, "--arms", "raises"]
        return subprocess.run(
            [*command, "--workdir", str(workdir)],
            env={**environment(num_devices=8), "ANSWERS": str(answers)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    assert run(tmp_path / "whole", 1000).returncode == 0
    stopped = run(tmp_path / "stopped", 4)
    assert stopped.returncode == 1
    assert "the teacher has had enough" in stopped.stderr
    folder = tmp_path / "stopped/raises/seed_0"
    assert saved_steps(folder) == [2]
    assert run(tmp_path / "stopped", 1000).returncode == 0
    assert losses(folder) == losses(tmp_path / "whole/raises/seed_0")
    assert [r["step"] for r in records(folder)] == list(range(1, 7))
