"""Chips are told apart by the names that JAX gives to devices."""

from __future__ import annotations

import pytest

from distilljax.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v4 lite", None),
        ("TPU v40", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
    ],
)
def test_chips_are_told_apart(kind, peak):
    found = chip_of(kind)
    assert (found and found.peak_flops) == peak


def test_every_chip_is_found_by_each_of_its_names_and_says_its_source():
    for chip in CHIPS.values():
        assert all(chip_of(kind) is chip for kind in chip.kinds)
        assert chip.source
        assert chip.peak_flops / chip.memory_bytes_per_sec > 50  # FLOP per byte
