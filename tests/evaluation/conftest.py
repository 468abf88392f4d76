"""Synthetic runs on disk, as `distilljax train` leaves them, with known numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WriteRun = Callable[..., Path]
TEACHER_SIZE = 301066


def _latency_ms(parameters: int) -> float:
    return 0.02 + parameters / 5e6


def _evaluated(
    student: np.ndarray,
    teacher: np.ndarray | None,
    labels: np.ndarray,
    num_classes: int,
    confidence: float,
    parameters: int,
) -> dict[str, Any]:
    """Exact counts of some predictions; the softmax numbers are made up around them."""
    right = student == labels
    accuracy = float(right.mean())
    edges = np.linspace(0, 1, 16)
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.exp(8 * (centres - confidence) * (centres > 0.3) - 6 * (centres <= 0.3))
    count = np.floor(len(labels) * weight / weight.sum()).astype(int)
    count[-1] += len(labels) - count.sum()
    observed = np.clip(centres - 0.35 * (confidence - accuracy) * centres, 0, 1)

    def to_teacher(ratio: float) -> dict[str, float] | None:
        """A student is timed in turn with its teacher."""
        found = {"median": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio}
        return None if teacher is None else found

    def per_class(selected: np.ndarray) -> list[int]:
        return np.bincount(labels[selected], minlength=num_classes).tolist()

    return {
        "accuracy": accuracy,
        "nll": 2.2 * (1 - accuracy) + 0.05,
        "kl_to_teacher": None if teacher is None else 1.4 * (1 - accuracy) + 0.02,
        "agreement": None if teacher is None else float((student == teacher).mean()),
        "ece": abs(confidence - accuracy) / 2 + 0.01,
        "reliability": {
            "edges": edges.tolist(),
            "count": count.tolist(),
            "confidence": [
                c if n else None for c, n in zip(centres, count, strict=True)
            ],
            "accuracy": [
                float(a) if n else None for a, n in zip(observed, count, strict=True)
            ],
        },
        "per_class": {
            "count": per_class(np.ones_like(right)),
            "correct": per_class(right),
            "gained": None
            if teacher is None
            else per_class(right & (teacher != labels)),
            "lost": None
            if teacher is None
            else per_class(~right & (teacher == labels)),
        },
        "parameters": parameters,
        "bytes": 4 * parameters,
        "flops_per_example": 2.0 * parameters,
        "latency_ms": {
            "batch": 1,
            "median": _latency_ms(parameters),
            "p90": 0.03 + parameters / 4e6,
            "to_teacher": to_teacher(
                _latency_ms(parameters) / _latency_ms(TEACHER_SIZE)
            ),
        },
        "throughput": {
            "batch": 256,
            "examples_per_second": 4e10 / parameters,
            "to_teacher": to_teacher(TEACHER_SIZE / parameters),
        },
    }


def _predict(
    rng: np.random.Generator, labels: np.ndarray, errors: int, blind: int | None
) -> np.ndarray:
    """Predictions with `errors` wrong, after the class `blind` is lost whole."""
    predictions = labels.copy()
    if blind is not None:
        predictions[labels == blind] = (blind + 5) % 10
    pool = np.flatnonzero(predictions == labels)
    wrong = rng.choice(pool, errors, replace=False)
    predictions[wrong] = (labels[wrong] + rng.integers(1, 10, errors)) % 10
    return predictions


def _config(arm: str, seed: int) -> dict[str, Any]:
    """A saved config: all arms have the teacher at hand, not all objectives use it."""
    hard = {"_type": "distilljax.objectives:CrossEntropy", "label_smoothing": 0.0}
    soft = {"_type": "distilljax.objectives:LogitKD", "temperature": 4.0}
    source = {"_type": "distilljax.data.tfds:Tfds", "name": "digits", "split": "train"}
    few = {"_type": "distilljax.data.selections:Few", "source": source}
    return {
        "_type": "distilljax.config:Config",
        "name": "digits/few_labels",
        "objective": hard if arm == "hard labels" else soft,
        "teacher": {"_type": "distilljax.workdir:TrainedRun", "workdir": "runs/t"},
        "data": source if "1,200" in arm else few | {"num_examples": 36, "seed": seed},
        "optimizer": {"_type": "distilljax.optimizers:AdamW", "learning_rate": 0.01},
        "loader": {"_type": "distilljax.data.pipeline:Loader", "batch_size": 36},
        "select": "accuracy",
        "seed": seed,
    }


def _curves(
    accuracy: float, steps: int, seed: int, taught: bool
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(steps // 12, steps + 1, steps // 12):
        done = 1 - np.exp(-4 * step / steps)
        reached = accuracy * done + rng.normal(0, 0.006)
        lines.append(
            {
                "step": step,
                "seconds": 0.01 * step,
                "split": "validation",
                "accuracy": float(np.clip(reached, 0, 1)),
                "kl": float(2.3 - 2.1 * done + rng.normal(0, 0.02)),
            }
        )
        trained = {"split": "train", "loss": float(2.3 - 2 * done)}
        trained |= {"teacher_entropy": 0.1} if taught else {}
        lines.append({"step": step, "seconds": 0.01 * step} | trained)
    return lines


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write one run: its folder has results, curves and predictions."""
    return writer(tmp_path / "runs")


def writer(runs: Path) -> WriteRun:
    """A function that writes one run below `runs`."""

    def write(
        name: str = "digits/few_labels",
        arm: str = "soft targets",
        seed: int = 0,
        *,
        errors: int = 90,
        baseline: str | None = "hard labels",
        teacher_errors: int | None = 12,
        num_examples: int = 400,
        blind: int | None = None,
        confidence: float = 0.8,
        root: Path | None = None,
        with_files: bool = True,
        config: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        labels = np.arange(num_examples) % 10
        teacher = None
        if teacher_errors is not None:
            rng = np.random.default_rng(1000 + seed)
            teacher = _predict(rng, labels, teacher_errors, None)
        rng = np.random.default_rng([seed, len(arm)])
        student = _predict(rng, labels, errors, blind)
        accuracy = float((student == labels).mean())
        steps = changes.get("steps", 600)
        record = {
            "format": 1,
            "name": name,
            "arm": arm,
            "seed": seed,
            "baseline": baseline,
            "description": "36 labelled digits; the teacher saw 1,200.",
            "expected": "soft targets at least +3 points over hard labels",
            "split": "test",
            "num_examples": num_examples,
            "class_names": [str(i) for i in range(10)],
            "focus_classes": [],
            "steps": steps,
            "examples_seen": 36 * steps,
            "train_seconds": 1.5 + 0.1 * seed,
            "selected": {
                "step": steps,
                "metric": "validation/accuracy",
                "value": accuracy,
            },
            "student": _evaluated(student, teacher, labels, 10, confidence, 2410),
            "teacher": None
            if teacher is None
            else _evaluated(teacher, None, labels, 10, 0.97, TEACHER_SIZE),
            "versions": {"distilljax": "0.1.0", "jax": "0.10.2"},
            "machine": {"device": "cpu", "count": 1},
            "date": "2026-06-01",
        } | changes
        slug = "-".join((name, arm, str(seed))).replace("/", "_").replace(" ", "_")
        folder = (root or runs) / slug
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(record))
        if with_files:
            taught = teacher is not None and arm != "hard labels"
            curves = _curves(accuracy, steps, seed, taught)
            lines = [json.dumps(line) for line in curves]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            saved = _config(arm, seed) | (config or {})
            (folder / "config.json").write_text(json.dumps(saved))
            arrays = {"labels": labels, "student": student}
            if teacher is not None:
                arrays["teacher"] = teacher
            np.savez(folder / "predictions.npz", **arrays)
        return folder

    return write


@pytest.fixture(scope="session")
def three_experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few labels, the missing class, and a negative control: five seeds each."""
    folder = tmp_path_factory.mktemp("three") / "runs"
    write_three(writer(folder))
    return folder


def write_three(write_run: WriteRun) -> None:
    """The three experiments of the digits, with fixed numbers of errors."""
    shifts = (0, 2, -3, 4, -1)
    for seed, shift in enumerate(shifts):
        few = {"seed": seed, "name": "digits/few_labels"}
        write_run(
            arm="hard labels", errors=105 + shift, baseline=None, confidence=0.9, **few
        )
        write_run(arm="soft targets", errors=91 + shift + seed % 2, **few)
        write_run(
            arm="transfer set of 1,200", errors=39 - shift, confidence=0.93, **few
        )
        missing = {
            "seed": seed,
            "name": "digits/missing_class",
            "focus_classes": [3],
            "description": "No 3 in the transfer set.",
            "expected": "recall on 3 of at least 80 %",
        }
        write_run(
            arm="hard labels", errors=14 + seed, blind=3, baseline=None, **missing
        )
        write_run(arm="soft targets", errors=22 - shift, confidence=0.93, **missing)
        control = {
            "seed": seed,
            "name": "digits/all_data",
            "description": "All labels: a negative control.",
            "expected": "no difference",
        }
        hard, soft = (14, 13, 15, 12, 14)[seed], (13, 14, 14, 13, 13)[seed]
        write_run(
            arm="hard labels", errors=hard, baseline=None, confidence=0.97, **control
        )
        write_run(arm="soft targets", errors=soft, confidence=0.96, **control)
