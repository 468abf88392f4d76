"""The teachers of the Fashion-MNIST proofs; the experiment of configs/mnist/teacher.py.

    distilljax train configs/fashion_mnist/teacher.py \
        --workdir runs/fashion_mnist/teacher --seeds 0..2
"""

from pathlib import Path

from distilljax.config import Config, load_module

mnist = load_module(Path(__file__).parents[1] / "mnist" / "teacher.py")


def config(seed: int = 0) -> Config:
    """The config of MNIST with the other data."""
    return mnist.config(seed, "fashion_mnist")
