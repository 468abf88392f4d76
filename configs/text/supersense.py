"""Supersenses by a small student: 520 labels, and 78,000 glosses without any.

    distilljax train configs/text/supersense.py --workdir runs/text/supersense --seeds 0

The teacher is that of `configs/text/supersense_teacher.py`, which is trained first.

Two students: `kept`, two layers of MiniLM as it was published (which has seen no
supersense) under a fresh head; and `small`, 128 wide and fresh. Each on the same
number of updates, with the labels of 520 glosses alone; with the teacher's distribution
on the same 520; with the teacher's distribution on glosses that have no label; and, for
comparison, with every label.
"""

from dataclasses import replace
from pathlib import Path

from distilljax import data, optimizers, students
from distilljax.config import Config, load_module
from distilljax.models import EncoderConfig
from distilljax.objectives import CrossEntropy, LogitKD
from distilljax.workdir import TrainedRun

teacher = load_module(Path(__file__).with_name("supersense_teacher.py"))
NUM_LABELS = 520
STEPS = {"kept": 100, "small": 200}
PEAK = {"kept": 3e-4, "small": 1e-3}
STUDENTS = {
    "kept": students.WithHead(
        students.KeptLayers(students.Pretrained(teacher.MINILM), 2),
        teacher.NUM_CLASSES,
    ),
    "small": EncoderConfig(
        vocab_size=30_522,
        width=128,
        num_layers=2,
        num_heads=4,
        ffn_width=512,
        max_length=64,
        num_classes=teacher.NUM_CLASSES,
    ),
}


def config(seed: int = 0, student: str = "kept") -> Config:
    """The teacher's distribution on all glosses, none of them labelled."""
    steps = STEPS[student]
    return Config(
        name="text/supersense",
        description="The teacher's distribution on 78,000 glosses without labels.",
        expected="0.05 or more above the same student on 520 labels",
        baseline=f"{student}_labels",
        student=STUDENTS[student],
        teacher=TrainedRun("runs/text/supersense_teacher"),
        objective=LogitKD(temperature=2.0, ce_weight=0.0),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(PEAK[student], num_steps=steps)
        ),
        data=teacher.glosses("train"),
        test=teacher.glosses("validation"),
        loader=data.Loader(batch_size=32),
        steps=steps,
        select=None,
        eval_every_steps=steps,
        log_every_steps=50,
        checkpoint_every_steps=steps,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """For each student: few labels, the teacher on the same, on all, and all labels."""
    found = {}
    few = data.Few(teacher.glosses("train"), NUM_LABELS, seed=seed)
    for name in STUDENTS:
        transfer = config(seed, name)
        found |= {
            f"{name}_labels": replace(
                transfer,
                description="520 labels alone.",
                objective=CrossEntropy(),
                data=few,
                baseline=None,
            ),
            f"{name}_teacher": replace(
                transfer,
                description="The teacher's distribution on the same 520 glosses.",
                data=few,
            ),
            f"{name}_transfer": transfer,
            f"{name}_all_labels": replace(
                transfer,
                description="78,000 labels, and no teacher.",
                objective=CrossEntropy(),
            ),
        }
    return found
