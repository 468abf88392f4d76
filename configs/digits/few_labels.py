"""Few labels: 36 labelled digits, and a teacher that has seen 1,200.

    distilljax train configs/digits/few_labels.py --workdir runs/digits/few_labels \
        --seeds 0..4

The teacher is that of `configs/digits/teacher.py`, which is trained first.

Three students of the same architecture, initialisation, order of data and number of
steps: hard labels on the 36; the teacher's soft targets on the same 36; and the
teacher's soft targets on all 1,200 digits, without any label.
"""

from dataclasses import replace

from distilljax import data, models, objectives, optimizers
from distilljax.config import Config
from distilljax.workdir import TrainedRun

STEPS = 1_000
NUM_LABELS = 36


def config(seed: int = 0) -> Config:
    """The teacher's soft targets on the labelled examples."""
    train = data.Tfds("digits", "train")
    return Config(
        name="digits/few_labels",
        description="The teacher's distribution on the same 36 examples.",
        expected="0.03 or more above hard labels (a plain prototype: +0.035)",
        baseline="hard_labels",
        student=models.MLP(num_features=64, hidden=(64,), num_classes=10),
        teacher=TrainedRun("runs/digits/teacher"),
        objective=objectives.LogitKD(temperature=4.0),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=1e-2, num_steps=STEPS)
        ),
        data=data.Few(train, NUM_LABELS, seed=seed),
        validation=data.Tfds("digits", "validation"),
        test=data.Tfds("digits", "test"),
        loader=data.Loader(batch_size=32, scale=16.0),
        steps=STEPS,
        # 36 labels leave none to choose a checkpoint with: the last one is measured,
        # and validation only draws the learning curves.
        select=None,
        eval_every_steps=100,
        log_every_steps=250,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """The same budget with and without the teacher, and with unlabelled data."""
    distilled = config(seed)
    return {
        "hard_labels": replace(
            distilled,
            objective=objectives.CrossEntropy(),
            baseline=None,
            description="The 36 labels alone.",
        ),
        "soft_targets": distilled,
        "transfer_set": replace(
            distilled,
            data=data.Tfds("digits", "train"),
            description="The teacher's distribution on 1,200 unlabelled examples.",
        ),
    }
