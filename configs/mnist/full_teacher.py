"""The teacher of the full protocol: 784-1200-1200-10 on all 60,000 images.

    distilljax train configs/mnist/full_teacher.py --workdir runs/mnist/full_teacher

Expected: at most 90 errors of 10,000 test images (Hinton, Vinyals and Dean 2015: 67).
"""

from dataclasses import replace
from pathlib import Path

from distilljax import data, optimizers
from distilljax.config import Config, load_module

STEPS = 18_000  # 60 epochs of 200
teacher = load_module(Path(__file__).with_name("teacher.py"))


def config(seed: int = 0) -> Config:
    """All labels; selected by nothing, the last step counts."""
    return replace(
        teacher.config(seed),
        name="mnist/full_teacher",
        description="784-1200-1200-10 with dropout and jitter, on 60,000 labels.",
        expected="at most 90 errors of 10,000",
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=1e-3, num_steps=STEPS)
        ),
        data=data.Idx("assets", "mnist", "train"),
        validation=None,
        loader=data.Loader(batch_size=200, scale=255.0, augment=data.RandomShift(2)),
        steps=STEPS,
        log_every_steps=1_000,
    )
