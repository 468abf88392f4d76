"""A search tries what may help, and ranks what it has compiled."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import jax
import pytest

from distilljax.cli import overrides
from distilljax.config import load_experiment
from distilljax.planning import open_topology
from distilljax.planning.page import page
from distilljax.planning.search import candidates, changed, search
from distilljax.planning.words import options, ranking
from tests.planning.small import SMALL, language_model

RECIPES = Path(__file__).resolve().parents[2] / "configs/lm"


@pytest.mark.slow
def test_a_search_ranks_what_it_compiled(here):
    config = language_model()
    said = []
    rows = search(config, open_topology(), here, limit=3, say=said.append)
    assert len(said) == len(rows) - 1 >= 2
    assert {} in [row["changes"] for row in rows]
    assert all(row["fits"] is None for row in rows)  # of a CPU no limit is known
    sizes = [row["allocated"] for row in rows]
    assert sizes == sorted(sizes)
    assert here.programs["step"].memory.allocated in sizes
    assert "set aside" in ranking(rows)[0]
    assert not any("fit" in line for line in [*said, *ranking(rows)])


def test_an_error_of_the_compiler_in_one_variant_does_not_end_the_search(
    here, monkeypatch
):
    def broken(config, topology):
        raise jax.errors.JaxRuntimeError("INTERNAL: during tiling. More\nof it")

    monkeypatch.setattr("distilljax.planning.search.plan", broken)
    said = []
    rows = search(language_model(), open_topology(), here, limit=3, say=said.append)
    assert [row["error"] for row in rows] == [None] + ["INTERNAL: during tiling"] * 2
    assert all(line.endswith(": INTERNAL: during tiling") for line in said)
    assert "--objective.chunk-tokens=" in said[0]
    drawn = page(here.to_json() | {"search": rows})
    assert drawn.count("INTERNAL: during tiling") == 2
    assert '<th class="n">set aside</th>' in drawn


def test_what_is_tried_can_be_pasted_behind_the_command(here):
    """Of everything but remat, which only a config can name."""
    path = str(RECIPES / "gemma2_9b_to_2b.py")
    recipe = load_experiment(path).config(0)
    parser = overrides.make_parser("plan", "", workdir=False)
    tried = [c for c in candidates(language_model(), here) if "remat" not in c]
    assert len(tried) > 4
    for changes in tried:
        _, experiment, words = overrides.parse(parser, [path, options(changes)])
        (run,) = overrides.plan(experiment, words, seeds=[0], arms=None, parser=parser)
        assert run.config == changed(recipe, changes), changes


def test_a_search_leaves_the_batch_and_the_student_alone(here):
    config = language_model(student=replace(SMALL, remat=None))
    tried = list(candidates(config, here))
    assert {name for changes in tried for name in changes} == {
        "chunk_tokens", "mesh", "remat", "accumulate",
    }  # fmt: skip
    for changes in tried:
        other = changed(config, changes)
        assert other.loader == config.loader
        shape = replace(other.student, remat=None)
        assert shape == config.student
        sizes = [
            int(n) for n in other.mesh.replace("=", " ").replace(",", " ").split()[1::2]
        ]
        assert prod(sizes) == 8


def test_the_plan_as_it_is_is_not_tried_again(here):
    """The one device of a plan has a mesh too, though no axis of it is split."""
    step = replace(here.programs["step"], mesh={"data": 1})
    alone = replace(here, programs={"step": step})
    tried = list(candidates(language_model(mesh="data=1"), alone))
    assert tried
    assert not [changes for changes in tried if "mesh" in changes]
    meshes = [changes.get("mesh") for changes in candidates(language_model(), here)]
    assert "fsdp=2,tensor=4" in meshes
    assert language_model().mesh not in meshes


def test_chunks_are_tried_only_where_logits_are_made_of_a_head(here):
    config, arrays = language_model(), replace(here, has_head=False)
    assert here.has_head
    assert [c for c in candidates(config, here) if "chunk_tokens" in c]
    assert not [c for c in candidates(config, arrays) if "chunk_tokens" in c]
