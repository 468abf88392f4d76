"""What a chip can do: peak compute, memory and interconnect, by generation."""

from __future__ import annotations

from dataclasses import dataclass

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
    kinds: tuple[str, ...]
    """As JAX calls the device: the beginnings of its `device_kind`."""
    peak_flops: float
    """Dense bfloat16 multiplications and additions per second."""
    memory_bytes: int
    """Of the high-bandwidth memory; of TPUs from v5e on, what their compiler has."""
    memory_bytes_per_sec: float
    """What moves between memory and the chip."""
    link_bytes_per_sec: float
    """What one link sends in one direction."""
    torus_axes: int
    """Dimensions of the torus, with two links in each; 0: a switch, of one link."""
    source: str
    """Where the numbers are from."""
    devices: int = 1
    """How many devices JAX has of a chip."""


_CLOUD = "Google Cloud, Cloud TPU documentation, https://cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA, data sheet: NVIDIA "


def _chip(
    name: str,
    kinds: tuple[str, ...],
    *numbers: float,
    axes: int = 0,
    source: str,
    devices: int = 1,
) -> Chip:
    tflops, memory_gib, memory_gb_per_sec, link_gb_per_sec = numbers
    return Chip(
        name,
        kinds,
        tflops * 1e12,
        int(memory_gib * GIB),
        memory_gb_per_sec * 1e9,
        link_gb_per_sec * 1e9,
        axes,
        source,
        devices,
    )


# Cloud TPU's pages give a chip's interconnect over all links in both directions: 300,
# 400, 1200, 800 and 1200 GB/s (that of v4: in one direction), over two links per axis.
# What NVIDIA states "with sparsity" is halved, and NVLink or PCIe counts one direction.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v4", ("TPU v4",), 275, 32, 1228, 50, axes=3, source=_CLOUD + "v4"),
        _chip("v5e", ("TPU v5 lite", "TPU v5e"), 197, 15.75, 819, 50, axes=2,
              source=_CLOUD + "v5e"),
        _chip("v5p", ("TPU v5", "TPU v5p"), 459, 95.74, 2765, 100, axes=3,
              source=_CLOUD + "v5p"),
        _chip("v6e", ("TPU v6 lite", "TPU v6e"), 918, 31.25, 1638, 100, axes=2,
              source=_CLOUD + "v6e"),
        _chip("tpu7x", ("TPU7x",), 2307, 189.5, 7380, 100, axes=3,
              source=_CLOUD + "tpu7x", devices=2),
        _chip("l4", ("NVIDIA L4",), 121, 24, 300, 32,
              source=_NVIDIA + "L4 Tensor Core GPU"),
        _chip("l40s", ("NVIDIA L40S",), 362, 48, 864, 32, source=_NVIDIA + "L40S"),
        _chip("a100", ("NVIDIA A100",), 312, 80, 2039, 300,
              source=_NVIDIA + "A100 Tensor Core GPU, 80GB SXM"),
        _chip("h100", ("NVIDIA H100",), 989, 80, 3350, 450,
              source=_NVIDIA + "H100 Tensor Core GPU, SXM"),
        _chip("h100-pcie", ("NVIDIA H100 PCIe",), 756, 80, 2000, 300,
              source=_NVIDIA + "H100 Tensor Core GPU, PCIe"),
        _chip("h100-nvl", ("NVIDIA H100 NVL",), 835, 94, 3900, 300,
              source=_NVIDIA + "H100 Tensor Core GPU, NVL"),
        _chip("h200", ("NVIDIA H200",), 989, 141, 4800, 450,
              source=_NVIDIA + "H200 Tensor Core GPU, SXM"),
    )
}  # fmt: skip


def chip_of(kind: str) -> Chip | None:
    """The chip of a device; None if it is in no table, as CPUs are not.

    Args:
      kind: `device_kind` of a JAX device; the longest beginning that fits counts.

    Example:
      >>> chip_of("TPU v5 lite").name, chip_of("NVIDIA H100 80GB HBM3").name
      ('v5e', 'h100')
      >>> chip_of("cpu") is None and chip_of("TPU v4 lite") is None
      True
    """
    known = {name: chip for chip in CHIPS.values() for name in chip.kinds}
    fits = [
        name
        for name in known
        if kind == name or kind.startswith((f"{name} ", f"{name}-"))
    ]
    if kind.endswith(" lite") and kind not in known:
        return None  # another chip than the one whose name it begins with
    return known[max(fits, key=len)] if fits else None
