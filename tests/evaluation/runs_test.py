"""Finding and checking runs: what is read, what is forgiven, what is an error."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from distilljax.evaluation.runs import find_runs, read_run


def _edit(folder, **changes):
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_finds_runs_at_any_depth_once(write_run, tmp_path):
    write_run(seed=1, root=tmp_path / "a" / "deep" / "er")
    write_run(seed=0, root=tmp_path / "a")
    runs, unfinished = find_runs([tmp_path, tmp_path / "a", tmp_path / "a" / "deep"])
    assert [run.seed for run in runs] == [0, 1]
    assert unfinished == []


def test_an_unfinished_run_is_named(write_run, tmp_path):
    folder = write_run()
    (write_run(seed=1) / "results.json").unlink()
    runs, unfinished = find_runs([tmp_path])
    assert [run.path.parent for run in runs] == [folder]
    assert [path.name for path in unfinished] == [folder.name.replace("-0", "-1")]


def test_two_claims_to_one_run_are_an_error(write_run, tmp_path):
    write_run(root=tmp_path / "a")
    write_run(root=tmp_path / "b")
    with pytest.raises(ValueError, match=r"soft targets, seed 0 in .*/a/.* and .*/b/"):
        find_runs([tmp_path])


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"be folders that exist, got .*nowhere"):
        find_runs([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "be a JSON file"),
        ("[]", "have format 1, got list"),
        ("{}", "have format 1, got None"),
        ('{"format": 2}', "have format 1, got 2"),
        ('{"format": 1}', "have the field 'name'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_run(path)
    assert message in str(error.value)
    assert "run its `distilljax train` again" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "0"}, "have int in 'seed', got '0'"),
        ({"seed": True}, "have int in 'seed'"),
        ({"baseline": 3}, "have str or null in 'baseline'"),
        ({"student": None}, "have dict in 'student'"),
        ({"student": {}}, "have a number in 'student.accuracy'"),
        ({"focus_classes": [10]}, "have classes that exist in 'focus_classes', got 10"),
        ({"class_names": ["a"]}, "have 1 values in 'student.per_class"),
        ({"num_examples": 401}, "sum to num_examples, got 400 and 401"),
    ],
)
def test_a_wrong_field_is_named(write_run, changes, message):
    path = _edit(write_run(), **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_run(path)


@pytest.mark.parametrize("quote", ['"', ""], ids=["text", "bare"])
def test_numbers_that_json_does_not_have(write_run, quote):
    path = write_run() / "results.json"
    record = json.loads(path.read_text())
    record["student"] |= {"nll": "NLL", "kl_to_teacher": "KL"}
    # Python writes and reads them bare; strict readers need the text.
    nll, kl = ('"nan"', '"inf"') if quote else ("NaN", "Infinity")
    text = json.dumps(record).replace('"NLL"', nll).replace('"KL"', kl)
    path.write_text(text)
    run = read_run(path)
    assert run is not None
    assert np.isnan(run.student["nll"])
    assert np.isposinf(run.student["kl_to_teacher"])


def test_what_may_be_null_may_be_left_out(write_run):
    path = write_run() / "results.json"
    record = json.loads(path.read_text())
    for field in ("baseline", "expected", "train_seconds"):
        del record[field]
    del record["teacher"], record["selected"]
    path.write_text(json.dumps(record))
    run = read_run(path)
    assert run.teacher is run.selected is run.train_seconds is run.baseline is None


def test_classes_without_names_are_numbered(write_run):
    path = _edit(write_run(), class_names=[], focus_classes=[3])
    run = read_run(path)
    assert run.class_names == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    assert run.focus_classes == [3]


def test_numbered_classes_are_checked_like_named_ones(write_run):
    path = _edit(write_run(), class_names=[], focus_classes=[10])
    with pytest.raises(ValueError, match="classes that exist in 'focus_classes'"):
        read_run(path)
    record = json.loads(path.read_text())
    record["student"]["per_class"]["correct"].pop()
    _edit(path.parent, student=record["student"], focus_classes=[])
    with pytest.raises(ValueError, match=r"10 values in 'student\.per_class\.correct'"):
        read_run(path)
    _edit(path.parent, student=record["student"] | {"per_class": None})
    with pytest.raises(ValueError, match=r"have 'count' in 'student\.per_class'"):
        read_run(path)


def test_curves_of_a_resumed_run_keep_the_later_line(write_run):
    folder = write_run(with_files=False)
    lines = [
        {"step": 10, "split": "validation", "accuracy": 0.5},
        {"step": 20, "split": "validation", "accuracy": 0.1},
        {"step": 20, "split": "train", "loss": 2.0},
        {"step": 20, "split": "validation", "accuracy": 0.6},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 30, "spl'
    (folder / "metrics.jsonl").write_text(text)
    curves = read_run(folder / "results.json").curves
    assert [(c["step"], c.get("accuracy")) for c in curves] == [
        (20, None),
        (10, 0.5),
        (20, 0.6),
    ]


def test_a_broken_line_inside_a_log_is_an_error(write_run):
    folder = write_run()
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl must be JSON in line 2.*Remove that line"
    ):
        read_run(folder / "results.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_named_and_not_to_be_removed(write_run, text):
    path = write_run() / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_run(path.with_name("results.json"))
    assert "Restore it" in str(error.value)


def test_predictions(write_run):
    folder = write_run()
    run = read_run(folder / "results.json")
    arrays = run.predictions()
    assert arrays is not None
    assert (arrays["labels"] != arrays["student"]).sum() == 90
    np.savez(folder / "predictions.npz", labels=arrays["labels"])
    with pytest.raises(ValueError, match="hold labels and student"):
        run.predictions()
    (folder / "predictions.npz").write_bytes(b"PK\x03\x04 torn")
    # A finished run does not write them anew while it has its results.
    with pytest.raises(ValueError, match=r"be readable arrays.*and the results\.json"):
        run.predictions()
    (folder / "predictions.npz").unlink()
    assert run.predictions() is None


def test_a_run_without_test_data_is_left_out(tmp_path):
    """`train` measures nothing then: nothing to compare, and nothing broken."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text('{"format": 1, "name": "a", "steps": 5}')
    (folder / "metrics.jsonl").write_text("")
    assert find_runs([tmp_path]) == ([], [folder.resolve()])
