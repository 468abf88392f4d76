from __future__ import annotations

import os
import signal

import jax
import jax.numpy as jnp
import pytest

from distilljax.tracing import trace_steps


@pytest.fixture
def running(monkeypatch):
    """The traces that are being taken: none is, in truth."""
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: found.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.pop())
    return found


def traced(running, tmp_path, start, stop, steps, ask=None, before=lambda step: None):
    found = []
    with trace_steps(tmp_path, start, stop, steps, ask=ask) as trace:
        for step in range(start + 1, stop + 1):
            before(step)
            with trace(step, jnp.zeros(())):
                found += [step] if running else []
    assert running == []
    return found


@pytest.mark.parametrize(
    ("start", "stop", "steps", "expected"),
    [
        (0, 100, True, range(11, 21)),
        (50, 100, True, range(61, 71)),
        (0, 12, True, range(3, 13)),
        (0, 4, True, range(1, 5)),
        (0, 100, (30, 32), range(30, 33)),
        (0, 100, (1, 1), range(1, 2)),
        (30, 100, (20, 40), range(31, 41)),  # resumed in the middle of them
        (50, 100, (30, 32), ()),  # or after them
        (0, 31, (30, 40), range(30, 32)),
        (0, 100, False, ()),
    ],
)
def test_the_steps_that_were_named_are_traced(
    tmp_path, running, start, stop, steps, expected
):
    assert traced(running, tmp_path, start, stop, steps) == list(expected)


@pytest.mark.parametrize("by", ["file", "signal"])
def test_ten_steps_are_traced_when_asked_for(tmp_path, running, monkeypatch, by):
    now = [0.0]
    monkeypatch.setattr("distilljax.tracing.time.monotonic", lambda: now[0])
    ask = tmp_path / "PROFILE"

    def before(step):
        now[0] += 0.1
        if step in (25, 50):
            if by == "file":
                ask.touch()
            else:
                os.kill(os.getpid(), signal.SIGUSR1)

    handler = signal.getsignal(signal.SIGUSR1)
    found = traced(running, tmp_path, 0, 100, (3, 4), ask, before)
    assert found[:2] == [3, 4]
    asked = found[2:]
    assert len(asked) == 20
    first, second = asked[0], asked[10]
    assert asked == [*range(first, first + 10), *range(second, second + 10)]
    assert 25 <= first <= 36  # looked for once a second
    assert 50 <= second <= 61
    assert not ask.exists()
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_an_error_ends_the_trace(tmp_path, running):
    with (
        pytest.raises(ZeroDivisionError, match=tmp_path.name),
        trace_steps(tmp_path, 0, 9, (1, 9)) as trace,
        trace(1, jnp.zeros(())),
    ):
        raise ZeroDivisionError(str(running))
    assert running == []
