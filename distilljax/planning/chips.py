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


_CLOUD = "Google Cloud, Cloud TPU documentation, "
_NVIDIA = "NVIDIA, data sheet, "


def _chip(name: str, kind: str, *numbers: float, axes: int, source: str) -> Chip:
    tflops, memory_gib, memory_gb_per_sec, link_gb_per_sec = numbers
    return Chip(
        name,
        kind,
        tflops * 1e12,
        int(memory_gib * GIB),
        memory_gb_per_sec * 1e9,
        link_gb_per_sec * 1e9,
        axes,
        source,
    )


# Cloud TPU's pages give a chip's interconnect over all links in both directions: 300,
# 400, 1200, 800 and 1200 GB/s (that of v4: in one direction), over two links per axis.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v4", "TPU v4", 275, 32, 1228, 50, axes=3, source=_CLOUD + "TPU v4"),
        _chip("v5e", "TPU v5 lite", 197, 16, 819, 50, axes=2, source=_CLOUD + "v5e"),
        _chip("v5p", "TPU v5", 459, 95, 2765, 100, axes=3, source=_CLOUD + "v5p"),
        _chip("v6e", "TPU v6 lite", 918, 32, 1638, 100, axes=2, source=_CLOUD + "v6e"),
        _chip("tpu7x", "TPU7x", 2307, 192, 7380, 100, axes=3, source=_CLOUD + "TPU7x"),
        _chip(
            "a100", "NVIDIA A100-SXM4-80GB", 312, 80, 2039, 300, axes=0,
            source=_NVIDIA + "A100 80GB SXM",
        ),
        _chip(
            "h100", "NVIDIA H100 80GB HBM3", 989, 80, 3350, 450, axes=0,
            source=_NVIDIA + "H100 SXM",
        ),
        _chip(
            "h200", "NVIDIA H200", 989, 141, 4800, 450, axes=0,
            source=_NVIDIA + "H200 SXM",
        ),
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
