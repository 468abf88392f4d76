"""A process that makes one step whenever it is told to, and one that tells it.

Variants of a step live in processes of their own, all at once, and make their steps in
turn: so each has its own peak of memory, whatever library it uses, and a busy machine
slows all of them. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def size_of_process(key: str) -> int:
    """A line of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak() -> None:
    """From here on VmHWM is the peak of what follows."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """What was freed, by compilers too, goes to the system; glibc would keep it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def serve(
    make: Callable[[], tuple[Callable[[], float], dict[str, Any]]],
    device_sizes: Callable[[], dict[str, int]] = dict,
) -> None:
    """Make a step for each line of the input, and answer each with a line of JSON.

    Args:
      make: Returns the step, a function that returns its loss when all of it is done,
        and what is to be known of it. Call this after all imports: the memory that is
        counted is what the process has grown by since.
      device_sizes: What is added to the sizes at the end, or replaces them.
    """
    level = size_of_process("VmRSS")
    step, facts = make()
    print(json.dumps(facts), flush=True)
    started = False
    for line in sys.stdin:
        if line.strip() == "end":
            break
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = step()
        found = {
            "loss": loss,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - start_cpu,
        }
        print(json.dumps(found), flush=True)
        if not started:  # the first step compiles
            started = True
            forget_peak()
    sizes = {"peak_bytes": size_of_process("VmHWM") - level}
    give_back()
    forget_peak()
    step()
    sizes["peak_trimmed_bytes"] = size_of_process("VmHWM") - level
    print(json.dumps(sizes | device_sizes()), flush=True)


class Worker:
    """A process that serves, seen from the one that started it."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()
        self.steps = [self.step()]

    def step(self) -> dict[str, float]:
        """Loss, seconds and CPU seconds of one step."""
        return self._ask("step")

    def end(self) -> dict[str, int]:
        """Its sizes; it is gone afterwards."""
        sizes = self._ask("end")
        self.process.wait()
        return sizes

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.wait()

    def _ask(self, word: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        """The next line of JSON; libraries may print other lines."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
