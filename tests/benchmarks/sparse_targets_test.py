"""What students learn from each form of a signal is as the theory says it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


def test_samples_are_unbiased_and_what_they_teach_is_their_noise():
    found = json.loads((RESULTS / "sparse_targets.json").read_text())
    assert {"date", "machine", "versions"} <= found.keys()
    arms = found["arms"]
    for draws in (12, 50, 256):
        arm = arms[f"sampled {draws}"]
        assert len(arm["kl"]) == 3
        assert arm["l1_bias"] < 0.01
        assert abs(arm["tail_ratio"] - 1) < 0.01
        noise = 511 / (2 * found["positions"] * draws)
        assert noise * 0.9 < np.mean(arm["kl"]) < noise * 1.2
    kl = {name: np.mean(arm["kl"]) for name, arm in arms.items()}
    assert kl["dense"] < 1e-4
    order = ["sampled 256", "sampled 50", "sampled 12", "top 50 + tail"]
    order += ["top 12 + tail", "top 5 + tail", "top 50 renormalised"]
    order += ["top 12 renormalised", "top 5 renormalised"]
    assert sorted(order, key=kl.get) == order


def test_only_biased_targets_spoil_the_confidence():
    arms = json.loads((RESULTS / "sparse_targets.json").read_text())["arms"]
    error = {name: np.mean(arm["calibration_error"]) for name, arm in arms.items()}
    biased = [name for name in arms if "renormalised" in name or "weights" in name]
    assert min(error[name] for name in biased) > 0.05
    assert max(error[name] for name in arms if name not in biased) < 0.01


def test_the_page_has_these_numbers():
    """To the digits that it gives."""
    page = (RESULTS.parents[1] / "docs/sparse_targets.md").read_text()
    arms = json.loads((RESULTS / "sparse_targets.json").read_text())["arms"]
    keys = ("ids_per_position", "l1_bias", "head_ratio", "tail_ratio")
    for name, arm in arms.items():
        if name == "dense":
            continue
        (line,) = (x for x in page.splitlines() if x.startswith(f"| {name} | "))
        found = [arm[key] for key in keys]
        found += [np.mean(arm["kl"]), np.mean(arm["calibration_error"])]
        for said, value in zip(line.strip("| ").split(" | ")[1:], found, strict=True):
            digits = len(said.split(".")[1])
            assert abs(float(said) - value) <= 0.501 * 10**-digits, (name, said, value)
