"""What the committed compilations of the pod recipes must show."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks/scale.py")
scale = importlib.util.module_from_spec(SPEC)
sys.modules["scale"] = scale  # dataclasses look their module up
SPEC.loader.exec_module(scale)
CASES = json.loads((ROOT / "benchmarks/results/scale.json").read_text())["cases"]
COMPILED = {n: c for n, c in CASES.items() if c["programs"]["step"]["memory"]}
FUSED = {n: c for n, c in COMPILED.items() if not c["plain"]}
RECIPES = {n: c for n, c in CASES.items() if not n.startswith("weak")}
WEAK = {n: c for n, c in CASES.items() if n.startswith("weak")}


def test_what_was_compiled_are_cases_of_the_benchmark():
    names = {case.name for case in [*scale.CASES, *scale.WEAK]}
    assert CASES.keys() <= names
    assert {name.split(",")[0] for name in FUSED} & {"gemma", "qwen", "llama"}
    for case in CASES.values():
        assert case["versions"]["libtpu"]
        assert case["date"]


@pytest.mark.parametrize("name", [n for n, c in RECIPES.items() if not c["plain"]])
def test_a_recipe_fits(name):
    step = CASES[name]["programs"]["step"]
    assert step["fits"]
    assert step["headroom"] > 0.1 * step["limit"]


@pytest.mark.parametrize("name", COMPILED)
def test_the_walk_finds_the_peak_that_the_compiler_states(name):
    memory = COMPILED[name]["programs"]["step"]["memory"]
    assert memory["predicted_peak"] == pytest.approx(memory["peak"], rel=0.05)
    assert memory["peak"] <= memory["allocated"]


@pytest.mark.parametrize("name", COMPILED)
def test_a_plan_takes_less_than_five_minutes_on_two_cores(name):
    case = COMPILED[name]
    assert 1 < case["programs"]["step"]["compile_seconds"] <= case["plan_seconds"] < 300


@pytest.mark.parametrize("name", FUSED)
def test_nothing_of_time_squared_and_no_logits_are_in_memory(name):
    facts = FUSED[name]["facts"]
    assert not facts["time_time"]
    assert facts["tokens_vocabulary"] == []
    assert facts["gathered_logits"] == []


@pytest.mark.parametrize("name", FUSED)
def test_no_kernel_of_the_teacher_is_gathered_for_all_layers(name):
    assert FUSED[name]["facts"]["largest_gather_of_kernel"] <= 1


@pytest.mark.parametrize("name", FUSED)
def test_the_loss_sends_less_than_the_models(name):
    """Before its kernels were gathered once it sent more than both together."""
    parts = FUSED[name]["programs"]["step"]["sent_by_part"]
    assert 0 < parts["loss"] < 0.1 * (parts["teacher"] + parts["student"])


@pytest.mark.parametrize("name", [n for n, c in COMPILED.items() if c["plain"]])
def test_a_plain_loss_has_the_logits_in_memory(name):
    """So the search for them finds them where they are."""
    assert COMPILED[name]["facts"]["tokens_vocabulary"]


def test_more_groups_of_chips_cost_no_memory_and_the_loss_sends_no_more():
    if len(WEAK) < 2:
        pytest.skip("benchmarks/scale.py --only weak has not been run to its end")
    steps = [c["programs"]["step"] for c in WEAK.values()]
    first = steps[0]["memory"]["allocated"]
    for step in steps:
        assert step["memory"]["allocated"] == pytest.approx(first, rel=0.02)
        assert step["loss_bytes"] == steps[0]["loss_bytes"] > 0
    # over n groups, as any sum: 2 (n - 1) / n times what is summed
    more = [s["sent_by_part"]["loss"] - s["loss_bytes"] for s in steps]
    groups = [s["mesh"].get("data", 1) for s in steps]
    summed = {m / (2 * (n - 1) / n) for m, n in zip(more, groups, strict=True) if n > 1}
    assert max(summed) == pytest.approx(min(summed), rel=0.01)
    assert more[groups.index(1)] == pytest.approx(0, abs=1e6)


def test_of_every_recipe_a_short_and_a_long_context_are_no_widths():
    """Where it is one, squares of it cannot be told from kernels: not looked at."""
    found = [(n, case) for n, case in FUSED.items() if case["facts"]["time_time"] == []]
    for recipe in {case.name.split(",")[0] for case in scale.CASES}:
        looked = [c["context"] for n, c in found if n.startswith(recipe)]
        assert min(looked) <= 4_096 < max(looked)


def test_each_case_says_of_which_sources_it_is():
    assert all(len(case["source"]) == 16 for case in CASES.values())
    assert not scale.is_of_now(None)
    case = {"source": scale.source(), "versions": {"jax": "0.0.1"}}
    assert not scale.is_of_now(case)
    assert scale.is_of_now(case | {"versions": scale.versions()})


def test_the_page_has_these_numbers():
    page = (ROOT / "docs/scale.md").read_text()
    lines = [*scale.recipes(CASES), *scale.weak(CASES)]
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) - bool(RECIPES) - bool(WEAK) == len(CASES)
    lines += [*scale.collectives(CASES), *scale.compiled_with(CASES)]
    assert [line for line in lines if line not in page] == []
