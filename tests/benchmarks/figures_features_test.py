"""The figure of the losses between features shows what their formulas say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
figures = importlib.import_module("figures_features")


@pytest.fixture(scope="module")
def table():
    return figures.measure()


def blind_to(table, name):
    """The transformations that a loss does not see, by their first words."""
    row = table[list(figures.LOSSES).index(name)]
    labels = [label.replace("\n", " ") for label in figures.TRANSFORMATIONS]
    blind = np.abs(row) < figures.BLIND
    return {label for label, unseen in zip(labels, blind, strict=True) if unseen}


def test_losses_are_blind_to_what_their_formulas_leave_out(table):
    lengths = {"all features × 3", "each image × its own factor"}
    assert blind_to(table, "hidden_mse") == set()
    assert blind_to(table, "hidden_cosine") == lengths
    assert blind_to(table, "linear_cka") == {
        "all features × 3",
        "one vector added to all",
        "sign flipped",
        "channels permuted",
        "channels rotated",
    }
    channels = {"sign flipped", "channels permuted"}
    assert blind_to(table, "attention_transfer") == lengths | channels | {
        "channels rotated"  # the sum of squares is the squared length
    }
    assert blind_to(table, "neuron_selectivity") == lengths | channels
    assert blind_to(table, "flow_of_solution") == {"sign flipped", "positions permuted"}


def test_no_loss_is_blind_to_another_order_of_the_images(table):
    images = list(figures.TRANSFORMATIONS).index("images\npermuted")
    assert np.all(table[:, images] > 0.2)


def test_the_figure_has_a_number_for_each_cell(table):
    figure = figures.draw(table)
    (axis,) = figure.axes
    assert len(axis.texts) == table.size
    assert [label.get_text() for label in axis.get_yticklabels()] == [*figures.LOSSES]
    numbers = [float(t.get_text().replace("\N{MINUS SIGN}", "-")) for t in axis.texts]
    rounded = np.reshape(numbers, table.shape)
    np.testing.assert_allclose(rounded, table, atol=0.5, rtol=0.05)


def test_correlations_of_channels_do_not_see_where_something_is(table):
    assert blind_to(table, "interchannel_correlation") == {
        *("all features × 3", "each image × its own factor"),
        *("sign flipped", "positions permuted"),
    }
