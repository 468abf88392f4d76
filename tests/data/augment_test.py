from __future__ import annotations

import numpy as np
import pytest

from distilljax.data import RandomShift
from distilljax.data.augment import Augment
from distilljax.data.hashing import random_bits


def images(batch=20, height=7, width=5, channels=2):
    rng = np.random.default_rng(0)
    return rng.random((batch, height, width, channels), np.float32) + 1.0


def shifted(image, down, right):
    """By the definition: pixel (y, x) comes from (y + down, x + right), or is 0."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                result[y, x] = image[y + down, x + right]
    return result


def test_every_image_is_moved_by_whole_pixels_with_zeros_at_the_border():
    before = images()
    after = RandomShift(2)(before, random_bits(0, np.arange(20)))
    moves = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    for image, result in zip(before, after, strict=True):
        assert any(np.array_equal(result, shifted(image, *m)) for m in moves)


def test_all_shifts_occur_about_equally_often():
    dot = np.zeros((5000, 5, 5, 1), np.float32)
    dot[:, 2, 2] = 1.0
    moved = RandomShift(2)(dot, random_bits(7, np.arange(5000)))
    counts = moved.sum(axis=0).ravel()
    # Chi-squared with 24 degrees of freedom: 51.2 is its 0.999 quantile.
    assert ((counts - 200) ** 2 / 200).sum() < 51.2


def test_an_image_depends_on_its_own_seed_alone():
    seeds = random_bits(0, np.arange(20))
    together = RandomShift(3)(images(), seeds)
    alone = [
        RandomShift(3)(images()[i : i + 1], seeds[i : i + 1])[0] for i in range(20)
    ]
    assert np.array_equal(together, np.stack(alone))


def test_the_images_given_are_not_changed():
    before = images()
    RandomShift(2)(before, random_bits(0, np.arange(20)))
    assert np.array_equal(before, images())


def test_no_shift_is_the_identity():
    assert np.array_equal(
        RandomShift(0)(images(), random_bits(0, np.arange(20))), images()
    )


def test_flattened_images_are_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"RandomShift: images must .* got \(4, 64\)"):
        RandomShift(1)(np.zeros((4, 64), np.float32), random_bits(0, np.arange(4)))


def test_shifts_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="max_pixels must be at least 0, got -1"):
        RandomShift(-1)
    seeds = random_bits(0, np.arange(20))
    with pytest.raises(ValueError, match="smaller than the images, 7 by 5, got 5"):
        RandomShift(5)(images(), seeds)
    assert RandomShift(4)(images(), seeds).any(axis=(1, 2, 3)).all()


def test_it_is_an_augmentation():
    assert isinstance(RandomShift(1), Augment)
