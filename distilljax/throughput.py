"""How fast a run is, and where its time goes: FLOP/s, MFU, shares, memory.

Model FLOPs are counted once for a step: a forward pass of the teacher (2 per parameter
and token), and three of the student (6), with attention, without what remat computes
again. MFU divides them by what the chips could do at best.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from distilljax.chips import chip_of


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of one example.

    Attributes:
      teacher: Of its forward pass; 0 if it does not run.
      student: Of its forward and backward passes.
    """

    teacher: float
    student: float

    @property
    def both(self) -> float:
        """Of the whole step."""
        return self.teacher + self.student


class Meter:
    """Where the host spends the time of the loop, and what the devices make of it.

    The devices work while the host reads data, and so a share of data is lost only if
    none is left for the step: `share_step` is dispatching steps, and waiting for them.

    Args:
      flops: Of an example; None leaves FLOP/s out.
      num_devices: How many chips work on it, those of the teacher included.
      kind: Their `device_kind`.

    Example:
      >>> meter = Meter(Flops(2e9, 6e9), 2, "TPU v4")
      >>> meter.started()
      >>> with meter.spent("data"):
      ...     time.sleep(0.01)
      >>> found = meter.rates({"examples_per_second": 100.0})
      >>> found["flops_per_second_per_chip"], round(1e3 * found["mfu"], 3)
      (400000000000.0, 1.455)
      >>> found["share_data"] > 0.5
      True
    """

    def __init__(self, flops: Flops | None, num_devices: int, kind: str):
        self.flops = flops
        self.num_devices = num_devices
        chip = chip_of(kind)
        self._peak = None if chip is None else chip.peak_flops / chip.devices
        self._productive = 0.0
        self._stepping = False
        self.begin()

    def begin(self) -> None:
        """Begin a window."""
        self._since = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextlib.contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Count what is done inside under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count some seconds under a name."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def started(self) -> None:
        """The first step is compiled and on its way: what was until now was for it."""
        self.add("startup", self._rest())
        self._stepping = True

    def _rest(self) -> float:
        """Seconds of this window that have no name."""
        elapsed = time.perf_counter() - self._since
        return max(elapsed - sum(self._spent.values()), 0.0)

    @property
    def productive(self) -> float:
        """Seconds of steps so far: dispatching them, and waiting for them."""
        return self._productive + (self._rest() if self._stepping else 0.0)

    def rates(self, record: Mapping[str, Any]) -> dict[str, float]:
        """What a line of metrics says of the window that ends with it.

        Args:
          record: The line, with `examples_per_second`, perhaps `tokens_per_second`.
        """
        found: dict[str, float] = {}
        unit = "tokens" if "tokens_per_second" in record else "examples"
        per_chip = record[f"{unit}_per_second"] / self.num_devices
        found[f"{unit}_per_second_per_chip"] = per_chip
        if self.flops is not None:
            examples = record["examples_per_second"] / self.num_devices
            found["flops_per_second_per_chip"] = self.flops.both * examples
            if self._peak is not None:
                found["mfu"] = self.flops.both * examples / self._peak
        if (peak := memory_peak_bytes()) is not None:
            found["memory_peak_bytes"] = float(peak)
        self._spent["step"] = rest = self._rest()
        total = max(sum(self._spent.values()), 1e-9)
        found |= {f"share_{name}": x / total for name, x in self._spent.items()}
        self._productive += rest
        self.begin()
        return found


def memory_peak_bytes() -> int | None:
    """The most memory that a device of this process has had in use; None on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found]
    return max(peaks, default=None)
