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


@pytest.fixture(scope="module")
def circles():
    return {n: figures.rays(figures.LOSSES[n], 33) for n in figures.OF_DIRECTIONS}


@pytest.mark.parametrize("name", figures.LOSSES)
def test_each_map_is_lowest_at_the_star_or_on_its_ray(name, surfaces):
    found = surfaces[name]
    at = np.unravel_index(np.argmin(found["values"]), found["values"].shape)
    lowest = np.array([found["x"][at], found["y"][at]])
    star, step = figures.CLOUD[-1], found["x"][0, 1] - found["x"][0, 0]
    if name in figures.OF_DIRECTIONS:  # a valley from the origin
        cosine = lowest @ star / np.linalg.norm(lowest) / np.linalg.norm(star)
        assert cosine > 0.99
    else:
        assert np.all(np.abs(lowest - star) <= step)


def test_only_losses_of_directions_are_the_same_along_a_ray(circles):
    for found in circles.values():
        near, far = found["values"]
        np.testing.assert_allclose(near, far, rtol=1e-3, atol=1e-5)
    near, far = figures.rays(figures.LOSSES["rkd_distance"], 33)["values"]
    assert not np.allclose(near, far, rtol=0.1)


def test_six_maps_are_drawn_with_one_scale(surfaces, circles):
    figure = figures.draw(surfaces, circles)
    *maps, bar = figure.axes
    assert [axis.get_title(loc="left") for axis in maps] == list(figures.LOSSES)
    for axis in maps:
        unit = np.median(surfaces[axis.get_title(loc="left")]["values"])
        assert float(axis.get_title(loc="right")) == pytest.approx(unit, rel=0.06)
    labels = [label.get_text() for label in bar.get_xticklabels()]
    assert labels == ["0", "0.1", "0.25", "0.5", "1", "2"]
    figure.canvas.draw()


def test_dist_forgives_a_student_of_another_scale():
    found = figures.sharpness()
    as_sure = np.argmin(np.abs(figures.SCALES - 1))
    for values in found.values():
        assert values[as_sure] == pytest.approx(0, abs=1e-5)
    others = np.abs(np.log(figures.SCALES)) > 0.5
    assert np.all(found["dist"][others] < 0.3 * found["forward_kl"][others])


def test_only_margin_mse_pulls_a_margin_back():
    found = figures.pull()
    too_large = figures.MARGINS > figures.TEACHER_MARGIN + 1
    line = 1 - figures.MARGINS / figures.TEACHER_MARGIN
    np.testing.assert_allclose(found["margin_mse"], line, atol=1e-5)
    assert np.all(np.abs(found["forward_kl"][too_large]) < 0.05)
    np.testing.assert_array_equal(found["hinge_ranking"][figures.MARGINS > 1.01], 0)
    figures.draw_others(figures.sharpness(), found).canvas.draw()
