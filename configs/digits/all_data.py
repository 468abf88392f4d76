"""All data: a negative control, reported as it comes out.

    distilljax train configs/digits/all_data.py --workdir runs/digits/all_data \
        --seeds 0..4

The teacher is that of `configs/digits/teacher.py`, which is trained first.

Where every example is labelled and the student is wide enough, there is little that a
teacher could add.
"""

from dataclasses import replace
from pathlib import Path

from distilljax import data, objectives
from distilljax.config import Config, load_module

few_labels = load_module(Path(__file__).with_name("few_labels.py"))


def config(seed: int = 0) -> Config:
    """Labels and the teacher's distribution."""
    return replace(
        few_labels.config(seed),
        name="digits/all_data",
        description="All 1,200 labels, and the teacher's distribution.",
        expected="no claim: this is the control",
        objective=objectives.LogitKD(temperature=4.0, ce_weight=0.1),
        data=data.Tfds("digits", "train"),
        loader=data.Loader(batch_size=128, scale=16.0),
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """With and without the teacher."""
    distilled = config(seed)
    return {
        "hard_labels": replace(
            distilled,
            objective=objectives.CrossEntropy(),
            baseline=None,
            description="All 1,200 labels alone.",
        ),
        "distilled": distilled,
    }
