"""Commands in processes of their own: what surrounds them, and several at once."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

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


class Command:
    """A command of distilljax in one or more processes; ended whatever happens.

    Args:
      count: How many processes; they have eight devices together.
      words: What is typed behind `distilljax`.
      variables: Of the environment, for each name by process.
    """

    def __init__(self, count: int, words: list[str], **variables: dict[int, str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [""] * count
        self.running: list[subprocess.Popen] = []
        self._readers = []
        for i in range(count):
            command = [sys.executable, "-m", "distilljax", *words]
            if count > 1:
                command += ["--multihost", "--coordinator", f"127.0.0.1:{port}"]
                command += ["--num-processes", str(count), "--process-id", str(i)]
            own = {name: of[i] for name, of in variables.items() if i in of}
            process = subprocess.Popen(
                command,
                env={**environment(num_devices=8 // count), **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.running.append(process)
            reader = threading.Thread(target=self._read, args=(i, process))
            reader.start()
            self._readers.append(reader)

    def _read(self, i: int, process: subprocess.Popen) -> None:
        with process.stdout as lines:
            for line in lines:
                self.outputs[i] += line

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.kill()
        for reader in self._readers:
            reader.join(timeout=10)

    def until(
        self, holds: Callable[[], bool], timeout_secs: float = 150, every: float = 0.01
    ) -> None:
        """Wait until something holds, while all processes run."""
        deadline = time.monotonic() + timeout_secs
        while not holds():
            ended = [p.poll() for p in self.running]
            assert ended == [None] * len(ended), (ended, self.outputs)
            assert time.monotonic() < deadline, self.outputs
            time.sleep(every)

    def codes(self, timeout_secs: float = 150) -> list[int]:
        """How they ended, when all have."""
        deadline = time.monotonic() + timeout_secs
        for process in self.running:
            process.wait(timeout=max(1.0, deadline - time.monotonic()))
        for reader in self._readers:
            reader.join(timeout=10)
        return [p.returncode for p in self.running]
