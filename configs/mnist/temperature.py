"""Temperature by width: how soft may targets be for a narrow student?

    distilljax train configs/mnist/temperature.py --workdir runs/mnist/temperature \
        --seeds 0..5

Students of 10, 30 and 300 units in each of two layers, taught by one teacher (split 0)
at temperatures 1 to 20. Hinton, Vinyals and Dean 2015, section 3: with 30 units
temperatures of 2.5 to 4 are best, with 300 and more all above 8 are alike. A pilot
could show only that high temperatures hurt narrow students.
"""

from dataclasses import replace
from pathlib import Path

from distilljax import models, objectives
from distilljax.config import Config, load_module
from distilljax.workdir import TrainedRun

WIDTHS = (10, 30, 300)
TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 8.0, 20.0)
soft_targets = load_module(Path(__file__).with_name("soft_targets.py"))


def config(seed: int = 0, width: int = 30, temperature: float = 3.0) -> Config:
    """One width at one temperature; every seed is of split 0."""
    split = soft_targets.config(0)
    return replace(
        split,
        name=f"mnist/temperature_width_{width}",
        description=f"784-{width}-{width}-10, soft targets at {temperature:g}.",
        expected="more errors at temperatures 8 and 20 than at 3",
        baseline=f"w{width}_t3",
        student=models.MLP(num_features=784, hidden=(width, width), num_classes=10),
        teacher=TrainedRun("runs/mnist/teacher/default/seed_0"),
        objective=objectives.LogitKD(temperature=temperature),
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """Every width with hard labels and at every temperature."""
    found = {}
    for width in WIDTHS:
        found[f"w{width}_hard"] = replace(
            config(seed, width),
            objective=objectives.CrossEntropy(),
            description=f"784-{width}-{width}-10, the labels alone.",
        )
        for temperature in TEMPERATURES:
            arm = config(seed, width, temperature)
            if temperature == 3.0:
                arm = replace(arm, baseline=None)
            found[f"w{width}_t{temperature:g}"] = arm
    return found
