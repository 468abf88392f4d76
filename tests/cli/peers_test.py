"""Which of the processes has gone, when a collective says only that one has."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from distilljax.cli.peers import Peers

GLOO = "UNKNOWN: Gloo AllGather failed: pair.cc:547] Connection closed by peer [::1]:49"
NCCL = "INTERNAL: NCCL operation ncclAllReduce() failed: remote process exited"


class Store:
    """The key-value store of `jax.distributed`, in one process."""

    def __init__(self, **said: str):
        self.said = {f"distilljax/alive/{name[1:]}": x for name, x in said.items()}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        assert allow_overwrite
        self.said[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [x for x in self.said.items() if x[0].startswith(prefix)]


@pytest.fixture
def watcher(monkeypatch):
    """Makes one that records who has gone, where it would end the process."""
    made = []

    def make(store: Store, timeout_secs: float):
        peers, gone = Peers(store, 0, 3, timeout_secs), []
        monkeypatch.setattr(
            peers, "_end", lambda *got: (gone.append(got), peers._over.set())
        )
        made.append(peers)
        peers.start()
        return peers, gone

    yield make
    for peers in made:
        peers._over.set()
        peers.join()
        peers._last_words.withdraw()


@pytest.mark.parametrize("words", [GLOO, NCCL])
def test_a_lost_connection_waits_for_the_last_word_of_who_has_failed(watcher, words):
    peers, gone = watcher(Store(_1="7", _2="failed"), timeout_secs=60)
    peers.await_cause(RuntimeError(words))
    assert gone == [(2, "an error there, which it has printed")]


def test_a_lost_connection_waits_until_who_was_killed_is_silent_for_too_long(watcher):
    peers, gone = watcher(Store(_1="done", _2="7"), timeout_secs=1)
    peers.await_cause(RuntimeError(GLOO))
    assert gone == [(2, "nothing since 1 s")]


def test_one_that_ends_because_of_another_names_that_one_to_the_rest(watcher):
    """Else they would look for the cause where there is none."""
    peers, gone = watcher(Store(_1="lost 2 nothing since 60 s", _2="7"), 60)
    peers.join(timeout=30)
    assert gone == [(2, "nothing since 60 s")]


SPEAKING = """
import os, sys
from distilljax.cli.peers import LastWords

words = LastWords("these are the last words")
if sys.argv[1] == "withdrawn":
    words.withdraw()
if sys.argv[1] == "in order":
    sys.exit(1)
os.abort()
"""


@pytest.mark.parametrize(
    ("how", "said"), [("aborted", True), ("withdrawn", False), ("in order", False)]
)
def test_last_words_are_of_a_process_that_could_not_speak(how, said):
    done = subprocess.run(
        [sys.executable, "-c", SPEAKING, how], capture_output=True, timeout=60
    )
    assert done.returncode == (1 if how == "in order" else -signal.SIGABRT)
    assert (b"these are the last words" in done.stderr) == said


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: 3 GiB"), ValueError(GLOO)]
)
def test_an_error_of_its_own_is_not_kept_waiting(watcher, error):
    peers, gone = watcher(Store(_1="7", _2="7"), timeout_secs=60)
    peers.await_cause(error)
    assert peers.is_alive()
    assert not gone
