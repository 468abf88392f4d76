"""The surroundings of a command that is run in a process of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

FAST_COMPILATION = "--xla_backend_optimization_level=0"


# Set by the first process of a test session, for all others.
_SHARED = "DISTILLJAX_TESTS_COMPILED"


def compiled_by_all() -> dict[str, str]:
    """Variables for a cache of compiled programs, of all processes of one session.

    The first process makes the folder, and removes it at its end.
    """
    if _SHARED not in os.environ:
        folder = os.environ[_SHARED] = tempfile.mkdtemp(prefix="compiled")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {
        "JAX_COMPILATION_CACHE_DIR": os.environ[_SHARED],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


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
        **compiled_by_all(),
    }
