"""From run folders to numbers: each run, each pair, each claim and its verdict.

The rule for all claims: arms are paired by seed (the same images, order and initial
parameters). A claim is *reproduced* only if each of at least six pairs has the expected
sign, or if the paired t test has p < 0.01 in the expected direction. If either holds in
the other direction, it is *contradicted*; else the arms are *not separated*. Fewer than
three pairs allow no verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from proofs_calibration import Calibrated, calibrate
from proofs_plan import (
    ANCHORS,
    CALIBRATED,
    MIN_PAIRS,
    MIN_PAIRS_FOR_SIGNS,
    ORACLE,
    SIGNIFICANT,
    Bound,
    Claim,
    Proof,
)

from distilljax.evaluation import mcnemar, paired_difference, spread
from distilljax.evaluation.runs import Run, read_run
from distilljax.evaluation.statistics import PairedDifference
from distilljax.workdir import read_json

FORMAT = 1


@dataclass(frozen=True)
class Student:
    """A run, or a run with one bias moved: its numbers, and its test predictions."""

    numbers: dict[str, Any]
    right: np.ndarray
    focus: np.ndarray
    """Test examples of the missing class; none elsewhere."""


def collect(proofs: tuple[Proof, ...], runs: Path) -> dict[str, Any]:
    """Everything that the page and the figures show, ready for JSON.

    Depends on the run folders alone, so that collecting twice gives the same file.
    """
    experiments, found = {}, []
    for proof in proofs:
        experiments[proof.name], done = _experiment(proof, runs)
        found += done
    return {
        "format": FORMAT,
        "date": max((run.date for run in found), default=None),
        "versions": _distinct(run.versions for run in found),
        "machines": _distinct(run.machine for run in found),
        "train_seconds": sum(run.train_seconds or 0.0 for run in found),
        "commands": [proof.command for proof in proofs],
        "anchors": ANCHORS,
        "experiments": experiments,
    }


def _experiment(proof: Proof, root: Path) -> tuple[dict[str, Any], list[Run]]:
    expected = proof.expected_runs()
    runs, missing = [], []
    for arm, seed in expected:
        path = proof.folder(root, arm, seed) / "results.json"
        if path.is_file():
            runs.append(read_run(path))
        else:
            missing.append(f"{arm}, seed {seed}")
    students = _students(proof, runs)
    by_arm: dict[str, dict[int, Student]] = defaultdict(dict)
    for student in students:
        by_arm[student.numbers["arm"]][student.numbers["seed"]] = student
    hard = proof.hard_labels or {}
    against = [_against(proof, arm, base, by_arm) for arm, base in hard.items()]
    return {
        "command": proof.command,
        "expected_runs": len(expected),
        "missing_runs": missing,
        "num_examples": runs[0].num_examples if runs else None,
        "train_seconds": sum(run.train_seconds or 0.0 for run in runs),
        "protocol": _protocol(runs),
        "arms": {arm: _arm(list(of_arm.values())) for arm, of_arm in by_arm.items()},
        "claims": _known(_claim(proof, claim, by_arm) for claim in proof.claims),
        "against_hard_labels": _known(against),
        "bounds": _known(_bound(bound, by_arm) for bound in proof.bounds),
        "runs": [student.numbers for student in students],
    }, runs


def _students(proof: Proof, runs: list[Run]) -> list[Student]:
    students = []
    for run in runs:
        predicted = run.predictions()
        if predicted is None:
            raise FileNotFoundError(f"{run.path.parent} has no predictions.npz")
        labels = predicted["labels"]
        numbers = _numbers(proof, run)
        students.append(_student(numbers, labels, predicted["student"], run))
        if run.arm not in proof.calibrate:
            continue
        found = calibrate(run)
        masses = {
            "student_mass": found.student_mass,
            "teacher_mass": found.teacher_mass,
        }
        for name, moved in ((CALIBRATED, found.label_free), (ORACLE, found.oracle)):
            numbers = _moved_numbers(proof, run, name, moved) | masses
            students.append(_student(numbers, labels, moved.predictions, run))
    return students


def _student(
    numbers: dict[str, Any], labels: np.ndarray, predicted: np.ndarray, run: Run
) -> Student:
    """Errors are counted from the predictions, so that every count has one source."""
    right = predicted == labels
    focus = np.isin(labels, run.focus_classes)
    numbers["errors"] = int((~right).sum())
    if run.focus_classes:
        numbers["focus_recall"] = float(right[focus].mean())
        numbers["errors_other_classes"] = int((~right & ~focus).sum())
    return Student(numbers, right, focus)


def _numbers(proof: Proof, run: Run) -> dict[str, Any]:
    losses = [
        c["loss"] for c in run.curves if c.get("split") == "train" and "loss" in c
    ]
    teacher = run.teacher and run.teacher["per_class"]
    return {
        "arm": run.arm,
        "seed": run.seed,
        "split": proof.split(run.seed),
        "teacher_errors": teacher and sum(teacher["count"]) - sum(teacher["correct"]),
        "nll": run.student["nll"],
        "ece": run.student["ece"],
        "kl_to_teacher": run.student["kl_to_teacher"],
        "agreement": run.student["agreement"],
        "parameters": run.student["parameters"],
        "train_loss": losses[-1] if losses else None,
        "train_seconds": run.train_seconds,
        "date": run.date,
    }


def _moved_numbers(
    proof: Proof, run: Run, name: str, moved: Calibrated
) -> dict[str, Any]:
    return {
        "arm": run.arm + name,
        "seed": run.seed,
        "split": proof.split(run.seed),
        "bias": moved.bias,
    }


def _arm(students: list[Student]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of everything that all runs have."""
    measures = [
        key
        for key, value in students[0].numbers.items()
        if isinstance(value, int | float) and key not in ("seed", "split")
    ]
    summary: dict[str, Any] = {"n": len(students)}
    for key in measures:
        found = spread([student.numbers[key] for student in students])
        summary[key] = {"mean": found.mean, "sd": found.sd}
    return summary


def _claim(
    proof: Proof, claim: Claim, by_arm: dict[str, dict[int, Student]]
) -> dict[str, Any] | None:
    """The pairs of a claim; None where there is no pair."""
    ours, theirs = by_arm.get(claim.arm, {}), by_arm.get(claim.baseline, {})
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    values = np.array(
        [
            [of_arm[seed].numbers[claim.measure] for of_arm in (ours, theirs)]
            for seed in seeds
        ],
        np.float64,
    )
    difference = paired_difference(values[:, 0].tolist(), values[:, 1].tolist())
    splits = defaultdict(list)
    for seed, (our, their) in zip(seeds, values, strict=True):
        splits[proof.split(seed)].append(our - their)
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    return {
        **asdict(claim),
        "seeds": seeds,
        "mean": float(values[:, 0].mean()),
        "baseline_mean": float(values[:, 1].mean()),
        "difference": asdict(difference),
        # The seeds of a split share its images and its teacher.
        "split_differences": [float(np.mean(d)) for _, d in sorted(splits.items())],
        "mcnemar": _mcnemar(pairs, COUNTED[claim.measure]),
        "verdict": verdict(difference, claim.expected),
    }


def _against(
    proof: Proof, arm: str, hard: str, by_arm: dict[str, dict[int, Student]]
) -> dict[str, Any] | None:
    """A taught arm against labels alone, and how far it goes towards its teacher."""
    found = _claim(proof, Claim("", arm, hard, -1), by_arm)
    if found is None:
        return None
    teacher = [by_arm[arm][s].numbers["teacher_errors"] for s in found["seeds"]]
    gap = None
    if None not in teacher and found["baseline_mean"] > np.mean(teacher):
        distance = found["baseline_mean"] - float(np.mean(teacher))
        gap = (found["baseline_mean"] - found["mean"]) / distance
    return found | {"gap_closed": gap}


def _mcnemar(
    pairs: list[tuple[Student, Student]], counted: Callable[[Student], np.ndarray]
) -> dict[str, Any]:
    """Test predictions of all pairs that exactly one of the two has right."""
    gained = lost = 0
    for ours, theirs in pairs:
        where = counted(ours)
        gained += int((ours.right & ~theirs.right & where).sum())
        lost += int((~ours.right & theirs.right & where).sum())
    return {"gained": gained, "lost": lost, "p_value": mcnemar(gained, lost)}


# Which test examples a measure is about.
COUNTED: dict[str, Callable[[Student], np.ndarray]] = {
    "errors": lambda student: np.ones_like(student.focus),
    "focus_recall": lambda student: student.focus,
    "errors_other_classes": lambda student: ~student.focus,
}


def verdict(difference: PairedDifference, expected: int) -> str:
    """The rule of this file's first paragraph, in the same words for either sign."""
    if difference.n < MIN_PAIRS:
        return "too few pairs"
    p = difference.t_p_value
    significant = p is not None and p < SIGNIFICANT
    all_of = max(difference.n, MIN_PAIRS_FOR_SIGNS)
    up = difference.positive == all_of or (significant and difference.mean > 0)
    down = difference.negative == all_of or (significant and difference.mean < 0)
    if not up and not down:
        return "not separated"
    if expected == 0:
        return "more" if up else "less"
    return "reproduced" if up == (expected > 0) else "contradicted"


def _bound(
    bound: Bound, by_arm: dict[str, dict[int, Student]]
) -> dict[str, Any] | None:
    """The run, or pair, that is closest to the limit or furthest beyond it."""
    ours = by_arm.get(bound.arm, {})
    over = None if bound.over is None else by_arm.get(bound.over, {})
    seeds = sorted(ours if over is None else ours.keys() & over.keys())
    if not seeds:
        return None
    values = [
        ours[seed].numbers[bound.measure]
        / (1 if over is None else over[seed].numbers[bound.measure])
        for seed in seeds
    ]
    if bound.at_most is not None:
        worst = max(values)
        met = worst <= bound.at_most
    else:
        worst = min(values)
        met = bound.at_least is not None and worst >= bound.at_least
    return {**asdict(bound), "seeds": seeds, "worst": worst, "met": met}


def _protocol(runs: list[Run]) -> list[dict[str, Any]]:
    """What the runs say they did: one line for each different protocol."""
    lines: dict[str, dict[str, Any]] = {}
    for run in runs:
        config = read_json(run.path.with_name("config.json"))
        schedule = config["optimizer"]["learning_rate"]
        hidden = config["student"]["hidden"]
        line = {
            "student": "-".join(map(str, [784, *hidden, 10])),
            "data": _describe(config["data"]),
            "augmentation": (config["loader"]["augment"] or {}).get("max_pixels"),
            "batch_size": config["loader"]["batch_size"],
            "updates": run.steps,
            "examples_seen": run.examples_seen,
            "peak_learning_rate": schedule["peak"],
        }
        lines.setdefault(str(line), line)
    return list(lines.values())


def _describe(source: dict[str, Any]) -> str:
    """A data config in words; the seed of a split is left out."""
    kind = source["_type"].split(":")[-1]
    if kind == "Stratified":
        rest = " left over" if source["complement"] else ""
        return f"{source['num_examples']:,}{rest} of {_describe(source['source'])}"
    if kind == "WithoutClasses":
        classes = ", ".join(map(str, source["classes"]))
        return f"{_describe(source['source'])}, none of class {classes}"
    return f"{source['dataset']} {source['split']}"


def _known(items) -> list[dict[str, Any]]:
    return [item for item in items if item is not None]


def _distinct(items) -> list[dict[str, Any]]:
    """Each different dict once, in the order of their first appearance."""
    return list({str(item): item for item in items}.values())
