"""Augmentations: functions of images and of one seed for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt64

from distilljax._checks import fail
from distilljax.data.hashing import random_integers


@runtime_checkable
class Augment(Protocol):
    """What ``Loader(augment=...)`` takes: any function of this form.

    Image b of the result may depend on image b and seed b alone. This is what makes the
    data the same for any number of processes, and lets the teacher see the same view.
    """

    def __call__(
        self,
        images: Float32[np.ndarray, "batch height width channels"],
        seeds: UInt64[np.ndarray, " batch"],
    ) -> Float32[np.ndarray, "batch height width channels"]:
        """The augmented images; ``images`` is not changed."""
        ...


@dataclass(frozen=True)
class RandomShift:
    """Moves each image by whole pixels, up to ``max_pixels`` along each axis.

    The shifts are uniform over the (2 max_pixels + 1)^2 possible ones, and pixels that
    come in at the border are 0.

    Attributes:
      max_pixels: Largest shift along each axis, in pixels.

    Example:
      >>> from distilljax.data.hashing import random_bits
      >>> image = np.zeros((1, 3, 3, 1), np.float32)
      >>> image[0, 1, 1, 0] = 1.0
      >>> moved = RandomShift(1)(image, random_bits(0, np.arange(1)))
      >>> moved.shape, float(moved.sum())    # one pixel: it moves but never leaves
      ((1, 3, 3, 1), 1.0)

    Reference: Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov, "Knowledge distillation:
    a good teacher is patient and consistent", CVPR 2022 (the same view for both
    models).
    """

    max_pixels: int = 2

    def __post_init__(self):
        if self.max_pixels < 0:
            fail(
                "RandomShift",
                "max_pixels",
                "be at least 0",
                self.max_pixels,
                "Shifts go both ways.",
            )

    def __call__(
        self,
        images: Float32[np.ndarray, "batch *image"],
        seeds: UInt64[np.ndarray, " batch"],
    ) -> Float32[np.ndarray, "batch *image"]:
        """The shifted images.

        Args:
          images: The images, scaled.
          seeds: One seed for each image.
        """
        if images.ndim != 4:
            fail(
                "RandomShift",
                "images",
                "have the shape [batch, height, width, channels]",
                images.shape,
                "Let the Loader flatten them (flatten=True): it does so afterwards.",
            )
        batch, height, width, channels = images.shape
        m = self.max_pixels
        if m >= min(height, width):
            fail(
                "RandomShift",
                "max_pixels",
                f"be smaller than the images, {height} by {width}",
                m,
                "A larger shift leaves nothing of an image.",
            )
        padded = np.zeros(
            (batch, height + 2 * m, width + 2 * m, channels), images.dtype
        )
        padded[:, m : m + height, m : m + width] = images
        # A view of every window of every image; choosing one of each copies it once.
        s_batch, s_row, s_column, s_channel = padded.strides
        windows = np.lib.stride_tricks.as_strided(
            padded,
            (batch, 2 * m + 1, 2 * m + 1, height, width, channels),
            (s_batch, s_row, s_column, s_row, s_column, s_channel),
            writeable=False,
        )
        down = random_integers(seeds, 0, 2 * m + 1, draw=0)
        right = random_integers(seeds, 0, 2 * m + 1, draw=1)
        return windows[np.arange(batch), down, right]
