"""Objectives with parameters or state of their own, as arms that train in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distilljax import models, objectives, optimizers, students
from distilljax.config import Config, load_module

tiny = load_module(Path(__file__).with_name("tiny.py"))

LABELS = objectives.CrossEntropy()
HINT = objectives.FeatureKD(
    {"layers/0": "layers/0"}, projection=students.Projection(32, 12)
)
CROWD = objectives.ContrastiveKD(
    "layers/0", "layers/0", 32, 12, width=8, queue_size=128
)


def config(seed: int = 0) -> Config:
    """A projection."""
    return replace(
        tiny.config(seed),
        name="owning",
        student=models.MLP(num_features=8, hidden=(32,), num_classes=3),
        objective=objectives.Sum({"labels": LABELS, "hint": HINT}),
        optimizer=optimizers.AdamW(learning_rate=1e-2),
        data=tiny.Clouds(96),
        validation=None,
        test=None,
        baseline=None,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """A projection, and a queue."""
    crowd = objectives.Sum({"labels": LABELS, "crowd": CROWD})
    return {
        "projection": config(seed),
        "queue": replace(config(seed), objective=crowd),
    }
