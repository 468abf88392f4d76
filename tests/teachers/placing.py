"""A config with placed teachers, and its arms, for the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distilljax import objectives
from distilljax.config import Config, load_module
from distilljax.teachers import Placed

tiny = load_module(Path(__file__).parents[1] / "cli" / "tiny.py")


def config(seed: int = 0) -> Config:
    """As tiny, with a teacher that can be placed."""
    teacher = Placed(tiny.Untrained(), "tensor=4")
    return replace(tiny.config(seed), name="placing", teacher=teacher)


def arms(seed: int = 0) -> dict[str, Config]:
    """With a teacher that is not used, one, and two."""
    one = config(seed)
    two = {
        "a": Placed(tiny.Untrained(), "tensor=2"),
        "b": Placed(tiny.Untrained(width=8), "data=2"),
    }
    labels = objectives.CrossEntropy()
    mean = objectives.MultiTeacher(one.objective)
    return {
        "hard_labels": replace(one, objective=labels, baseline=None),
        "one": one,
        "two": replace(one, teacher=two, objective=mean),
    }
