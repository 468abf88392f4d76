from __future__ import annotations

import os
import signal

import jax
import pytest

from distilljax.together import Clock, StopSignal, agreed


def test_sigterm_sets_a_flag_and_gives_the_signal_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached()
        assert stop.requested
        assert stop.reached()
    assert signal.getsignal(signal.SIGTERM) is before


def test_alone_everything_is_agreed():
    assert agreed(True)
    assert not agreed(False)


@pytest.fixture
def clocks(monkeypatch):
    """Both clocks, to be set."""
    now = {"monotonic": 1000.0, "time": 1.7e9}
    for name in now:
        monkeypatch.setattr(f"time.{name}", lambda name=name: now[name])
    return now


@pytest.mark.parametrize("jump", [-1e6, 0.0, 1e6])
def test_a_date_that_jumps_moves_no_checkpoint(clocks, jump):
    clock = Clock(60.0)
    found = []
    for second in range(1, 181):
        clocks["monotonic"] += 1.0
        clocks["time"] += 1.0 + (jump if second == 30 else 0.0)
        if clock.due():
            found.append(second)
            clock.restart()
    assert found == [60, 120, 180]


def test_several_processes_ask_only_where_they_wait(clocks, monkeypatch):
    """The answer is that of process 0, and one that does not wait has no answer."""
    asked = []

    def broadcast(x):
        asked.append(bool(x))
        return True  # the clock of process 0 is ahead

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "distilljax.together.multihost_utils.broadcast_one_to_all", broadcast
    )
    clock = Clock(60.0)
    clocks["monotonic"] += 100
    assert not clock.due(waiting=False)
    assert asked == []
    assert clock.due(waiting=True)
    clock.restart()
    assert clock.due(waiting=True)
    assert asked == [True, False]
    assert not Clock(None).due(waiting=True)
    assert len(asked) == 2
