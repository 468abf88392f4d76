"""The surroundings of a command that is run in a process of its own."""

from __future__ import annotations

import functools
import os
import tempfile

FAST_COMPILATION = "--xla_backend_optimization_level=0"


@functools.cache
def _compiled() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="compiled")


def environment(num_devices: int) -> dict[str, str]:
    """Variables for a process with simulated devices.

    Processes of one session share what they have compiled: a run that is resumed four
    times compiles once.
    """
    return {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(FAST_COMPILATION, "").strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_COMPILATION_CACHE_DIR": _compiled().name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
