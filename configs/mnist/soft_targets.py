"""Soft targets: Hinton's students, 784-800-800-10 without any regularisation.

    distilljax train configs/mnist/soft_targets.py --workdir runs/mnist/soft_targets \
        --seeds 0..8

Three splits with three seeds each: seed s is of split s // 3. Arms differ in the
objective alone. Reference: Hinton, Vinyals and Dean 2015, section 3: 146 errors of
10,000 with hard labels, 74 with soft targets, teacher 67, on 60,000 images.
Expected here, on 5,000 images: a third fewer errors (a pilot: 239 to 152 of 5,000).
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from distilljax import data, models, objectives, optimizers
from distilljax.config import Config, load_module
from distilljax.workdir import TrainedRun

Dataset = Literal["mnist", "fashion_mnist"]
STEPS = 2_000  # 40 epochs
SEEDS_PER_SPLIT = 3
teacher = load_module(Path(__file__).with_name("teacher.py"))


def config(seed: int = 0, dataset: Dataset = "mnist") -> Config:
    """Soft targets alone at temperature 20."""
    split = seed // SEEDS_PER_SPLIT
    return Config(
        name=f"{dataset}/soft_targets",
        description="The teacher's distribution at temperature 20, no labels.",
        expected="at most 0.8 of the errors with hard labels, in every pair",
        baseline="hard_labels",
        student=models.MLP(num_features=784, hidden=(800, 800), num_classes=10),
        teacher=TrainedRun(f"runs/{dataset}/teacher/default/seed_{split}"),
        objective=objectives.LogitKD(temperature=20.0),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=1e-3, num_steps=STEPS)
        ),
        data=teacher.labelled(split, dataset),
        validation=teacher.held_out(split, dataset),
        test=data.Idx("assets", dataset, "test"),
        loader=data.Loader(batch_size=100, scale=255.0),
        steps=STEPS,
        select=None,
        eval_every_steps=500,
        log_every_steps=250,
        checkpoint_every_steps=STEPS,
        eval_batch_size=1_000,
        seed=seed,
    )


def arms(seed: int = 0, dataset: Dataset = "mnist") -> dict[str, Config]:
    """Hard labels; labels and the teacher; the teacher alone."""
    soft = config(seed, dataset)
    return {
        "hard_labels": replace(
            soft,
            objective=objectives.CrossEntropy(),
            baseline=None,
            description="The labels alone.",
        ),
        "kd_t4": replace(
            soft,
            objective=objectives.LogitKD(temperature=4.0, ce_weight=0.1),
            description="0.1 cross-entropy and the teacher at temperature 4.",
        ),
        "soft_t20": soft,
    }
