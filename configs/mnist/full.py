"""The full protocol: 60,000 training and 10,000 test images, once.

    distilljax train configs/mnist/full.py --workdir runs/mnist/full --seeds 0..0

Hinton, Vinyals and Dean 2015, section 3: 146 errors with hard labels, 74 with soft
targets at temperature 20, teacher 67.
"""

from dataclasses import replace
from pathlib import Path

from distilljax import data, objectives, optimizers
from distilljax.config import Config, load_module
from distilljax.workdir import TrainedRun

STEPS = 12_000  # 40 epochs of 200
soft_targets = load_module(Path(__file__).with_name("soft_targets.py"))


def config(seed: int = 0) -> Config:
    """Soft targets at temperature 20, without labels."""
    return replace(
        soft_targets.config(seed),
        name="mnist/full",
        description="The teacher's distribution at temperature 20, no labels.",
        expected="fewer errors than hard labels (the paper: 146 to 74)",
        teacher=TrainedRun("runs/mnist/full_teacher"),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=1e-3, num_steps=STEPS)
        ),
        data=data.Idx("assets", "mnist", "train"),
        validation=None,
        loader=data.Loader(batch_size=200, scale=255.0),
        steps=STEPS,
        log_every_steps=1_000,
        checkpoint_every_steps=STEPS,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """The same student with the labels, and with the teacher."""
    soft = config(seed)
    return {
        "hard_labels": replace(
            soft,
            objective=objectives.CrossEntropy(),
            baseline=None,
            description="The labels alone.",
        ),
        "soft_t20": soft,
    }
