"""The figure of the fused loss: where its numbers come from."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
figures = importlib.import_module("figures_fused")
loss = importlib.import_module("loss")


@pytest.fixture(scope="module")
def plan():
    return json.loads(figures.PLAN.read_text())["plan"]


def test_the_plain_loss_grows_with_positions_and_the_fused_one_does_not(monkeypatch):
    small = {"tokens": 0, "classes": 2000, "width": 32, "teacher_width": 64}
    monkeypatch.setattr(loss, "LARGE", small)
    found = figures.compiled_here((2048, 8192))
    assert found["plain"][8192] > 3 * found["plain"][2048]
    assert found["fused"][8192] < 1.5 * found["fused"][2048]
    assert found["fused"][8192] < 0.2 * found["plain"][8192]


def test_a_program_that_does_not_fit_says_its_size(plan):
    message = "the memory required for HLO temporaries (36.23G) exceeds available HBM"
    assert figures.bytes_of(message) == 36.23 * 2**30
    found = figures.planned(plan, "bfloat16")
    assert found["plain"][32768] > figures.CHIP_BYTES > found["fused"][32768]
    assert found["plain"].keys() == found["fused"].keys() == {1024, 4096, 32768}


def test_both_panels_have_both_losses(plan):
    here = {"plain": {128: 2e8, 512: 1e9}, "fused": {128: 2e8, 512: 4e8}}
    figure = figures.draw(here, plan)
    figure.canvas.draw()
    for axis in figure.axes:
        assert {"plain", "fused"} <= {text.get_text() for text in axis.texts}
