"""The committed measurements of the fused loss keep the limits that were set for it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
loss = importlib.import_module("loss")


def read(name):
    found = json.loads((BENCHMARKS / "results" / name).read_text())
    assert {"date", "machine", "versions"} <= found.keys()
    return found


def test_time_and_memory_beside_plain_jax():
    """With huge pages .58 was the goal: the products alone take more, as is written."""
    found = read("loss.json")
    assert found["shape"] == loss.SHAPE
    assert found["stock"]["ratio"]["fused"] <= 0.95
    assert found["huge_pages"]["ratio"]["fused"] <= 0.95
    assert found["huge_pages"]["ratio"]["products"] > 0.58
    for setting in ("stock", "huge_pages"):
        assert found[setting]["peak_ratio"] <= 0.40
    small, large = (found["temp_bytes"][n]["fused"]["bytes"] for n in ("8192", "16384"))
    assert small <= 0.15 * 4 * 8192 * 128256
    assert large <= 1.05 * small
    assert found["bfloat16"]["gradient_error_of_largest"] <= 1e-2
    assert found["bfloat16"]["kl_error"] <= 1e-3


def test_on_tpus_it_holds_less_than_plain_jax():
    """Never more, and a fifth at 32,768 positions, where plain JAX compiles at all."""
    cases = read("loss_plan.json")["plan"]
    assert {case["topology"] for case in cases} == {"v5e:4x4", "v5p:4x4x4"}
    for case in cases:
        if isinstance(case["plain"], str):  # what the compiler said of its size
            assert "RESOURCE_EXHAUSTED" in case["plain"]
            continue
        assert case["fused"] <= case["plain"], case
        if case["tokens"] == 32768:
            assert case["fused"] <= case["plain"] / 5, case


def test_both_sides_of_the_benchmark_compute_the_same():
    small = {"tokens": 64, "classes": 50, "width": 8, "teacher_width": 12}
    programs = loss.programs(chunk=16)
    args = loss.inputs(**small)
    found = [jax.jit(programs[name])(*args) for name in ("fused", "plain")]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found
    )
    assert all(x.dtype == jnp.float32 for x in args)
