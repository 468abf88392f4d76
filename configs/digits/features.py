"""Hidden features: does a hint from the teacher's hidden layer help?

    distilljax train configs/digits/features.py --workdir runs/digits/features \
        --seeds 0..4

The teacher is that of `configs/digits/teacher.py`, which is trained first.

Four students of the same architecture, initialisation, order of data and number of
steps, all on the same 36 labelled digits: the labels alone; the teacher's soft targets;
its second hidden layer through a learned projection beside the labels; and both of the
teacher's signals, where the weight of the hint fades away over the run.
"""

from dataclasses import replace

from distilljax import data, models, objectives, optimizers, students
from distilljax.config import Config
from distilljax.workdir import TrainedRun

STEPS = 1_000
NUM_LABELS = 36
TEMPERATURE = 4.0

# The student has one hidden layer and the teacher two: its first linear layer learns
# from the second of the teacher, both before the ReLU.
HINT = objectives.FeatureKD(
    layers={"layers/0": "layers/1"},
    projection=students.Projection(student_width=64, teacher_width=512),
)


def config(seed: int = 0) -> Config:
    """Soft targets, and a hint whose weight falls to 0 in the first half."""
    return Config(
        name="digits/features",
        description="Soft targets, and a hidden layer of the teacher at first.",
        expected="about soft targets alone: the teacher's logits say most of it",
        baseline="soft_targets",
        student=models.MLP(num_features=64, hidden=(64,), num_classes=10),
        teacher=TrainedRun("runs/digits/teacher"),
        objective=objectives.Sum(
            {
                "logits": objectives.LogitKD(temperature=TEMPERATURE),
                "hint": replace(HINT, weight=optimizers.Linear(1.0, 0.0, STEPS // 2)),
            }
        ),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=1e-2, num_steps=STEPS)
        ),
        data=data.Few(data.Tfds("digits", "train"), NUM_LABELS, seed=seed),
        validation=data.Tfds("digits", "validation"),
        test=data.Tfds("digits", "test"),
        loader=data.Loader(batch_size=32, scale=16.0),
        steps=STEPS,
        select=None,  # as in few_labels.py: 36 labels leave none to choose with
        eval_every_steps=250,
        log_every_steps=250,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """The same budget with no teacher, with its logits, its features, and with both."""
    both = config(seed)
    return {
        "hard_labels": replace(
            both,
            objective=objectives.CrossEntropy(),
            baseline=None,
            description="The 36 labels alone.",
        ),
        "soft_targets": replace(
            both,
            objective=objectives.LogitKD(temperature=TEMPERATURE),
            baseline="hard_labels",
            description="The teacher's distribution.",
        ),
        "hint": replace(
            both,
            objective=objectives.Sum(
                {"labels": objectives.CrossEntropy(), "hint": HINT}
            ),
            baseline="hard_labels",
            description="The labels, and the teacher's second hidden layer.",
        ),
        "soft_targets_and_hint": both,
    }
