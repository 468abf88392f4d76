"""The surroundings of a command that is run in a process of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

FAST_COMPILATION = "--xla_backend_optimization_level=0"


# Set by the first process of a test session, for all others.
_FOLDER = "DISTILLJAX_TESTS_COMPILED"


def compiled_before() -> dict[str, str]:
    """Variables for a cache of what this test process, and those it starts, compile.

    Each of several has one of its own: JAX writes entries in place, and warns of one
    that it reads while another process writes it. The first process of all makes the
    folder, and removes it at its end.
    """
    if _FOLDER not in os.environ:
        folder = os.environ[_FOLDER] = tempfile.mkdtemp(prefix="compiled")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    return {
        "JAX_COMPILATION_CACHE_DIR": os.path.join(os.environ[_FOLDER], worker),
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
        **compiled_before(),
    }
