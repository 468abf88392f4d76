"""The benchmark of a small language model compares like with like, and keeps limits."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
bench_page = importlib.import_module("bench_page")
lm_steps = importlib.import_module("lm_steps")
lm_worker = importlib.import_module("lm_worker")

# What was reached, with room for noise: the goals were .50 of the time, .58 with huge
# pages, .55 of the peak and 1.2 of the first step. docs/benchmarks.md marks them as
# missed, and docs/language_models.md says why. With huge pages it was .74 of the CPU
# time on one machine, and .84 on a slower one, without AVX-512.
LIMITS = {"stock": 0.80, "huge_pages": 0.90, "first": 1.5}
LIMITS |= {"peak": 0.70, "trimmed": 0.65}
TINY = {"classes": 512, "teacher": (128, 2), "student": (64, 1)}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(lm_steps.SHAPES, "tiny", TINY)
    monkeypatch.setattr(lm_steps, "TIME", 32)
    return "tiny"


def read():
    found = json.loads((BENCHMARKS / "results" / "lm.json").read_text())
    assert {"date", "machine", "versions", "load_average"} <= found.keys()
    return found


def test_both_steps_compute_the_same(tiny):
    """Losses over some updates, parameters, and the FLOPs of the products."""
    runs = {name: lm_steps.ready_step(name, tiny) for name in lm_steps.STEPS}
    losses = {name: [run() for _ in range(3)] for name, (run, _) in runs.items()}
    flops = {name: lm_steps.product_flops(name, tiny) for name in lm_steps.STEPS}
    for name in ("ours", "ours_bare"):
        assert runs[name][1] == runs["plain"][1]
        np.testing.assert_allclose(losses[name], losses["plain"], rtol=1e-4)
        assert losses[name][2] < losses[name][0]
        # ours makes the scores of attention a second time
        assert flops["plain"] < flops[name] < 1.05 * flops["plain"]


def test_others_get_the_same_parameters(tiny, tmp_path):
    lm_steps.export(tiny, tmp_path / "weights.npz")
    arrays = np.load(tmp_path / "weights.npz")
    student, _ = lm_steps.models_of(tiny)
    kernel = student.layers[0].mlp.up.kernel[...]
    np.testing.assert_array_equal(arrays["student/layers/0/mlp/up/kernel"], kernel)
    assert arrays["tokens"].shape == (lm_steps.BATCH, 32)


def test_a_worker_answers_and_ends(tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(
        "from lm_worker import serve\n"
        "print('loading')\n"
        "serve(lambda: (lambda: 0.5, {'parameters': [3, 4]}))\n"
    )
    env = {"PYTHONPATH": str(BENCHMARKS)}
    worker = lm_worker.Worker([sys.executable, str(script)], env)
    try:
        assert worker.facts == {"parameters": [3, 4]}
        assert worker.step()["loss"] == 0.5
        assert worker.end().keys() == {"peak_bytes", "peak_trimmed_bytes"}
    finally:
        worker.kill()


@pytest.mark.slow
def test_our_step_holds_at_most_half_of_the_plain_one():
    """Exact: what the compiler says, of the shape that is published."""
    temp = {name: lm_steps.temp_bytes(name, "vocabulary") for name in lm_steps.STEPS}
    assert temp["ours"] <= 0.5 * temp["plain"]


def test_the_published_measurements_keep_their_limits():
    found = read()
    vocabulary, body = found["vocabulary"], found["body"]["stock"]
    assert found["exact"]["vocabulary"]["temp_ratio"] <= 0.5
    for setting in ("stock", "huge_pages"):
        ours = vocabulary[setting]["ours"]
        assert ours["peak_ratio"] <= LIMITS["peak"], setting
        assert ours["peak_trimmed_ratio"] <= LIMITS["trimmed"], setting
        assert ours["cpu_ratio"] <= LIMITS[setting], setting
    assert body["ours"]["cpu_ratio"] < 1.0
    assert (
        vocabulary["stock"]["ours"]["first_step_cpu_seconds"]
        <= LIMITS["first"] * (vocabulary["stock"]["plain"]["first_step_cpu_seconds"])
    )
    assert found["loading"]["ratio"] < 1.3
    assert found["whole_run"]["ratio"] >= 0.85


def test_every_variant_had_the_same_loss():
    found = read()
    for case in (*found["vocabulary"].values(), found["body"]["stock"]):
        for name, variant in case.items():
            expected = case["plain"]["first_loss"]
            assert abs(variant["first_loss"] / expected - 1) < 2e-5, name


def test_the_page_of_language_models_has_the_published_numbers():
    page = (BENCHMARKS.parent / "docs/language_models.md").read_text()
    found = read()["vocabulary"]["stock"]
    keys = ("cpu_ratio", "time_ratio", "peak_ratio", "peak_trimmed_ratio")
    for name, words in bench_page.NAMES.items():
        if name in found:
            numbers = " | ".join(f"{found[name][key]:.2f}" for key in keys)
            assert f"| {words} | {numbers} |" in page, name
