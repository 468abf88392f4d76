"""Grouping, pairing and verdicts: what is claimed, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distilljax.evaluation.comparison import compare
from distilljax.evaluation.headlines import expectations, headlines
from distilljax.evaluation.runs import find_runs


def _compare(path):
    return compare(find_runs([path])[0])


def _pairs(write_run, hard, soft, **changes):
    for seed, (a, b) in enumerate(zip(hard, soft, strict=True)):
        write_run(arm="hard labels", seed=seed, errors=a, baseline=None)
        write_run(seed=seed, errors=b, **changes)


@pytest.mark.parametrize(
    ("hard", "soft", "verdict"),
    [
        ((105, 107, 102), (91, 92, 89), "helped"),
        ((91, 92, 89), (105, 107, 102), "hurt"),
        ((91, 92, 89), (92, 89, 91), "no difference shown"),
        ((105, 107), (91, 92), "too few pairs for a claim"),
        ((105,), (91,), "too few pairs for a claim"),
    ],
)
def test_verdicts(write_run, tmp_path, hard, soft, verdict):
    _pairs(write_run, hard, soft)
    (experiment,) = _compare(tmp_path)
    (comparison,) = experiment.comparisons
    assert comparison.verdict == verdict
    difference = comparison.differences["accuracy"]
    assert difference is not None
    expected = (np.array(hard) - np.array(soft)) / 400
    np.testing.assert_allclose(difference.mean, expected.mean(), atol=1e-12)
    (headline,) = headlines(experiment)
    assert verdict.replace(" pairs", "") in headline.text


def test_helped_and_hurt_differ_in_nothing_but_the_sign(write_run, tmp_path):
    root = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for seed, (few, many) in enumerate([(91, 105), (92, 107), (89, 102)]):
        for key, hard, soft in (("a", many, few), ("b", few, many)):
            common = {"seed": seed, "root": root[key]}
            write_run(arm="hard labels", errors=hard, baseline=None, **common)
            write_run(errors=soft, **common)
    texts = [headlines(_compare(root[key])[0])[0].text for key in "ab"]
    swaps = {
        "hurt": "helped",
        "more errors": "fewer errors",
        "0 of 3": "3 of 3",
        ": worse ": ": better ",
    }
    mirrored = texts[1].translate(str.maketrans("+−", "−+"))
    for word, other in swaps.items():
        mirrored = mirrored.replace(word, other)
    low, high = mirrored.split("interval ")[1].split(",")[0].split(" to ")
    mirrored = mirrored.replace(f"{low} to {high}", f"{high} to {low}")
    assert mirrored == texts[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": 1200}, "training steps 1,200 against 600"),
        ({"examples_seen": 99}, "examples seen 99 against 21,600"),
        ({"split": "validation"}, "evaluated split validation against test"),
        ({"num_examples": 500}, "evaluated examples 500 against 400"),
    ],
)
def test_unequal_budgets_are_said_loudly(write_run, tmp_path, changes, reason):
    _pairs(write_run, (105, 107, 102), (91, 92, 89), **changes)
    (experiment,) = _compare(tmp_path)
    (comparison,) = experiment.comparisons
    assert comparison.verdict == "not a fair comparison"
    assert reason in comparison.unfair
    (headline,) = headlines(experiment)
    assert headline.text.startswith("NOT A FAIR COMPARISON")
    assert reason in headline.text
    assert "helped" not in headline.text


def test_a_price_beyond_accuracy_is_in_the_headline(write_run, tmp_path):
    _pairs(write_run, (105, 107, 102), (91, 92, 89))
    for path in tmp_path.rglob("*soft_targets*/results.json"):
        record = json.loads(path.read_text())
        record["student"]["nll"] += 5.0
        path.write_text(json.dumps(record))
    (headline,) = headlines(_compare(tmp_path)[0])
    assert headline.verdict == "helped"
    assert headline.text.endswith(
        "Beyond accuracy: better KL to teacher, agreement, calibration error; "
        "worse NLL."
    )


def test_a_larger_student_is_not_a_fair_comparison(write_run, tmp_path):
    _pairs(write_run, (105, 107, 102), (91, 92, 89))
    for path in tmp_path.rglob("*soft_targets*/results.json"):
        record = json.loads(path.read_text())
        record["student"]["parameters"] *= 2
        path.write_text(json.dumps(record))
    (comparison,) = _compare(tmp_path)[0].comparisons
    assert comparison.unfair == ("parameters 4,820 against 2,410",)


def test_mcnemar_counts_predictions(write_run, tmp_path):
    _pairs(write_run, (105, 107, 102), (91, 92, 89))
    (comparison,) = _compare(tmp_path)[0].comparisons
    assert comparison.pooled is not None
    won, lost = comparison.pooled.gained, comparison.pooled.lost
    assert won - lost == 105 + 107 + 102 - 91 - 92 - 89
    assert comparison.pooled.total == 1200
    # Predictions of other examples cannot be paired.
    for path in tmp_path.rglob("*soft_targets-1/predictions.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **(arrays | {"labels": arrays["labels"][::-1]}))
    assert _compare(tmp_path)[0].comparisons[0].pooled is None


def test_seeds_without_a_partner_are_left_out_and_named(write_run, tmp_path):
    _pairs(write_run, (105, 107, 102), (91, 92, 89))
    write_run(seed=7, errors=10)
    (experiment,) = _compare(tmp_path)
    assert experiment.comparisons[0].seeds == (0, 1, 2)
    assert any("seeds 7 have no partner" in note for note in experiment.notes)


def test_what_is_missing_is_noted(write_run, tmp_path):
    write_run(teacher_errors=None, baseline="hard labels")
    (experiment,) = _compare(tmp_path)
    assert experiment.comparisons == ()
    assert experiment.teacher is None
    text = "\n".join(experiment.notes)
    assert "'hard labels', has no finished run" in text
    assert "one seed only" in text
    assert "No teacher was evaluated" in text


def test_no_baseline_at_all_is_noted(write_run, tmp_path):
    write_run(arm="hard labels", baseline=None)
    (experiment,) = _compare(tmp_path)
    assert any("No arm names a baseline" in note for note in experiment.notes)


def test_uneven_runs_are_noted(write_run, tmp_path):
    write_run(arm="hard labels", baseline=None, teacher_errors=14)
    write_run(teacher_errors=12, machine={"device": "tpu"})
    chosen = {"step": 5, "metric": "test/accuracy", "value": 0.9}
    write_run(seed=1, steps=700, selected=chosen)
    text = "\n".join(_compare(tmp_path)[0].notes)
    assert "Seed 0: the arms had different teachers (96.50 % and 97.00 %)" in text
    assert "different machines" in text
    assert "seeds differ in training steps (600, 700)" in text
    assert "selected by test/accuracy" in text


def test_recall_of_a_focus_class(write_run, tmp_path):
    for seed in range(3):
        focus = {"focus_classes": [3], "seed": seed}
        write_run(arm="hard labels", errors=10, baseline=None, blind=3, **focus)
        write_run(errors=10, **focus)
    (experiment,) = _compare(tmp_path)
    arms = {arm.name: arm for arm in experiment.arms}
    assert arms["hard labels"].recall[3].mean == 0
    wrong = 40 * (1 - arms["soft targets"].recall[3].mean)
    assert 0 <= wrong < 10
    assert experiment.comparisons[0].recall[3].positive == 3
    assert "Recall on 3: 0.0 % to " in headlines(experiment)[0].text


def test_arms_are_ordered_baseline_first_and_by_number(write_run, tmp_path):
    for arm in ("T = 20", "T = 4", "T = 8"):
        write_run(arm=arm)
    write_run(arm="hard labels", baseline=None)
    names = [arm.name for arm in _compare(tmp_path)[0].arms]
    assert names == ["hard labels", "T = 4", "T = 8", "T = 20"]


def test_an_expectation_stands_beside_what_its_arm_measured(write_run, tmp_path):
    for seed, (hard, soft) in enumerate([(105, 91), (107, 92), (102, 89)]):
        focus = {
            "focus_classes": [3],
            "seed": seed,
            "expected": "recall of 3 over 80 %.",
        }
        write_run(arm="hard labels", errors=hard - 40, baseline=None, blind=3, **focus)
        write_run(errors=soft, **focus)
        write_run(name="alone", arm="one", seed=seed, baseline=None, errors=8)
    alone, experiment = sorted(_compare(tmp_path), key=lambda e: e.name)
    recall = experiment.arms[1].recall[3].mean
    # The baseline has inherited the sentence: nothing is expected of it.
    assert expectations(experiment) == [
        "Expected of “soft targets”: recall of 3 over 80 %. Measured: accuracy "
        f"73.8 % to 77.3 %; errors 104.7 to 90.7 of 400; recall on 3 0.0 % to "
        f"{100 * recall:.1f} %."
    ]
    assert expectations(alone) == [
        "Expected: soft targets at least +3 points over hard labels. Measured: "
        "accuracy 98.0 %; errors 8.0 of 400."
    ]


def test_controls_come_after_what_they_control(write_run, tmp_path):
    for seed in range(3):
        for name, errors in (("a control", 92), ("b gain", 60), ("c loss", 120)):
            common = {"name": name, "seed": seed}
            write_run(arm="hard labels", errors=90 + seed, baseline=None, **common)
            write_run(errors=errors + (2 - seed if errors == 92 else seed), **common)
    write_run(name="a single", baseline=None, teacher_errors=None)
    names = [experiment.name for experiment in _compare(tmp_path)]
    assert names == ["b gain", "c loss", "a control", "a single"]


def test_an_experiment_has_one_set_of_classes(write_run, tmp_path):
    write_run()
    write_run(seed=1, class_names=[*"abcdefghij"])
    with pytest.raises(ValueError, match="have the class_names of"):
        _compare(tmp_path)


def test_texts_name_their_arm_only_where_the_arms_differ(write_run, tmp_path):
    for seed in range(2):
        write_run(arm="hard labels", seed=seed, baseline=None, expected=None)
        write_run(seed=seed, expected="more than 80 %")
    (experiment,) = _compare(tmp_path)
    assert experiment.descriptions == ("36 labelled digits; the teacher saw 1,200.",)
    assert expectations(experiment) == [
        "Expected of “soft targets”: more than 80 %. Measured: accuracy 77.5 % to "
        "77.5 %; errors 90.0 to 90.0 of 400."
    ]


def test_reliability_is_pooled_over_seeds(write_run, tmp_path):
    folders = [write_run(seed=seed, confidence=0.7 + 0.1 * seed) for seed in range(3)]
    (experiment,) = _compare(tmp_path)
    pooled = experiment.arms[0].reliability
    assert pooled is not None
    tables = [
        json.loads((folder / "results.json").read_text())["student"]["reliability"]
        for folder in folders
    ]
    for i in range(15):
        count = sum(table["count"][i] for table in tables)
        right = sum(
            table["count"][i] * table["accuracy"][i]
            for table in tables
            if table["count"][i]
        )
        assert pooled["count"][i] == count
        if count:
            assert pooled["accuracy"][i] == pytest.approx(right / count)
        else:
            assert pooled["accuracy"][i] is None
