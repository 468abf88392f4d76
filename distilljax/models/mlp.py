"""A multilayer perceptron over flattened examples."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distilljax._checks import check_below, check_count, check_widths, fail


@dataclass(frozen=True)
class MLP:
    """How to build a `MLPModule`: call it with random streams.

    Example:
      >>> model = MLP(num_features=64, hidden=(32,), num_classes=10)(nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)
    """

    num_features: int
    """Values per example, flattened."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    num_classes: int
    """Width of the output."""
    input_dropout: float = 0.0
    """Probability of dropping an input value in training."""
    dropout: float = 0.0
    """Probability of dropping a hidden value in training."""

    def __post_init__(self):
        check_count("MLP", "num_features", self.num_features)
        check_widths("MLP", "hidden", self.hidden)
        check_count("MLP", "num_classes", self.num_classes)
        check_below("MLP", "input_dropout", self.input_dropout, 0, 1)
        check_below("MLP", "dropout", self.dropout, 0, 1)

    def __call__(self, rngs: nnx.Rngs) -> MLPModule:
        """The module with fresh parameters."""
        return MLPModule(self, rngs)


class MLPModule(nnx.Module):
    """Linear layers with ReLU and dropout between them."""

    def __init__(self, spec: MLP, rngs: nnx.Rngs):
        self.num_features = spec.num_features
        widths = (spec.num_features, *spec.hidden, spec.num_classes)
        self.layers = nnx.List(
            nnx.Linear(a, b, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
            for a, b in pairwise(widths)
        )
        rates = (spec.input_dropout, *[spec.dropout] * len(spec.hidden))
        # no module where nothing is dropped: it would carry a random stream
        self.dropouts = nnx.List(
            nnx.Dropout(rate, rngs=rngs) if rate else None for rate in rates
        )

    def __call__(
        self, x: Float[Array, "batch *example"]
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch of examples, which are flattened first."""
        shape, x = x.shape[1:], jnp.reshape(x, (x.shape[0], -1))
        if x.shape[1] != self.num_features:
            fail(
                "MLP",
                "num_features",
                f"be {x.shape[1]}, the values of an example of shape {shape}",
                self.num_features,
                "Change it, or what the loader makes of the examples.",
            )
        for i, (layer, dropout) in enumerate(
            zip(self.layers, self.dropouts, strict=True)
        ):
            x = nnx.relu(x) if i else x
            x = dropout(x) if dropout is not None else x
            x = layer(x)
        return x
