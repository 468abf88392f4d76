"""Encoders distilled: the page and the figure say what was measured."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
encoders = importlib.import_module("encoders")
figures = importlib.import_module("figures_encoders")


@pytest.fixture
def results():
    return json.loads(encoders.RESULTS.read_text())


def test_the_page_has_the_tables_of_the_results(results):
    page = figures.PAGE.read_text()
    assert figures.filled(page, figures.tables(results)) == page
    changed = copy.deepcopy(results)
    changed["supersense"]["teacher"]["accuracy"] = 0.123
    other = figures.filled(page, figures.tables(changed))
    assert "| `teacher` | MiniLM, fine-tuned. | 0.123 |" in other


def test_every_arm_of_the_configs_was_run(results):
    for part, path in (
        ("embedding", encoders.GLOSSES),
        ("supersense", encoders.SUPERSENSE),
    ):
        planned = encoders.load_experiment(path).arms(0)
        arms = results[part]["arms"]
        assert arms.keys() == planned.keys()
        for name, arm in arms.items():
            assert arm["steps"] == planned[name].steps
            assert arm["description"] == planned[name].description
    # those that were not run are told on the page
    page = figures.PAGE.read_text()
    missing = [
        name for name, arm in results["supersense"]["arms"].items() if not arm["seeds"]
    ]
    assert all(f"`{name}` was not run" in page for name in missing)
    assert all(arm["seeds"] for arm in results["embedding"]["arms"].values())


def test_what_was_expected_came_out(results):
    """The claims of the configs and of the page, against the numbers."""
    found = results["supersense"]
    assert found["teacher"]["interval"][0] > found["bag_of_words"]["interval"][1]
    rows = {name: share for name, _, share in figures.supersense_rows(found)}
    for student in ("kept", "small"):
        assert rows[f"{student}_transfer"] >= rows[f"{student}_labels"] + 0.04
    rows = {name: row for name, *row in figures.embedding_rows(results["embedding"])}
    assert rows["teacher"][1] == pytest.approx(1, abs=1e-5)
    assert rows["teacher"][2] == pytest.approx(0.654, abs=5e-4)
    for n in (3, 2):
        assert rows[f"kept{n}_cosine"][1] > rows[f"fresh{n}_cosine"][1] + 0.2


def test_the_figure_shows_every_arm(results):
    figure = figures.draw(results)
    left, right = figure.axes
    texts = {text.get_text() for text in left.texts}
    assert {"kept3, cosine", "fresh2, cosine", "kept2, untrained", "teacher"} <= texts
    arms = results["supersense"]["arms"].values()
    assert len(right.patches) == sum(bool(arm["seeds"]) for arm in arms)


def test_the_mean_is_over_seeds():
    seeds = [{"human": {"pearson": 0.2}}, {"human": {"pearson": 0.4}}]
    assert figures.mean(seeds, "human", "pearson") == pytest.approx(0.3)


class Texts:
    def __init__(self, texts):
        self.texts = texts

    def documents(self):
        return self.texts


def rows(texts, labels):
    config = SimpleNamespace(text=Texts(texts))
    kept = np.arange(len(texts))
    return SimpleNamespace(config=config, kept=kept, labels=np.array(labels))


def test_a_bag_of_words_learns_words():
    pytest.importorskip("sklearn")
    train = rows(
        ["a small cat", "a small dog", "red wine", "old wine"] * 5, [0, 0, 1, 1] * 5
    )
    held_out = rows(["the cat", "wine here"], [0, 1])
    found = encoders.bag_of_words(train, held_out, np.arange(20))
    assert found["accuracy"] == 1
    assert found["interval"][0] < 1
    # what it was not given, it does not know
    found = encoders.bag_of_words(train, held_out, [0, 2])
    assert found["words"] == 4
