"""The committed measurements of checkpoints and restarts keep their limits."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "resume.json"


def test_a_restart_is_soon_at_work_and_checkpoints_cost_little():
    """The ratio of rates says nothing where other work ran beside it: then the share
    of the host's time that starting checkpoints takes is held."""
    found = json.loads(RESULTS.read_text())
    assert {"date", "machine", "versions", "load_before"} <= found.keys()
    assert found["restart"]["to_cold"] <= 1.5
    assert found["restart"]["to_warm"] <= 1.5
    cost = found["checkpoints"]
    assert cost["every_steps"] == 50
    assert cost["shares"]["share_checkpoint"] <= 0.03
    if found["load_before"] < 0.5:
        assert cost["ratio"] >= 0.97
