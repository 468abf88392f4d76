"""What two configs do not share, and what that makes of their comparison."""

from __future__ import annotations

import pytest

from distilljax import data, models, objectives
from distilljax.config import Config, to_json
from distilljax.evaluation.comparison import compare
from distilljax.evaluation.differences import describe, what_differs
from distilljax.evaluation.headlines import headlines
from distilljax.evaluation.runs import find_runs

LOADER = {"_type": "distilljax.data.pipeline:Loader", "batch_size": 36}


def _compare(write_run, tmp_path, config=None, arm="soft targets", **both):
    for seed, errors in enumerate((105, 107, 102)):
        write_run(arm="hard labels", seed=seed, errors=errors, baseline=None, **both)
        write_run(arm=arm, seed=seed, errors=errors - 14, config=config, **both)
    (experiment,) = compare(find_runs([tmp_path])[0])
    (comparison,) = experiment.comparisons
    return experiment, comparison


def _kinds(comparison):
    return {d.what: d.kind for d in comparison.differs}


def test_the_objective_is_what_is_compared(write_run, tmp_path):
    experiment, comparison = _compare(write_run, tmp_path)
    assert _kinds(comparison) == {"objective": "teaching"}
    assert comparison.verdict == "helped"
    assert headlines(experiment)[0].text.startswith(
        "“soft targets” helped against “hard labels”. Accuracy"
    )


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"optimizer": {"_type": "distilljax.optimizers:SGD"}}, "optimizer"),
        (
            {"optimizer": {"_type": "distilljax.optimizers:AdamW", "learning_rate": 1}},
            "optimizer.learning_rate",
        ),
        ({"loader": LOADER | {"augment": "shift"}}, "loader.augment"),
        ({"student": {"_type": "distilljax.models:MLP", "dropout": 0.5}}, "student"),
        ({"ema_decay": 0.99}, "ema_decay"),
        ({"validation": "another"}, "validation"),
        ({"test": "another"}, "test"),
        ({"a field of tomorrow": 1}, "a field of tomorrow"),
    ],
)
def test_anything_but_the_teaching_is_unfair(write_run, tmp_path, config, what):
    """A learning rate of a thousandth once made a teacher worth 87 points."""
    experiment, comparison = _compare(write_run, tmp_path, config)
    assert _kinds(comparison) == {what: "unfair", "objective": "teaching"}
    assert comparison.verdict == "not a fair comparison"
    (headline,) = headlines(experiment)
    assert headline.text.startswith("NOT A FAIR COMPARISON")
    assert f"({what} " in headline.text
    assert "so this says nothing about the teaching" in headline.text


def test_what_changes_no_result_is_no_difference(write_run, tmp_path):
    config = {
        "description": "another",
        "log_every_steps": 7,
        "mesh": "data=2",
        "loader": LOADER | {"num_workers": 3},
        "teacher": {"_type": "distilljax.workdir:TrainedRun", "workdir": "runs/u"},
    }
    _, comparison = _compare(write_run, tmp_path, config)
    kinds = {"objective": "teaching", "teacher.workdir": "teaching"}
    assert _kinds(comparison) == kinds


def test_without_selection_validation_only_draws_the_curves(write_run, tmp_path):
    for seed in range(3):
        common = {"seed": seed, "root": tmp_path / "runs"}
        hard, soft = {"select": None}, {"select": None, "eval_every_steps": 7}
        write_run(arm="hard labels", baseline=None, config=hard, **common)
        write_run(config=soft, **common)
    (experiment,) = compare(find_runs([tmp_path])[0])
    assert _kinds(experiment.comparisons[0]) == {"objective": "teaching"}


def test_other_training_data_shares_the_credit(write_run, tmp_path):
    arm = "transfer set of 1,200"
    experiment, comparison = _compare(write_run, tmp_path, arm=arm)
    assert _kinds(comparison) == {"data": "training data", "objective": "teaching"}
    assert comparison.verdict == "helped"
    assert headlines(experiment)[0].text.startswith(
        f"“{arm}” (other training data) helped against “hard labels”."
    )
    (data,) = (d for d in comparison.differs if d.what == "data")
    assert data.arm == "Tfds(name=digits, split=train)"
    assert data.baseline == (
        "Few(source=Tfds(name=digits, split=train), num_examples=36, seed=0)"
    )


def test_a_baseline_with_a_teacher_is_named(write_run, tmp_path):
    for seed, errors in enumerate((105, 107, 102)):
        write_run(arm="T = 3", seed=seed, errors=errors, baseline=None)
        write_run(arm="T = 8", seed=seed, errors=errors + 20, baseline="T = 3")
    for path in tmp_path.rglob("*T_=_8*/config.json"):
        path.write_text(path.read_text().replace("4.0", "8.0"))
    (experiment,) = compare(find_runs([tmp_path])[0])
    (comparison,) = experiment.comparisons
    (difference,) = comparison.differs
    assert str(difference) == "objective.temperature 8 against 4"
    assert difference.kind == "teaching"
    assert headlines(experiment)[0].text.startswith(
        "“T = 8” hurt against “T = 3” (distilled itself)."
    )


def test_runs_without_config_are_compared_by_their_results(write_run, tmp_path):
    experiment, comparison = _compare(write_run, tmp_path, with_files=False)
    assert comparison.differs == ()
    (note,) = (n for n in experiment.notes if "config.json" in n)
    assert note.startswith("soft targets and hard labels: without config.json")


def test_real_configs(write_run, tmp_path):
    """What `to_json` writes: parts within parts, tuples, functions by their names."""
    common = {
        "name": "real",
        "student": models.MLP(num_features=64, hidden=(32,), num_classes=10),
        "loader": data.Loader(batch_size=32, augment=data.RandomShift(1)),
        "steps": 10,
    }
    train = data.Tfds("digits", "train")
    soft = Config(objective=objectives.LogitKD(temperature=2.0), data=train, **common)
    hard = Config(
        objective=objectives.CrossEntropy(),
        data=data.Few(train, 36, seed=0),
        **(common | {"loader": data.Loader(batch_size=32, teacher_view="clean")}),
    )
    write_run(config=to_json(soft))
    write_run(arm="hard labels", baseline=None, config=to_json(hard))
    runs = {run.arm: run for run in find_runs([tmp_path])[0]}
    found = what_differs([(runs["soft targets"], runs["hard labels"])])
    assert [(d.what, d.kind) for d in found] == [
        ("loader.augment", "unfair"),
        ("data", "training data"),
        ("loader.teacher_view", "teaching"),
        ("objective", "teaching"),
    ]
    assert (found[0].arm, found[0].baseline) == (
        describe(to_json(data.RandomShift(1))),
        "none",
    )
    assert found[3].arm == (
        "LogitKD(temperature=2, kd_weight=1, ce_weight=0, divergence=forward_kl)"
    )


def test_a_config_file_may_have_been_moved(write_run, tmp_path):
    loss = "_distilljax_config:/somewhere/mine.py:Loss"
    for seed in range(3):
        write_run(arm="a", seed=seed, config={"objective": {"_ref": loss}})
        moved = {"objective": {"_ref": loss.replace("some", "else")}}
        write_run(arm="b", seed=seed, baseline="a", config=moved)
    comparisons = compare(find_runs([tmp_path])[0])[0].comparisons
    assert [c.differs for c in comparisons] == [()]
