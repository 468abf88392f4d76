"""The missing class of Fashion-MNIST, 3, dress: as configs/mnist/missing_class.py.

    distilljax train configs/fashion_mnist/missing_class.py \
        --workdir runs/fashion_mnist/missing_class --seeds 0..8
"""

from pathlib import Path

from distilljax.config import Config, load_module

mnist = load_module(Path(__file__).parents[1] / "mnist" / "missing_class.py")


def config(seed: int = 0) -> Config:
    """The config of MNIST with the other data."""
    return mnist.config(seed, "fashion_mnist")


def arms(seed: int = 0) -> dict[str, Config]:
    """The arms of MNIST with the other data."""
    return mnist.arms(seed, "fashion_mnist")
