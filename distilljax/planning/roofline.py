"""How long a step takes at least: compute, memory and interconnect of the chip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distilljax.planning.collectives import Collective
from distilljax.planning.topology import Topology


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step, as if each part of a chip were all that there is.

    The longest is a bound from below, if the parts overlap perfectly; the sum is what
    it takes if nothing overlaps. None of them has been measured.
    """

    compute: float
    """Executed operations at the chip's peak in bfloat16."""
    memory: float
    """What moves to and from HBM at its peak bandwidth."""
    interconnect: float
    """What crosses the links, with both directions of each in use."""
    model_flops_per_device: float
    peak_flops: float

    @property
    def at_least(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def at_most(self) -> float:
        """All three after one another."""
        return self.compute + self.memory + self.interconnect

    @property
    def bound_by(self) -> str:
        """Which of them it is."""
        parts = {n: getattr(self, n) for n in ("compute", "memory", "interconnect")}
        return max(parts, key=lambda name: parts[name])

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation if nothing overlaps, and if everything does."""
        ideal = self.model_flops_per_device / self.peak_flops
        return ideal / self.at_most, ideal / self.at_least

    def to_json(self) -> dict[str, Any]:
        """All of it, in seconds."""
        found = asdict(self)
        found |= {"at_least": self.at_least, "at_most": self.at_most}
        low, high = self.mfu
        return found | {"bound_by": self.bound_by, "mfu": [low, high]}


def roofline(
    topology: Topology,
    mesh: Any,
    *,
    executed: float,
    model: float,
    traffic: float,
    sent: Iterable[Collective],
) -> Roofline | None:
    """The roofline of a program; None where the chip's figures are not known.

    Args:
      topology: The chip.
      mesh: The program's devices.
      executed: Operations over all devices.
      model: The same, of the models alone.
      traffic: Bytes of one device to and from HBM.
      sent: Its collectives.
    """
    chip = topology.chip
    if chip is None or topology.peak_flops is None:
        return None
    cores = topology.devices_per_chip
    network = 0.0
    for one in sent:
        links = num_links(mesh, one.axes, chip.torus_axes)
        network += one.bytes_per_step * cores / (links * chip.link_bytes_per_sec)
    return Roofline(
        compute=executed / mesh.size / topology.peak_flops,
        memory=traffic / (chip.memory_bytes_per_sec / cores),
        interconnect=network,
        model_flops_per_device=model / mesh.size,
        peak_flops=topology.peak_flops,
    )


def num_links(mesh: Any, axes: tuple[str, ...], torus_axes: int) -> int:
    """How many links of a chip a group of devices along some axes of the mesh can use.

    Two, one for each direction of a ring, for every dimension of the torus in which
    the devices of the group lie apart. Of a switch, the one there is.
    """
    if not torus_axes:
        return 1
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = np.asarray(mesh.devices[index]).ravel()
    places = np.array([getattr(device, "coords", (0,)) for device in group])
    apart = sum(len(set(places[:, i].tolist())) > 1 for i in range(places.shape[1]))
    return 2 * max(1, apart)
