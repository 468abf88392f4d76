"""The committed measurements of a store keep the limits that were set for it."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "store.json"


def test_a_signal_takes_few_bytes_and_is_read_fast():
    found = json.loads(RESULTS.read_text())
    assert {"date", "machine", "versions"} <= found.keys()
    coding = found["coding"]
    for kind, most, least in (
        ("sampled", 34, 200_000),
        ("top32_log8", 110, 200_000),
        ("top128_log8", 330, 50_000),
    ):
        for length in ("long", "short"):
            case = coding[kind][length]
            assert case["bytes_per_token"] <= most, kind
            assert case["decode_tokens_per_sec"] >= least, kind
    for kind in coding.values():
        for rows in kind.get("kl", {}).values():
            assert all(kl["mean"] <= 3e-4 for kl in rows.values())
    for kinds in found["disk"].values():
        assert kinds["sampled_50"]["read_per_cpu_second"] >= 200_000
        assert kinds["top_128"]["read_per_cpu_second"] >= 50_000


def test_training_does_not_wait_and_a_killed_writer_loses_nothing():
    found = json.loads(RESULTS.read_text())
    assert found["waiting"]["share"] < 0.02
    assert found["kills"]["kills"] == 20
    assert found["kills"]["byte_identical"] is True
    killed = found["kills"]["killed"]
    assert [one["same"] for one in killed] == [True] * 20  # each was compared
    assert {one["kind"] for one in killed} == {"sampled_50", "hidden"}
    assert len({one["shards"] for one in killed}) > 5
