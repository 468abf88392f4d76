"""The verbs together."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import distilljax
from distilljax.cli import VERBS, main
from tests.saved import saved_steps

TINY = str(Path(__file__).parent / "tiny.py")


def test_without_a_verb_there_is_help(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in out


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"distilljax {distilljax.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_output_that_nobody_reads_is_no_error(monkeypatch, capsys, words):
    """As of `distilljax train --help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(words) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("word", "verb"), [("tran", "train"), ("reprot", "report")])
def test_a_misspelt_verb_gets_a_suggestion(capsys, word, verb):
    assert main([word, TINY]) == 2
    assert f"Did you mean {verb}?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: distilljax {verb}" in capsys.readouterr().out


def test_train_evaluate_profile_and_report(tmp_path, capsys, one_device):
    """The verbs one after another, as a user would."""
    workdir = tmp_path / "run"
    words = [TINY, "--workdir", str(workdir)]
    assert main(["train", *words, "--profile"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert saved_steps(workdir)[-1] == 20
    (trace,) = (workdir / "profile").rglob("*.xplane.pb")
    blob = trace.read_bytes()
    assert b"StepMarker" in blob or b"train" in blob  # our annotation
    assert b"jit__update" in blob or b"_update" in blob  # the step that was traced

    assert main(["evaluate", *words, "--split=test"]) == 0
    found = json.loads(capsys.readouterr().out)
    results = json.loads((workdir / "results.json").read_text())
    assert found["split"] == "test"
    assert found["student"]["nll"] == results["student"]["nll"]
    assert found["teacher"]["accuracy"] == results["teacher"]["accuracy"]

    # other data, or another size of batches: the same student
    assert main(["evaluate", *words, "--test.seed=9", "--eval-batch-size=8"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["student"]["nll"] != found["student"]["nll"]

    assert main(["train", *words]) == 0
    assert "already finished" in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split=test", "--workdir=nowhere"], "hold a run with a checkpoint"),
        (["--arm=distiled", "--workdir=nowhere"], "Did you mean distilled?"),
    ],
)
def test_evaluate_explains_what_is_wrong(capsys, one_device, words, message):
    assert main(["evaluate", TINY, *words]) == 1
    assert message in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_evaluate_refuses_another_student(tmp_path, capsys, one_device):
    words = [TINY, "--workdir", str(tmp_path)]
    assert main(["train", *words, "--steps=2"]) == 0
    assert main(["evaluate", *words, "--student.hidden", "5"]) == 1
    assert "student.hidden" in capsys.readouterr().err
