"""`distilljax cache`, as it is typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distilljax.cli import main
from distilljax.teachers import SignalStore
from tests.saved import records

CONFIG = Path(__file__).with_name("cached.py")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "store"
    assert main(["cache", str(CONFIG), "--out", str(out), "--kind", "hidden"]) == 0
    return out


def test_a_store_is_written_described_and_verified(store, capsys):
    assert main(["cache", str(CONFIG), "--out", str(store), "--kind", "hidden"]) == 0
    written = capsys.readouterr().out
    assert "already finished" in written
    assert main(["cache", "info", str(store)]) == 0
    shown = capsys.readouterr().out
    assert shown in written
    assert "hidden (dtype=same) of 264 classes" in shown
    assert "licence     data: CC0" in shown
    assert main(["cache", "info", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == 1
    assert main(["cache", "verify", str(store), "--rows", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 4
    assert found["logits"]["relative_to_rms"] < 1e-4


def test_a_student_is_trained_from_it(store, tmp_path):
    for arm in ("online", "cached"):
        words = ["--workdir", str(tmp_path / arm), "--arms", arm]
        if arm == "cached":
            words += [f"--teacher.store={store}"]
        assert main(["train", str(CONFIG), *words]) == 0
    online, cached = (
        [
            r["loss"]
            for r in records(tmp_path / arm / arm / "seed_0")
            if r["split"] == "train"
        ]
        for arm in ("online", "cached")
    )
    np.testing.assert_allclose(cached, online, rtol=1e-5)


def test_the_grid_has_the_temperature_of_the_objective(tmp_path, capsys):
    out = tmp_path / "store"
    words = ["cache", str(CONFIG), "--out", str(out), "--kind", "top_k", "--k=4"]
    assert main([*words, "--objective.temperature=3"]) == 0
    assert SignalStore(out).kind.temperatures == (1.0, 3.0)
    assert "coding      costs" in capsys.readouterr().out


def test_another_teacher_is_noticed(store, tmp_path, capsys):
    from distilljax.teachers.store import digest_of

    other = shutil.copytree(store, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["config"]["teacher"]["seed"] = 8
    manifest["digest"] = digest_of(manifest)
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert main(["cache", "verify", str(other)]) == 1
    assert "the teacher must be the one that was asked" in capsys.readouterr().err


def test_other_answers_are_noticed(store, tmp_path, capsys):
    """A store whose bytes are whole, of a teacher that says something else."""
    from distilljax.teachers.store import digest_of

    words = ["cache", str(CONFIG), "--out", str(tmp_path / "other"), "--kind", "hidden"]
    assert main([*words, "--teacher.seed=8"]) == 0
    theirs = json.loads((tmp_path / "other" / "manifest.json").read_text())
    ours = json.loads((store / "manifest.json").read_text())
    theirs |= {"teacher": ours["teacher"], "config": ours["config"]}
    theirs["digest"] = digest_of(theirs)
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(theirs))
    capsys.readouterr()
    assert main(["cache", "verify", str(tmp_path / "other")]) == 1
    assert json.loads(capsys.readouterr().out)["same"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache"], "required"),
        (["cache", str(CONFIG), "--out", "x"], "--kind"),
        (["cache", str(CONFIG), "--out", "x", "--kind", "all"], "invalid choice"),
        (["cache", "info"], "DIR"),
    ],
)
def test_a_wrong_command_says_what_is_missing(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "option", "owner"),
    [
        ("sampled", "--k=5", "top_k"),
        ("sampled", "--temperatures=1,2", "top_k"),
        ("dense", "--num-samples=5", "sampled"),
        ("top_k", "--hidden-dtype=int8", "hidden"),
        ("none", "--values=bfloat16", "top_k"),
    ],
)
def test_an_option_of_another_kind_is_not_ignored(
    kind, option, owner, tmp_path, capsys
):
    out = tmp_path / "store"
    assert main(["cache", str(CONFIG), "--out", str(out), "--kind", kind, option]) == 1
    name = option.split("=")[0]
    said = f"{name} must be given with --kind {owner} alone"
    assert said in capsys.readouterr().err
    assert not out.exists()


SUMMED = """
from dataclasses import replace
from distilljax.config import load_experiment
from distilljax.objectives import LogitKD, Sum


def config(seed=0):
    found = load_experiment({path!r}).config(seed)
    return replace(found, objective=Sum({{"soft": LogitKD(2.0), "own": LogitKD()}}))
"""


def test_the_grid_has_the_temperatures_of_the_parts_of_a_sum(tmp_path):
    path, out = tmp_path / "summed.py", tmp_path / "store"
    path.write_text(SUMMED.format(path=str(CONFIG)))
    words = ["cache", str(path), "--out", str(out), "--kind", "top_k", "--k=4"]
    assert main(words) == 0
    assert SignalStore(out).kind.temperatures == (1.0, 2.0)


def test_a_kind_that_the_loss_cannot_take_is_said_before_the_teacher_is_asked(
    tmp_path, capsys
):
    out = tmp_path / "store"
    words = ["cache", str(CONFIG), "--out", str(out), "--kind", "sampled"]
    assert main([*words, "--objective.temperature=3"]) == 1
    said = capsys.readouterr().err
    assert "what is kept must be what LogitKD can learn from, got Sampled" in said
    assert "temperature must be 1 where the teacher is a sample" in said
    assert not list(out.glob("shard*"))


def test_a_folder_without_a_store_is_named(tmp_path, capsys):
    assert main(["cache", "info", str(tmp_path)]) == 1
    assert "Write it: distilljax cache CONFIG --out DIR" in capsys.readouterr().err


def test_a_shard_that_was_cut_is_said_with_what_is_in_the_store(
    store, tmp_path, capsys
):
    copy = shutil.copytree(store, tmp_path / "copy")
    shard = copy / "shard-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["cache", "info", str(copy)]) == 1
    said = capsys.readouterr()
    assert "positions" in said.out
    assert "shard-00000.array_record" in said.err


def test_help_says_which_kind_is_for_what(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    assert "30 to 45 bytes per token" in capsys.readouterr().out
