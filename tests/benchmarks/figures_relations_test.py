"""The figure of the relation losses: what its caption and its page say about it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
figures = importlib.import_module("figures_relations")


@pytest.fixture(scope="module")
def surfaces():
    return {name: figures.surface(loss, 21) for name, loss in figures.LOSSES.items()}


@pytest.mark.parametrize("name", figures.LOSSES)
def test_each_map_is_lowest_at_the_star_or_on_its_ray(name, surfaces):
    found = surfaces[name]
    row, column = np.unravel_index(np.argmin(found["values"]), found["values"].shape)
    lowest = np.array([found["ticks"][column], found["ticks"][row]])
    star, step = figures.CLOUD[-1], found["ticks"][1] - found["ticks"][0]
    if name in ("rkd_distance", "rkd_angle", "similarity_preserving"):
        assert np.all(np.abs(lowest - star) <= step)
    else:  # a valley from the origin
        cosine = lowest @ star / np.linalg.norm(lowest) / np.linalg.norm(star)
        assert cosine > 0.99


def test_six_maps_are_drawn(surfaces):
    figure = figures.draw(surfaces)
    assert [axis.get_title(loc="left") for axis in figure.axes] == list(figures.LOSSES)
    figure.canvas.draw()
