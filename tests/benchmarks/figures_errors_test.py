"""The figure of the errors of students: what docs/losses.md says of it is so."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
figures = importlib.import_module("figures_errors")


@pytest.fixture(scope="module")
def table():
    return figures.measure()


@pytest.fixture(scope="module")
def cell(table):
    """One number: the row by its first word, the column by its label on one line."""
    rows = [name.split(",")[0] for name in figures.LOSSES]
    columns = [name.replace("\n", " ") for name in figures.ERRORS]
    return lambda row, column: table[rows.index(row), columns.index(column)]


def test_errors_are_what_they_are_called():
    v = figures.teacher()
    for name in ("likeliest\nclass\nat half", "all others\nmade even"):
        p = jnp.exp(figures.ERRORS[name](v))
        np.testing.assert_allclose(p.sum(axis=-1), 1.0, atol=1e-5)
    halved = jnp.exp(figures.likeliest_halved(v))
    np.testing.assert_allclose(halved[:, 0], jnp.exp(v[:, 0]) / 2, rtol=1e-4)
    even = jnp.exp(figures.others_even(v))
    np.testing.assert_allclose(even[:, 0], jnp.exp(v[:, 0]), rtol=1e-4)
    np.testing.assert_allclose(even[:, 1], even[:, -1], rtol=1e-4)
    for shuffled in (figures.rare_shuffled(v), figures.renamed(v)):
        np.testing.assert_array_equal(jnp.sort(shuffled), jnp.sort(v))


def test_being_too_sure_costs_most_in_the_forward_kl(cell):
    sure = {
        name: cell(name, "logits × 2")
        for name in ("forward_kl", "adaptive_kl", "alpha_beta", "reverse_kl")
    }
    assert sorted(sure, key=sure.get, reverse=True) == [
        *("forward_kl", "adaptive_kl", "alpha_beta", "reverse_kl")
    ]


def test_others_count_for_more_where_they_are_decoupled(cell):
    for name in ("decoupled_kd", "logit_mse"):
        assert cell(name, "likeliest class at half") < 0.05
        assert cell(name, "all others made even") > 0.6
    assert cell("forward_kl", "likeliest class at half") > 0.1


def test_what_a_loss_leaves_open_it_does_not_see(table, cell):
    def unseen(row):
        return {
            name.replace("\n", " ")
            for name in figures.ERRORS
            if abs(cell(row, name.replace("\n", " "))) < figures.BLIND
        }

    assert unseen("standardize + forward_kl") == {"logits × 1/2", "logits × 2"}
    assert unseen("hinge_ranking") == {"rare ones shuffled"}
    assert unseen("universal_logit") == {
        *("likeliest two swapped", "rare ones shuffled", "all classes shuffled")
    }
    assert cell("hinge_ranking", "logits × 2") < 0
    assert np.sum(np.abs(table) < figures.BLIND) == 6  # and no other loss is blind


def test_the_figure_has_a_number_for_each_cell(table):
    (axis,) = figures.draw(table).axes
    assert len(axis.texts) == table.size
    assert [label.get_text() for label in axis.get_yticklabels()] == [*figures.LOSSES]
