"""A small convolutional network: blocks of convolution, BatchNorm, ReLU and pooling."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distilljax._checks import check_below, check_count, check_widths, fail


@dataclass(frozen=True)
class ConvNet:
    """How to build a `ConvNetModule`: call it with random streams.

    Example:
      >>> model = ConvNet(channels=(8, 16), num_classes=10)(nnx.Rngs(0))
      >>> model(jnp.zeros((2, 28, 28, 1))).shape
      (2, 10)
    """

    num_classes: int
    """Width of the output."""
    channels: tuple[int, ...] = (32, 64)
    """Channels of each block; each halves height and width."""
    in_channels: int = 1
    """Channels of the images."""
    dropout: float = 0.0
    """Probability of dropping a pooled feature in training."""

    def __post_init__(self):
        check_count("ConvNet", "num_classes", self.num_classes)
        check_widths("ConvNet", "channels", self.channels)
        check_count("ConvNet", "in_channels", self.in_channels)
        check_below("ConvNet", "dropout", self.dropout, 0, 1)

    def __call__(self, rngs: nnx.Rngs) -> ConvNetModule:
        """The module with fresh parameters."""
        return ConvNetModule(self, rngs)


class ConvNetModule(nnx.Module):
    """Blocks, an average over the image, and a linear layer."""

    def __init__(self, spec: ConvNet, rngs: nnx.Rngs):
        self.in_channels = spec.in_channels
        widths = (spec.in_channels, *spec.channels)
        self.convs = nnx.List(
            nnx.Conv(
                a,
                b,
                (3, 3),
                use_bias=False,
                kernel_init=nnx.initializers.he_normal(),
                rngs=rngs,
            )
            for a, b in pairwise(widths)
        )
        self.norms = nnx.List(
            nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in spec.channels
        )
        self.dropout = nnx.Dropout(spec.dropout, rngs=rngs) if spec.dropout else None
        self.head = nnx.Linear(widths[-1], spec.num_classes, rngs=rngs)

    def __call__(
        self, x_bhwc: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch of images."""
        self._check(x_bhwc.shape[1:])
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_bhwc = conv(x_bhwc)
            # float32 statistics make BatchNorm's output float32: go back, or all that
            # follows would be computed in float32 too
            x_bhwc = nnx.relu(norm(x_bhwc).astype(x_bhwc.dtype))
            x_bhwc = nnx.max_pool(x_bhwc, (2, 2), strides=(2, 2))
        x_bc = jnp.mean(x_bhwc, axis=(1, 2))
        x_bc = self.dropout(x_bc) if self.dropout is not None else x_bc
        return self.head(x_bc)

    def _check(self, shape: tuple[int, ...]) -> None:
        least = 2 ** len(self.convs)
        if len(shape) != 3 or min(shape[:2]) < least:
            fail(
                "ConvNet",
                "an example",
                f"be [height, width, channels], at least {least} high and wide",
                f"the shape {shape}",
                "Each block halves it: make fewer, or leave out flatten of the loader.",
            )
        if shape[2] != self.in_channels:
            fail(
                "ConvNet",
                "in_channels",
                f"be {shape[2]}, the channels of an example of shape {shape}",
                self.in_channels,
                "Change it, or what the loader makes of the examples.",
            )
