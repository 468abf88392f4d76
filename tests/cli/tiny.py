"""A config that trains in a second: three clouds of points, a small student."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from flax import nnx

from distilljax import data, models, objectives, optimizers
from distilljax.config import Config


@dataclass(frozen=True)
class Clouds:
    """Points around three centres."""

    num_examples: int
    """How many points."""
    seed: int = 0
    """Of the points; the centres are always the same."""

    def __call__(self) -> data.Arrays:
        rng = np.random.default_rng(self.seed)
        labels = np.arange(self.num_examples) % 3
        noise = rng.normal(size=(self.num_examples, 8)).astype(np.float32)
        return data.Arrays(
            noise + 4 * np.eye(3, 8, dtype=np.float32)[labels], labels, 3
        )


@dataclass(frozen=True)
class Untrained:
    """A teacher that has learnt nothing: it costs no training."""

    width: int = 12
    """Of its hidden layer."""
    num_classes: int = 3
    """Of its output."""

    def __call__(self, mesh=None, rules=()) -> nnx.Module:
        del mesh, rules
        return models.MLP(8, (self.width,), self.num_classes)(nnx.Rngs(7))


def config(seed: int = 0) -> Config:
    return Config(
        name="tiny",
        description="Labels and an untrained teacher.",
        student=models.MLP(num_features=8, hidden=(16,), num_classes=3, dropout=0.2),
        teacher=Untrained(),
        objective=objectives.LogitKD(temperature=2.0, kd_weight=0.1, ce_weight=1.0),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=5e-2, num_steps=20)
        ),
        data=Clouds(48),
        validation=Clouds(40, seed=1),
        test=Clouds(40, seed=2),
        loader=data.Loader(batch_size=16),
        steps=20,
        log_every_steps=1,
        eval_every_steps=10,
        eval_batch_size=16,
        checkpoint_every_steps=5,
        baseline="hard_labels",
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    return {
        "hard_labels": replace(
            config(seed), objective=objectives.CrossEntropy(), baseline=None
        ),
        "distilled": config(seed),
    }
