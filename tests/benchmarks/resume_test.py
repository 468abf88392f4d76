"""The committed measurements of checkpoints and restarts keep their limits."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "resume.json"


def test_a_restart_is_soon_at_work_and_checkpoints_cost_little():
    """Of steps that are long enough for the same CPU's work for a checkpoint; of those
    that are not, docs/benchmarks.md marks what was missed."""
    found = json.loads(RESULTS.read_text())
    assert {"date", "machine", "versions", "load_before"} <= found.keys()
    assert found["restart"]["to_cold"] <= 1.5
    assert found["restart"]["to_warm"] <= 1.5
    cost = found["longer_steps"]
    assert cost["every_steps"] == found["checkpoints"]["every_steps"] == 50
    assert cost["step_ms"] < 120
    assert cost["share_checkpoint"] <= 0.03
    assert cost["ratio"][1] >= 0.97
