from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distilljax import losses, objectives, optimizers
from distilljax.cli.overrides import override, parse_seeds
from distilljax.config import load_experiment
from distilljax.sharding import Rule

TINY = load_experiment(Path(__file__).parent / "tiny.py")


@pytest.fixture
def tiny():
    return TINY.config(0)


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("--steps=7", lambda c: c.steps == 7),
        ("--ema-decay=0.5", lambda c: c.ema_decay == 0.5),
        ("--ema_decay=0.5", lambda c: c.ema_decay == 0.5),
        ("--select=None", lambda c: c.select is None),
        ("--objective.temperature=1", lambda c: c.objective.temperature == 1.0),
        ("--objective.kd-weight=0.25", lambda c: c.objective.kd_weight == 0.25),
        ("--loader.shuffle=False", lambda c: c.loader.shuffle is False),
        ("--loader.in-memory=None", lambda c: c.loader.in_memory is None),
        ("--optimizer.weight-decay=3", lambda c: c.optimizer.weight_decay == 3),
        ("--optimizer.clip-norm=1", lambda c: c.optimizer.clip_norm == 1.0),
        ("--teacher.width=5", lambda c: c.teacher.width == 5),
        ("--validation.num-examples=9", lambda c: c.validation.num_examples == 9),
        ("--mesh=data=4,fsdp=2", lambda c: c.mesh == "data=4,fsdp=2"),
        ("--compute-dtype=bfloat16", lambda c: c.compute_dtype == "bfloat16"),
    ],
)  # fmt: skip
def test_a_field_is_overridden_and_nothing_else(tiny, word, read):
    assert not read(tiny) or "None" in word
    changed = override(tiny, [word], "test")
    assert read(changed)
    if "None" not in word:
        assert changed != tiny
    # the way back
    assert override(tiny, [], "test") is tiny


def test_several_words_for_one_field(tiny):
    changed = override(tiny, ["--student.hidden", "3", "4", "--steps", "9"], "test")
    assert changed.student.hidden == (3, 4)
    assert changed.steps == 9


def test_the_type_of_the_default_does_not_decide(tiny):
    """temperature=4 in the file, an int, and 1.5 on the command line."""
    config = replace(tiny, objective=objectives.LogitKD(temperature=4))
    changed = override(config, ["--objective.temperature=1.5"], "test")
    assert changed.objective.temperature == 1.5


def test_a_schedule_is_kept_or_replaced_by_a_number(tiny):
    schedule = optimizers.Linear(1.0, 4.0, 10)
    config = replace(tiny, objective=objectives.LogitKD(temperature=schedule))
    assert override(config, ["--steps=3"], "test").objective.temperature == schedule
    changed = override(config, ["--objective.temperature=2"], "test")
    assert changed.objective.temperature == 2.0


def test_parts_in_a_tuple_survive_and_cannot_be_overridden(tiny, capsys):
    config = replace(tiny, student_rules=(Rule("kernel", ("fsdp", None)),))
    assert override(config, ["--steps=3"], "test").student_rules == config.student_rules
    with pytest.raises(SystemExit):
        override(config, ["--student-rules=kernel"], "test")
    assert "which only the config file can change" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )


def test_functions_survive_and_cannot_be_overridden(tiny, capsys):
    config = replace(tiny, objective=objectives.LogitKD(divergence=losses.reverse_kl))
    changed = override(config, ["--steps=3"], "test")
    assert changed.objective.divergence is losses.reverse_kl
    with pytest.raises(SystemExit):
        override(config, ["--objective.divergence=forward_kl"], "test")
    assert "only the config file can change" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--stesp=1", "Did you mean --steps"),
        ("--student.hiden=1", "Did you mean --student.hidden?"),
        ("--optimizer.clipnorm=1", "Did you mean --optimizer.clip-norm?"),
        ("--batch-size=1", "Did you mean --loader.batch-size, --eval"),
        ("--loader.batchsize=1", "Did you mean --loader.batch-size?"),
        ("--objective.wrong=1", "There are --objective.temperature, --objective.kd"),
        ("--wrong=1", "There are --name, --steps"),
        ("--loader=1", "Its fields are --loader.batch-"),
        ("--validation=None", "only the file can replace it or leave it out. Its"),
        ("--optimizer.learning-rate=1", "fields are --optimizer.learning-rate.peak"),
    ],
)
def test_an_unknown_key_exits_with_a_suggestion(tiny, capsys, word, hint):
    with pytest.raises(SystemExit) as stop:
        override(tiny, ["--steps=3", word], "distilljax train")
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "a", "1..", "3..1", "1,", "1,1", "-1", "0..2..4"])
def test_wrong_seeds_are_refused(text):
    with pytest.raises(ValueError, match="--seeds must be like"):
        parse_seeds(text)


def test_seeds():
    assert parse_seeds("5") == [5]
    assert parse_seeds("0..0") == [0]
    assert parse_seeds("10..12") == [10, 11, 12]
