"""The committed measurements of the step keep the limits that were set for it."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "step.json"


def test_the_step_costs_no_more_than_a_hand_written_one():
    found = json.loads(RESULTS.read_text())
    assert {"date", "machine", "versions"} <= found.keys()
    for name, case in found["step"].items():
        assert case["time_ratio"] <= 1.05, name
        assert case["temp_ratio"] <= 1.0, name
        assert case["compilations"] == 1, name
        assert case["transfer_guard_in_loop"] == "disallow", name
    assert found["end_to_end"]["convnet_28x28_batch_256"]["ratio"] >= 0.8
    assert found["import_seconds"]["extra"] <= 0.3
