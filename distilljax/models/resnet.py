"""ResNet v1: 18, 34, 50, 101 for large images, and 6 n + 2 for small ones.

    x = stem(images)
    x = relu(x + convolutions(x))       for each block; of another width: shortcut(x)
    logits = head(mean of x over the image)

Suffixes of names are axes: b batch, h height, w width, c channels.

Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv
1512.03385, table 1 and section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distilljax._checks import check_count, check_widths, fail


@dataclass(frozen=True)
class ResNetConfig:
    """How to build a `ResNet`: call it with random streams.

    The defaults are ResNet-50 for 1,000 classes. Others are

        18     depths=(2, 2, 2, 2), widths=(64, 128, 256, 512), bottleneck=False
        34     depths=(3, 4, 6, 3), and the rest as in 18
        101    depths=(3, 4, 23, 3)
        6 n + 2, for 32x32:  depths=(n, n, n), widths=(16, 32, 64), bottleneck=False,
               stem_width=16, small_images=True

    A block that changes the width has a convolution of 1x1 as its shortcut, for small
    images too (option B of the paper, as in published distillation; its own small
    networks pad with zeros, and have 1 % fewer parameters).

    Example:
      >>> import jax
      >>> resnet20 = ResNetConfig(num_classes=10, depths=(3, 3, 3), widths=(16, 32, 64),
      ...                         bottleneck=False, stem_width=16, small_images=True)
      >>> model = nnx.eval_shape(lambda: resnet20(nnx.Rngs(0)))
      >>> sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
      272474
    """

    num_classes: int = 1000
    """Width of the output."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage; all stages but the first halve height and width."""
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Channels that the blocks of each stage return."""
    bottleneck: bool = True
    """Whether blocks are 1x1, 3x3, 1x1 with a quarter of the channels inside, or two
    convolutions of 3x3."""
    stem_width: int = 64
    """Channels before the first block."""
    small_images: bool = False
    """Whether the stem is a convolution of 3x3 at full size (32x32); else one of 7x7
    and a pooling, which leave a quarter of height and width (224x224)."""
    stride_first: bool = False
    """Whether a bottleneck halves the image in its first convolution, as in the paper;
    else in the one of 3x3, which is more accurate ("v1.5", torchvision)."""
    in_channels: int = 3
    """Channels of the images."""

    def __post_init__(self):
        name = "ResNetConfig"
        check_widths(name, "depths", self.depths)
        check_widths(name, "widths", self.widths)
        for field in ("num_classes", "stem_width", "in_channels"):
            check_count(name, field, getattr(self, field))
        if not self.depths or len(self.depths) != len(self.widths):
            rule = f"be of one length with depths, {self.depths}"
            fail(name, "widths", rule, self.widths, "Each stage has one of both.")
        if self.bottleneck and any(width % 4 for width in self.widths):
            rule = "be multiples of 4"
            why = "A bottleneck has a quarter of the channels inside."
            fail(name, "widths", rule, self.widths, why)

    def __call__(self, rngs: nnx.Rngs) -> ResNet:
        """The module with fresh parameters."""
        return ResNet(self, rngs)


class ResNet(nnx.Module):
    """Stem, stages of blocks, mean over the image and a linear head.

    Features by path: `stages/0`, ... and `stages/0/blocks/1`, ..., as [batch, height,
    width, channels]. In inference mode BatchNorm uses its running averages.

    Example:
      >>> config = ResNetConfig(num_classes=5, depths=(1, 2), widths=(8, 16),
      ...                       bottleneck=False, stem_width=8)
      >>> model = ResNet(config, nnx.Rngs(0))
      >>> model(jnp.zeros((2, 32, 32, 3))).shape
      (2, 5)
    """

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs):
        self.config = config
        kernel, stride = (3, 1) if config.small_images else (7, 2)
        channels = (config.in_channels, config.stem_width)
        self.stem = ConvNorm(*channels, kernel, stride, rngs)
        sizes = pairwise((config.stem_width, *config.widths))
        self.stages = nnx.List(
            Stage(config, *size, depth, 1 if i == 0 else 2, rngs)
            for i, (size, depth) in enumerate(zip(sizes, config.depths, strict=True))
        )
        self.head = nnx.Linear(config.widths[-1], config.num_classes, rngs=rngs)

    def __call__(
        self, x_bhwc: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch of images of any size."""
        self._check(x_bhwc.shape[1:])
        x_bhwc = nnx.relu(self.stem(x_bhwc))
        if not self.config.small_images:
            x_bhwc = nnx.max_pool(x_bhwc, (3, 3), strides=(2, 2), padding=_around(3))
        for stage in self.stages:
            x_bhwc = stage(x_bhwc)
        return self.head(jnp.mean(x_bhwc, axis=(1, 2)))

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[2] != self.config.in_channels:
            fail(
                "ResNet",
                "an example",
                f"be [height, width, {self.config.in_channels}]",
                f"the shape {shape}",
                "Change in_channels, or what the loader makes of the examples.",
            )


class Stage(nnx.Module):
    """Blocks of one width, of which the first may halve the image."""

    def __init__(
        self,
        config: ResNetConfig,
        inputs: int,
        outputs: int,
        depth: int,
        stride: int,
        rngs: nnx.Rngs,
    ):
        first = Block(config, inputs, outputs, stride, rngs)
        others = (Block(config, outputs, outputs, 1, rngs) for _ in range(depth - 1))
        self.blocks = nnx.List([first, *others])

    def __call__(
        self, x_bhwc: Float[Array, "batch height width channels"]
    ) -> Float[Array, "..."]:
        """One block after another."""
        for block in self.blocks:
            x_bhwc = block(x_bhwc)
        return x_bhwc


class Block(nnx.Module):
    """relu(shortcut(x) + convolutions(x)), with a ReLU between convolutions."""

    def __init__(
        self,
        config: ResNetConfig,
        inputs: int,
        outputs: int,
        stride: int,
        rngs: nnx.Rngs,
    ):
        inner = outputs // 4
        if not config.bottleneck:
            convs = ((inputs, outputs, 3, stride), (outputs, outputs, 3, 1))
        elif config.stride_first:
            convs = ((inputs, inner, 1, stride), (inner, inner, 3, 1))
        else:
            convs = ((inputs, inner, 1, 1), (inner, inner, 3, stride))
        if config.bottleneck:
            convs = (*convs, (inner, outputs, 1, 1))
        self.convs = nnx.List(ConvNorm(*conv, rngs) for conv in convs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else ConvNorm(inputs, outputs, 1, stride, rngs)

    def __call__(
        self, x_bhwc: Float[Array, "batch height width channels"]
    ) -> Float[Array, "..."]:
        """The block's image, of half the size if it has a stride."""
        y_bhwc = x_bhwc
        for i, conv in enumerate(self.convs):
            y_bhwc = conv(nnx.relu(y_bhwc) if i else y_bhwc)
        if self.shortcut is not None:
            x_bhwc = self.shortcut(x_bhwc)
        return nnx.relu(x_bhwc + y_bhwc)


class ConvNorm(nnx.Module):
    """A convolution without bias, and BatchNorm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, rngs: nnx.Rngs
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=(stride, stride),
            # on both sides alike: "SAME" puts less before than after if there is a
            # stride, and weights from elsewhere expect this
            padding=_around(kernel),
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(
        self, x_bhwc: Float[Array, "batch height width channels"]
    ) -> Float[Array, "..."]:
        """The normalised image, in the dtype of the convolution."""
        x_bhwc = self.conv(x_bhwc)
        # float32 statistics make BatchNorm's output float32: go back, or all that
        # follows would be computed in float32 too
        return self.norm(x_bhwc).astype(x_bhwc.dtype)


def _around(kernel: int) -> Any:
    """As much padding before an axis as after it."""
    return ((kernel // 2, kernel // 2),) * 2
