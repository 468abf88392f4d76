"""Devices to plan for: of a TPU slice that is not here, or of this machine."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from distilljax._checks import fail
from distilljax.chips import CHIPS, Chip, chip_of

LOCAL = "local"
# Of v4 the compiler describes other devices than a slice has.
_GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")
# The metadata server of a cloud that this machine is not in would be waited for.
_NOT_ON_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # libtpu lets one process at a time have the chips; here there are none
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    # what libtpu does not find it tells on the terminal
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Topology:
    """Devices, real or described, and what their chip can do."""

    name: str
    """As it was asked for."""
    devices: tuple[Any, ...]
    """In the order of a mesh."""
    chip: Chip | None
    """None where its figures are not known, as of a CPU."""
    devices_per_chip: int = 1
    """On some generations each of a chip's two cores is a device."""
    is_real: bool = False
    """Whether the devices are those of this machine."""

    @property
    def memory_bytes(self) -> int | None:
        """Of one device."""
        return self.chip and self.chip.memory_bytes // self.devices_per_chip

    @property
    def peak_flops(self) -> float | None:
        """Of one device, per second."""
        return self.chip and self.chip.peak_flops / self.devices_per_chip


def open_topology(name: str = LOCAL) -> Topology:
    """The devices of a name.

    Args:
      name: "local" for this machine's; "cpu:8" for as many simulated devices; else
        generation and shape of a TPU slice, such as "v5p:4x4x8" or "v6e:8x8", which
        needs `pip install "distilljax[plan]"`.

    Raises:
      ValueError: no compiler is installed, or it knows no such slice.

    Example:
      >>> open_topology("local").is_real
      True
    """
    if name == LOCAL:
        devices = tuple(jax.devices())
        return Topology(name, devices, chip_of(devices[0].device_kind), is_real=True)
    if simulated := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Topology(name, _simulated(int(simulated[1])), None, is_real=True)
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in _GENERATIONS:
        fail(
            "plan",
            "--topology",
            f"be {LOCAL!r}, cpu:N, or GENERATION:SHAPE with a generation of "
            f"{', '.join(_GENERATIONS)}",
            repr(name),
            'Write for example "v5p:4x4x8" or "v5e:8x8".',
        )
    if match[2].count("x") + 1 != CHIPS[match[1]].torus_axes:
        fail(
            "plan",
            "--topology",
            f"have {CHIPS[match[1]].torus_axes} dimensions for {match[1]}, whose chips "
            "are a torus of so many",
            repr(name),
            'Write for example "v5e:8x8" or "v5p:4x4x8".',
        )
    devices = _described(name)
    chips = prod(int(size) for size in match[2].split("x"))
    return Topology(
        name, tuple(devices), CHIPS[match[1]], max(1, len(devices) // chips)
    )


def _simulated(count: int) -> tuple[Any, ...]:
    """So many devices of the CPU; they can be had before JAX has any."""
    with contextlib.suppress(RuntimeError):  # JAX has begun
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        fail(
            "plan",
            "--topology",
            f"ask for at most {len(found)} devices of the CPU, as JAX was started with",
            f"cpu:{count}",
            f"Set JAX_NUM_CPU_DEVICES={count} before JAX is imported.",
        )
    return tuple(found[:count])


def _described(name: str) -> list[Any]:
    """The devices of a slice, from the TPU's compiler; it needs no TPU."""
    if not _has_tpu():
        for variable, value in _NOT_ON_A_TPU.items():
            os.environ.setdefault(variable, value)
    try:
        with _quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
        if "libtpu" in str(error).lower() or "PJRT" in str(error):
            fail(
                "plan",
                f"--topology {name}",
                "have the TPU's compiler, libtpu",
                f"an error of it: {str(error).splitlines()[0][:200]}",
                'Install it: pip install "distilljax[plan]". No TPU is needed.',
            )
        fail(
            "plan",
            "--topology",
            "be a slice that the TPU's compiler knows",
            f"{name!r}: {str(error).splitlines()[0][:200]}",
            "The sizes are those of the generation's documentation, such as v5e:2x4, "
            "v6e:8x8 and v5p:4x4x8.",
        )
    return list(found.devices)


def _has_tpu() -> bool:
    """Whether this machine has chips, whose lock must be respected."""
    return any(Path("/dev").glob("accel*")) or Path("/dev/vfio/0").exists()


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what libtpu's C++ says on the terminal of a machine that is no TPU."""
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
