"""A good teacher is patient and consistent: the same view, for a long time.

    distilljax train configs/mnist/patient_teacher.py \
        --workdir runs/mnist/patient_teacher --seeds 0..5

Only 1,000 images, shifted by up to three pixels. Arms differ in what the teacher sees:
the student's own view (consistent), a view of its own (independent), the image as it is
(fixed target); against no augmentation, and against labels with it. Reference: Beyer et
al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022,
arXiv 2106.05237, figure 3. Expected, after 300 epochs: consistent < fixed target <
independent < labels < no augmentation, in errors.
"""

from dataclasses import replace
from pathlib import Path

from distilljax import data, models, objectives, optimizers
from distilljax.config import Config, load_module

LONG, SHORT = 3_000, 300  # 300 and 30 epochs of 1,000 images
soft_targets = load_module(Path(__file__).with_name("soft_targets.py"))


def config(seed: int = 0, steps: int = LONG) -> Config:
    """Consistent views; every seed is of split 0."""
    split = soft_targets.config(0)
    few = data.Stratified(soft_targets.teacher.labelled(0), 1_000, seed=0)
    shift = data.RandomShift(3)
    return replace(
        split,
        name=f"mnist/patient_teacher_{steps}_steps",
        description="Teacher and student see the same shifted image.",
        expected="the fewest errors of all arms, at 3,000 steps",
        baseline="hard_labels",
        student=models.MLP(num_features=784, hidden=(256, 256), num_classes=10),
        objective=objectives.LogitKD(temperature=4.0),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=2e-3, num_steps=steps)
        ),
        data=few,
        loader=data.Loader(batch_size=100, scale=255.0, augment=shift),
        steps=steps,
        eval_every_steps=steps // 5,
        log_every_steps=steps // 10,
        checkpoint_every_steps=steps,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """What the teacher sees, for a long and for a short time."""
    found = {}
    for steps, suffix in ((LONG, ""), (SHORT, "_short")):
        same = config(seed, steps)
        same = replace(same, baseline=f"hard_labels{suffix}")
        loader = same.loader
        found |= {
            f"hard_labels{suffix}": replace(
                same,
                objective=objectives.CrossEntropy(),
                baseline=None,
                description="The labels, with shifted images.",
            ),
            f"hard_labels_plain{suffix}": replace(
                same,
                objective=objectives.CrossEntropy(),
                loader=replace(loader, augment=None),
                baseline=None,
                description="The labels, with the images as they are.",
            ),
            f"no_augmentation{suffix}": replace(
                same,
                baseline=f"hard_labels_plain{suffix}",
                loader=replace(loader, augment=None),
                description="Teacher and student see the image as it is.",
            ),
            f"fixed_target{suffix}": replace(
                same,
                loader=replace(loader, teacher_view="clean"),
                description="The student sees a shifted image, the teacher does not.",
            ),
            f"independent{suffix}": replace(
                same,
                loader=replace(loader, teacher_view="independent"),
                description="Teacher and student see shifts of their own.",
            ),
            f"consistent{suffix}": same,
        }
    return found
