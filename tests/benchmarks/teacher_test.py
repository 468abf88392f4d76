"""The committed measurements of where the teacher runs keep their limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/teacher.json"


@pytest.fixture(scope="module")
def found():
    return json.loads(RESULTS.read_text())


def test_a_teacher_with_tensor_parallelism_gathers_no_parameters(found):
    """Partial products are summed, twice in a layer, and the parameters stay in place.

    The student's step gathers the kernel of the head once, for its own mesh.
    """
    assert {"date", "machine", "versions"} <= found.keys()
    kernel = 4 * 256 * 2048
    for name, case in found["programs"].items():
        alone = case["two_programs"]["teacher"]["collectives"]
        assert alone.get("all-gather", {"bytes": 0})["bytes"] < kernel / 8, name
        assert alone["all-reduce"]["count"] <= 2 * 4 + 1, name
    together = found["programs"]["data_and_tensor"]["own_sharding"]["collectives"]
    assert together["all-gather"]["bytes"] < 1.1 * kernel


def test_two_programs_and_own_sharding_save_memory(found):
    """A teacher that is split lies in no device whole, as it does beside data alone."""
    case = found["programs"]["data_and_tensor"]
    parameters = 4 * (4 * (4 * 256**2 + 3 * 256 * 1024) + 2 * 256 * 2048)
    inline, own = case["inline"], case["own_sharding"]
    saved = inline["argument_bytes"] - own["argument_bytes"]
    assert saved > 0.8 * parameters * 7 / 8
    two = case["two_programs"]
    assert two["teacher"]["argument_bytes"] < parameters / 7
    assert two["bytes_per_token"] == 4 * 256
    assert two["logits_bytes_per_token"] == 8 * two["bytes_per_token"]


def test_the_slower_one_sets_the_pace(found):
    """Of programs that keep no core busy: at most 3 % beyond the ideal."""
    for case in found["overlap"]["waiting"]:
        assert case["streamed_to_ideal"] <= 1.03, case
        assert case["teacher_started_before_the_student_ended"] == 1.0, case
        assert case["both_busy"] > 0.85, case
        assert case["inline_ms"] > case["teacher_ms"] + 0.8 * case["student_ms"]
