"""The missing class: a transfer set without a single 3.

    distilljax train configs/mnist/missing_class.py \
        --workdir runs/mnist/missing_class --seeds 0..8

The student never sees a 3, labelled or not, and learns what a 3 is from how much the
teacher finds other digits like one. Seed s is of split s // 3. Reference: Hinton,
Vinyals and Dean 2015, section 3: 877 of 1,010 test 3s right, 996 after one bias was
moved.
Expected here: at temperature 20 over 70 % of the 3s, over 85 % after bias calibration
(`python benchmarks/proofs.py`), and none with hard labels.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from distilljax import data, objectives
from distilljax.config import Config, load_module
from distilljax.workdir import TrainedRun

Dataset = Literal["mnist", "fashion_mnist"]
MISSING = 3
SEEDS_PER_SPLIT = 3
soft_targets = load_module(Path(__file__).with_name("soft_targets.py"))


def config(seed: int = 0, dataset: Dataset = "mnist") -> Config:
    """The teacher at temperature 20 on images of the other nine classes."""
    split = seed // SEEDS_PER_SPLIT
    labelled = soft_targets.teacher.labelled(split, dataset)
    return replace(
        soft_targets.config(seed, dataset),
        name=f"{dataset}/missing_class",
        description="The teacher at temperature 20; no example of the missing class.",
        expected="recall of the missing class over 0.7, without a single example",
        teacher=TrainedRun(f"runs/{dataset}/teacher/default/seed_{split}"),
        data=data.WithoutClasses(labelled, (MISSING,)),
        validation=soft_targets.teacher.held_out(split, dataset),
        focus_classes=(MISSING,),
    )


def arms(seed: int = 0, dataset: Dataset = "mnist") -> dict[str, Config]:
    """Hard labels and the teacher, on the same images."""
    soft = config(seed, dataset)
    return {
        "hard_labels": replace(
            soft,
            objective=objectives.CrossEntropy(),
            baseline=None,
            description="The labels alone; no example of the missing class.",
        ),
        "soft_t20": soft,
    }
