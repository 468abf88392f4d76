"""The published run of SmolLM2 on Austen: the page says what the results say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
smollm2_austen = importlib.import_module("smollm2_austen")


@pytest.fixture(scope="module")
def found():
    return json.loads(smollm2_austen.RESULTS.read_text())


def test_the_table_of_the_page_is_that_of_the_results(found):
    page = (REPOSITORY / "docs/language_models.md").read_text()
    for line in smollm2_austen.table(found) + smollm2_austen.samples(found):
        assert line in page


def test_the_results_say_what_they_are_of(found):
    assert {"date", "versions", "machine", "num_examples"} <= found.keys()
    assert found["teacher"]["test"]["parameters"] == 134_515_008
    for arm in found["arms"].values():
        for seed in arm["seeds"].values():
            assert seed["selected"]["metric"] == "validation/nll"
            assert set(seed["samples"]) == set(found["teacher"]["samples"])


def test_the_teacher_is_worth_something_on_the_same_budget(found):
    """The claim of the page, for each student: closer to the teacher, lower NLL."""
    for kind in ("kept", "scratch"):
        taught, alone = (
            found["arms"][f"{kind}_{how}"]["seeds"] for how in ("cached", "labels")
        )
        for seed in taught:
            for number in ("nll", "kl_to_teacher"):
                ours, theirs = (a[seed]["test"][number] for a in (taught, alone))
                assert ours < theirs, (kind, seed, number)


def test_seeds_join_those_of_the_same_teacher(found):
    """A seed that was run again takes the place of the old one; others stay."""
    arm = found["arms"]["scratch_cached"]["seeds"]["0"]
    new = {"arms": {"scratch_cached": {"seeds": {0: arm | {"steps": 9}, 7: arm}}}}
    same = new | {"teacher_fingerprint": found["teacher_fingerprint"]}
    arms = smollm2_austen.joined(found, same)
    assert list(arms) == list(found["arms"])
    assert {0, 7} <= set(arms["scratch_cached"]["seeds"])
    assert arms["scratch_cached"]["seeds"][0]["steps"] == 9
    assert arms["kept_cached"]["seeds"][0]["date"]
    other = new | {"teacher_fingerprint": "another"}
    assert smollm2_austen.joined(found, other) == new["arms"]


def test_runs_are_needed(tmp_path):
    with pytest.raises(SystemExit, match="must hold finished runs"):
        smollm2_austen.collect(tmp_path)
