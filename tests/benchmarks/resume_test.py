"""The committed measurements of checkpoints and restarts keep their limits."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "resume.json"


def test_a_restart_is_soon_at_work_and_checkpoints_cost_little():
    """Where the steps are so short that the same CPU's work for a checkpoint is more
    than .03 of them, the share of the host's time that starting one takes is held."""
    found = json.loads(RESULTS.read_text())
    assert {"date", "machine", "versions", "load_before"} <= found.keys()
    assert found["restart"]["to_cold"] <= 1.5
    assert found["restart"]["to_warm"] <= 1.5
    for cost in (found["checkpoints"], found["longer_steps"]):
        assert cost["every_steps"] == 50
        assert cost["share_checkpoint"] <= 0.03
    assert found["longer_steps"]["ratio"][1] >= 0.97
