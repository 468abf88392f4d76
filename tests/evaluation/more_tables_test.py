"""Reports of models that are not measured as classifiers: of text, and by probes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilljax import evaluation
from distilljax.evaluation.arms import quality_of

PEARSON = {"labels": (0.50, 0.52, 0.48), "taught": (0.61, 0.60, 0.62)}


def write(root: Path, arm: str, seed: int, baseline: str | None, **fields: Any) -> None:
    """A results.json as `train` leaves it."""
    record = {
        "format": 1, "name": "other", "arm": arm, "seed": seed, "baseline": baseline,
        "description": "", "expected": "at least .6", "focus_classes": [], "steps": 9,
        "examples_seen": 72, "train_seconds": 1.0, "selected": None, "versions": {},
        "machine": {}, "date": "2026-01-01", **fields,
    }  # fmt: skip
    folder = root / arm / f"seed_{seed}"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(record))


def of_text(nll: float, kl: float | None, said: str) -> dict[str, Any]:
    return {
        "num_examples": 999, "accuracy": 0.3, "nll": nll, "ece": 0.04,
        "kl_to_teacher": kl, "agreement": None if kl is None else 0.5,
        "perplexity": float(np.exp(nll)), "bits_per_byte": nll / 3,
        "per_class": {"count": [], "correct": []},
        "probes": {"samples": {"It was": said}},
    }  # fmt: skip


def test_models_without_logits_are_compared_by_the_probe_that_is_named(tmp_path):
    teacher = {"probes": {"human": {"pearson": 0.65, "examples": 50}}}
    for arm, values in PEARSON.items():
        for seed, value in enumerate(values):
            probes = {"human": {"pearson": value, "examples": 50}}
            write(
                tmp_path, arm, seed, "labels" if arm == "taught" else None,
                headline="probes.human.pearson", student={"probes": probes},
                teacher=teacher,
            )  # fmt: skip
    written = evaluation.report([tmp_path])
    (line,) = written.headlines
    assert "“taught” helped against “labels”. Human pearson +0.110" in line
    text = written.markdown.read_text()
    assert "| taught | 0.610 ± 0.010 | 50" in text
    assert (
        "Expected of “taught”: at least .6. Measured: human pearson 0.500 to 0.610"
        in (text)
    )
    assert "errors" not in text.split("## How to read")[0]


def test_models_of_text_are_compared_by_their_nll_where_less_is_better(tmp_path):
    others = {"python": {"num_examples": 9, "student": of_text(2.5, 0.3, "x")}}
    others["python"]["teacher"] = of_text(2.0, None, "x")
    shared: dict[str, Any] = {
        "split": "test", "num_examples": 999, "class_names": [],
        "teacher": of_text(3.0, None, "the best of times"), "other_tests": others,
    }  # fmt: skip
    for seed in range(3):
        worse, better = 4.0 + 0.01 * seed, 3.5 + 0.02 * seed
        write(
            tmp_path, "labels", seed, None,
            student=of_text(worse, 1.1, "a a a"), **shared,
        )  # fmt: skip
        write(
            tmp_path, "taught", seed, "labels",
            student=of_text(better, 0.4, "a | truth\nacknowledged"), **shared,
        )  # fmt: skip
    written = evaluation.report([tmp_path])
    (line,) = written.headlines
    assert "“taught” helped against “labels”. NLL −0.490 nats" in line
    assert "better perplexity, bits per byte, KL to teacher" in line
    text = written.markdown.read_text()
    assert "On 999 tokens of test" in text
    assert "| python | teacher | 2.00 |" in text
    assert "| It was | taught | a \\| truth acknowledged |" in text
    assert "### Tests of the accuracy" not in text
    assert {path.name for path in written.figures} >= {"other_pairs.png"}
    assert "McNemar" not in text


def test_the_headline_is_the_first_of_what_is_known():
    text, images = of_text(3.0, None, ""), {"accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    assert [m.key for m in quality_of([text])][:3] == [
        "nll", "perplexity", "bits_per_byte",
    ]  # fmt: skip
    assert [m.key for m in quality_of([images])] == ["accuracy", "ece", "nll"]
    assert quality_of([images], ["nll"])[0].key == "nll"
    probed = {"probes": {"human": {"pearson": 0.5, "text": "not a number"}}}
    assert [m.key for m in quality_of([probed])] == ["probes.human.pearson"]
    # seeds that disagree about it have the usual one
    assert quality_of([images], ["nll", "ece"])[0].key == "accuracy"


def test_a_run_without_test_data_and_without_probes_is_left_out(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"format": 1, "steps": 3}))
    with pytest.raises(ValueError, match="hold at least one results"):
        evaluation.report([tmp_path])
