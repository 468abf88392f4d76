"""The check of the demo: it agrees with the README, and notices what has changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import demo  # noqa: E402

README = (REPOSITORY / "README.md").read_text()


def write_run(root: Path, row: demo.Row, arm: str, seed: int, value: float) -> None:
    """Results in which accuracy and recall are both the value."""
    path = root / row.experiment / arm / f"seed_{seed}" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    per_class = {"correct": [value * 1000] * 4, "count": [1000] * 4}
    student = {"accuracy": value, "per_class": per_class}
    names = ["0", "1", "2", "3"]
    path.write_text(json.dumps({"student": student, "class_names": names}))


def runs(root: Path, row: demo.Row, better: float = 0.0) -> None:
    before, after, *_ = demo.written(README, row.text)
    for seed in range(5):
        write_run(root, row, "hard_labels", seed, before)
        # a spread, so that there is an interval
        write_run(root, row, row.arm, seed, after + better + 0.001 * (seed - 2))


@pytest.mark.parametrize("row", demo.ROWS, ids=lambda row: row.text)
def test_the_readme_agrees_with_itself(tmp_path, row):
    runs(tmp_path, row)
    assert demo.check(row, tmp_path, README) is None


@pytest.mark.parametrize("row", demo.ROWS, ids=lambda row: row.text)
def test_a_lost_effect_and_a_moved_number_are_noticed(tmp_path, row):
    runs(tmp_path / "lost", row, better=-0.2)
    assert "the interval begins" in (demo.check(row, tmp_path / "lost", README) or "")
    runs(tmp_path / "moved", row, better=0.03)
    assert "and not" in (demo.check(row, tmp_path / "moved", README) or "")
    assert "0 and 0 runs" in (demo.check(row, tmp_path / "none", README) or "")
