"""Which of the processes has gone, when a collective says only that one has."""

from __future__ import annotations

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


@pytest.mark.parametrize("words", [GLOO, NCCL])
def test_a_lost_connection_waits_for_the_last_word_of_who_has_failed(watcher, words):
    peers, gone = watcher(Store(_1="7", _2="failed"), timeout_secs=60)
    peers.await_cause(RuntimeError(words))
    assert gone == [(2, "an error there, which it has printed")]


def test_a_lost_connection_waits_until_who_was_killed_is_silent_for_too_long(watcher):
    peers, gone = watcher(Store(_1="done", _2="7"), timeout_secs=1)
    peers.await_cause(RuntimeError(GLOO))
    assert gone == [(2, "nothing since 1 s")]


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: 3 GiB"), ValueError(GLOO)]
)
def test_an_error_of_its_own_is_not_kept_waiting(watcher, error):
    peers, gone = watcher(Store(_1="7", _2="7"), timeout_secs=60)
    peers.await_cause(error)
    assert peers.is_alive()
    assert not gone
