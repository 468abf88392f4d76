"""What a chip can do: peak compute, memory and interconnect, by generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator, as its maker specifies it.

    Example:
      >>> CHIPS["v5p"].peak_flops
      459000000000000.0
    """

    name: str
    """As a topology is called, such as "v5p"."""
    device_kind: str
    """As JAX calls the device."""
    peak_flops: float
    """bfloat16 multiplications and additions per second."""
    memory_bytes: int
    """Capacity of the high-bandwidth memory."""
    memory_bytes_per_sec: float
    """What moves between memory and the chip."""
    link_bytes_per_sec: float
    """What one link sends in one direction; 0 if it has none."""
    torus_axes: int
    """Dimensions of the torus, with two links in each; 0: a switch, of one link."""
    source: str
    """Where the numbers are from."""


_CLOUD = "Google Cloud, Cloud TPU documentation, system architecture of "
_NVIDIA = "NVIDIA, data sheet of "

# Cloud TPU's pages give the interconnect of a chip over all links in both directions.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 32 * GIB, 1228e9, 300e9 / 12 * 2, 3, _CLOUD + "v4"),
        Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 819e9, 400e9 / 8, 2, _CLOUD + "v5e"),
        Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2765e9, 1200e9 / 12, 3, _CLOUD + "v5p"),
        Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1638e9, 800e9 / 8, 2, _CLOUD + "v6e"),
        Chip("tpu7x", "TPU7x", 2307e12, 192 * GIB, 7380e9, 1200e9 / 12, 3, _CLOUD + "7x"),
        Chip(
            "a100", "NVIDIA A100-SXM4-80GB", 312e12, 80 * GIB, 2039e9, 300e9, 0,
            _NVIDIA + "A100 80GB SXM",
        ),
        Chip(
            "h100", "NVIDIA H100 80GB HBM3", 989e12, 80 * GIB, 3350e9, 450e9, 0,
            _NVIDIA + "H100 SXM",
        ),
        Chip("h200", "NVIDIA H200", 989e12, 141 * GIB, 4800e9, 450e9, 0, _NVIDIA + "H200"),
    )
}  # fmt: skip


def chip_of(device: Any) -> Chip | None:
    """The chip of a device; None if it is in no table, as CPUs are not.

    Example:
      >>> import jax
      >>> chip_of(jax.devices("cpu")[0]) is None
      True
    """
    kinds = {chip.device_kind: chip for chip in CHIPS.values()}
    return kinds.get(device.device_kind)
