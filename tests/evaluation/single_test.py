"""One model by itself: what is called the teacher, and what only looks like it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distilljax.evaluation.comparison import compare
from distilljax.evaluation.runs import find_runs

ALONE = "A single model, without teacher or baseline: it is measured, not compared."


@pytest.fixture
def teacher(write_run):
    """The folder of a model that is the teacher of two other experiments."""
    folders = [write_run(name="few", seed=seed) for seed in range(2)]
    folders.append(write_run(name="missing"))
    arrays = dict(np.load(folders[0] / "predictions.npz"))
    evaluated = json.loads((folders[0] / "results.json").read_text())["teacher"]
    alone = write_run(
        name="teacher",
        arm="default",
        baseline=None,
        teacher_errors=None,
        student=evaluated,
    )
    for folder in folders:
        other = dict(np.load(folder / "predictions.npz"))
        _save(folder, **(other | {"teacher": arrays["teacher"]}))
    _save(alone, labels=arrays["labels"], student=arrays["teacher"])
    return alone


def _save(folder, **arrays):
    np.savez(folder / "predictions.npz", **arrays)


def _edit_student(folder, **changes):
    path = folder / "results.json"
    record = json.loads(path.read_text())
    record["student"] |= changes
    path.write_text(json.dumps(record))
    return record["student"]


def _experiment(path):
    found = {e.name: e for e in compare(find_runs([path])[0])}
    assert found["few"].single == found["missing"].single == ""
    return found["teacher"]


def test_the_teacher_is_named(teacher, tmp_path):
    experiment = _experiment(tmp_path)
    assert experiment.single == f"{ALONE} It is the teacher of few and missing."
    assert experiment.notes == ()


@pytest.mark.parametrize(
    "changes",
    [{"nll": 0.1161}, {"parameters": 301067}, {"parameters": None}, {"nll": 0.0}],
)
def test_an_equal_accuracy_is_not_enough(teacher, tmp_path, changes):
    _edit_student(teacher, **changes)
    assert _experiment(tmp_path).single == ALONE


def test_one_other_prediction_is_another_model(teacher, tmp_path):
    arrays = dict(np.load(teacher / "predictions.npz"))
    arrays["student"][0] += 1
    _save(teacher, **arrays)
    assert _experiment(tmp_path).single == ALONE


def test_without_predictions_nothing_is_certain(teacher, tmp_path):
    (teacher / "predictions.npz").unlink()
    assert _experiment(tmp_path).single == ALONE


def test_the_order_of_a_sum_is_no_difference(teacher, tmp_path):
    nll = _edit_student(teacher)["nll"]
    _edit_student(teacher, nll=nll * (1 + 3e-7))
    assert "teacher of few and missing" in _experiment(tmp_path).single


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"baseline": "hard labels"}, "has no finished run"),
        ({"teacher_errors": 12}, "No arm names a baseline"),
    ],
)
def test_what_claims_a_teacher_keeps_its_notes(write_run, tmp_path, changes, note):
    write_run(**({"baseline": None, "teacher_errors": None} | changes))
    (experiment,) = compare(find_runs([tmp_path])[0])
    assert experiment.single == ""
    text = "\n".join(experiment.notes)
    assert note in text
    assert "one seed only" in text


def test_a_leak_of_the_test_split_is_still_noted(write_run, tmp_path):
    chosen = {"step": 5, "metric": "test/accuracy", "value": 0.9}
    write_run(baseline=None, teacher_errors=None, selected=chosen)
    (experiment,) = compare(find_runs([tmp_path])[0])
    assert experiment.single == ALONE
    (note,) = experiment.notes
    assert "selected by test/accuracy" in note
