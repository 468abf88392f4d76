"""What happens to runs: killed at any moment, and alone where others should be."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distilljax.events import read_events
from tests.processes import environment
from tests.saved import losses, saved_arrays

pytestmark = pytest.mark.slow

TINY = str(Path(__file__).parent / "cli" / "tiny.py")
STEPS = 400
COMMAND = ["train", TINY, f"--steps={STEPS}", "--checkpoint-every-steps=5"]
COMMAND += ["--eval-every-steps=100", "--loader.shuffle=True", "--keep-last=2"]

# Imports once, and forks for each attempt: what is killed is the run, not the import.
# Waits for what `when` names, then for so many seconds more, then kills.
KILLER = """
import json, os, signal, sys, time
from pathlib import Path
import distilljax.train
from distilljax.cli import main

workdir, kills, words = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
events = workdir / "events.jsonl"

def first_steps():
    return events.read_text().count('"first_step"') if events.exists() else 0

found = []
for when, seconds in kills:
    before, pid = first_steps(), os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(main(words))
    ended = False
    deadline = time.monotonic() + 60
    while when == "step" and first_steps() == before and not ended:
        ended = os.waitpid(pid, os.WNOHANG) != (0, 0)
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(seconds)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        ended = not os.WIFSIGNALED(status)
    half = [p.name for p in (workdir / "checkpoints").glob("*tmp*")]
    verifying = [
        p.name for p in (workdir / "checkpoints").glob("*")
        if p.name.isdigit() and not (p / "files.json").exists()
    ]
    found.append({"ended": ended, "half": half, "unverified": verifying})
print(json.dumps(found))
"""


def finish(*words: str, code: str | None = None) -> str:
    start = [sys.executable, *(["-c", code] if code else ["-m", "distilljax"])]
    done = subprocess.run(
        [*start, *words],
        env=environment(num_devices=1),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """Before the first step, in the middle of steps, inside of checkpoints."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(*COMMAND, "--workdir", str(whole))
    rng = random.Random(0)
    kills = [("start", rng.uniform(0, 1.5)) for _ in range(4)]
    kills += [("step", rng.uniform(0, 0.3)) for _ in range(16)]
    rng.shuffle(kills)
    words = [str(parts), json.dumps(kills), *COMMAND, "--workdir", str(parts)]
    found = json.loads(finish(*words, code=KILLER).splitlines()[-1])
    assert len(found) == 20
    assert not any(attempt["ended"] for attempt in found)
    # some of them hit a checkpoint that was being written
    assert any(attempt["half"] or attempt["unverified"] for attempt in found), found
    finish(*COMMAND, "--workdir", str(parts))

    one, other = saved_arrays(whole, STEPS), saved_arrays(parts, STEPS)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)
    assert losses(whole) == losses(parts)
    assert list(losses(parts)) == list(range(1, STEPS + 1))
    results = [json.loads((w / "results.json").read_text()) for w in (whole, parts)]
    assert results[0]["student"]["nll"] == results[1]["student"]["nll"]
    assert results[0]["selected"] == results[1]["selected"]
    events = read_events(parts / "events.jsonl")
    starts = [e for e in events if e["event"] == "start"]
    assert 16 < len(starts) <= 21  # those that were not killed before it
    begun = [e["step"] for e in starts]
    assert begun == sorted(begun)  # no restart lost what one before it had
    assert len(set(begun)) > 3
    goodput = [r["throughput"]["goodput"] for r in results]
    assert 0 < goodput[1] < goodput[0] < 1
    assert not list((parts / "checkpoints").glob("*tmp*"))
    assert not list(parts.glob(".*.tmp"))


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """An address that refuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """An address that connects, and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def swallowing() -> Iterator[str]:
    """An address whose packets are dropped, as a firewall drops them.

    The kernel drops who wants to connect where too many wait to be accepted.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0.5)
            try:
                waiting.connect(server.getsockname())
            except TimeoutError:
                break
        else:
            pytest.fail("all of them were connected")
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("process", "there"), [(0, nobody), (1, nobody), (1, mute), (1, swallowing)]
)
def test_a_process_that_stays_alone_gives_up_in_time(tmp_path, process, there):
    with there() as address:
        done, seconds = started(tmp_path, process, address)
    assert done.returncode == 1, done.stderr
    assert 3 < seconds < 60
    assert f"--coordinator must be reached {'by all 2 ' * (not process)}" in done.stderr
    assert address in done.stderr
    assert "within 3 s" in done.stderr
    assert "--connect-timeout-secs waits longer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def started(tmp_path, process: int, address: str):
    """One of two processes, and how many seconds it took; it waits for 3."""
    words = ["train", TINY, "--workdir", str(tmp_path / "run"), "--multihost"]
    words += ["--coordinator", address, "--num-processes=2", f"--process-id={process}"]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "distilljax", *words, "--connect-timeout-secs=3"],
        env=environment(num_devices=1),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done, time.monotonic() - begun
