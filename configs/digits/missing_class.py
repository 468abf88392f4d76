"""The missing class: students that never see a 3.

    distilljax train configs/digits/missing_class.py \
        --workdir runs/digits/missing_class --seeds 0..4

The teacher is that of `configs/digits/teacher.py`, which is trained first.

Both arms train on the same images, none of them a 3. The labels cannot say what a 3 is;
the teacher's distribution can, by how much it finds other digits like one (Hinton,
Vinyals and Dean 2015, section 3).
"""

from dataclasses import replace
from pathlib import Path

from distilljax import data, objectives
from distilljax.config import Config, load_module

MISSING = 3
few_labels = load_module(Path(__file__).with_name("few_labels.py"))


def config(seed: int = 0) -> Config:
    """The teacher's distribution at a high temperature."""
    return replace(
        few_labels.config(seed),
        name="digits/missing_class",
        description="The teacher's distribution; not a single 3.",
        expected="recall of 3s above 0.8, against 0 (a plain prototype: 0.88)",
        objective=objectives.LogitKD(temperature=8.0),
        data=data.WithoutClasses(data.Tfds("digits", "train"), (MISSING,)),
        loader=data.Loader(batch_size=128, scale=16.0),
        focus_classes=(MISSING,),
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """The same images, with their labels and with the teacher."""
    distilled = config(seed)
    return {
        "hard_labels": replace(
            distilled,
            objective=objectives.CrossEntropy(),
            baseline=None,
            description="The labels alone; not a single 3.",
        ),
        "distilled": distilled,
    }
