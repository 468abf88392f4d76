"""The teachers of the MNIST proofs: 784-1200-1200-10, one for each split.

    scripts/fetch_assets.sh assets
    distilljax train configs/mnist/teacher.py --workdir runs/mnist/teacher --seeds 0..2

A split is 5,000 labelled images drawn from the 60,000, by class; the seed says which.
Dropout and a jitter of two pixels, as in Hinton, Vinyals and Dean 2015, section 3.
Expected: about 98 % of the 10,000 test images; two minutes each on two cores.
"""

from typing import Literal

from distilljax import data, models, objectives, optimizers
from distilljax.config import Config

Dataset = Literal["mnist", "fashion_mnist"]
STEPS = 5_000  # 100 epochs


def labelled(split: int, dataset: Dataset = "mnist") -> data.Stratified:
    """The 5,000 training images of a split."""
    return data.Stratified(data.Idx("assets", dataset, "train"), 5_000, seed=split)


def held_out(split: int, dataset: Dataset = "mnist") -> data.Stratified:
    """1,000 of the other training images, for learning curves."""
    train = data.Idx("assets", dataset, "train")
    others = data.Stratified(train, 5_000, seed=split, complement=True)
    return data.Stratified(others, 1_000, seed=split)


def config(seed: int = 0, dataset: Dataset = "mnist") -> Config:
    """The teacher of split `seed`."""
    return Config(
        name=f"{dataset}/teacher",
        description="784-1200-1200-10 with dropout and jitter, on 5,000 labels.",
        expected="about 2 % errors (a pilot: 107 of 5,000)",
        student=models.MLP(
            num_features=784,
            hidden=(1200, 1200),
            num_classes=10,
            input_dropout=0.2,
            dropout=0.5,
        ),
        objective=objectives.CrossEntropy(),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=1e-3, num_steps=STEPS)
        ),
        data=labelled(seed, dataset),
        validation=held_out(seed, dataset),
        test=data.Idx("assets", dataset, "test"),
        loader=data.Loader(batch_size=100, scale=255.0, augment=data.RandomShift(2)),
        steps=STEPS,
        select=None,
        eval_every_steps=1_000,
        log_every_steps=500,
        checkpoint_every_steps=STEPS,
        eval_batch_size=1_000,
        seed=seed,
    )
