"""Goodput is of the time that passed, not of dates, and of steps that stayed."""

from __future__ import annotations

import json

import pytest

from distilljax import events
from distilljax.events import Events, elapsed_seconds, productive_seconds, read_events


class Clocks:
    """A machine's clocks, to be set: `date` may jump, and a boot begins another."""

    def __init__(self, monkeypatch):
        self.date, self.monotonic, self.boot = 1.7e9, 5000.0, "first"
        monkeypatch.setattr("distilljax.events.time.time", lambda: self.date)
        monkeypatch.setattr("distilljax.events.time.monotonic", lambda: self.monotonic)
        monkeypatch.setattr(events, "this_boot", lambda: self.boot)

    def pass_(self, seconds: float, jump: float = 0.0) -> None:
        self.monotonic += seconds
        self.date += seconds + jump

    def reboot(self, down: float, jump: float = 0.0) -> None:
        self.date += down + jump
        self.monotonic, self.boot = 10.0, f"{self.boot} and another"


@pytest.fixture
def clocks(monkeypatch):
    return Clocks(monkeypatch)


def lived(clocks, path, jump=0.0, reboot=False) -> float:
    """A run of three processes: killed, stopped, finished. Its goodput at the end."""
    # 10 s to start, 40 s of steps of which 30 s are saved, killed; 20 s down
    first = Events(path, 0, clocks.monotonic)
    clocks.pass_(10)
    first.add("first_step", step=1)
    clocks.pass_(30, jump)
    first.add("checkpoint", step=30, productive=30.0)
    clocks.pass_(10)
    clocks.reboot(20) if reboot else clocks.pass_(20, -jump)
    # 10 s to start, 50 s of steps, stopped
    began = clocks.monotonic
    clocks.pass_(5)
    second = Events(path, 30, began)
    clocks.pass_(5)
    clocks.pass_(50)
    second.add("checkpoint", step=80, productive=50.0)
    second.add("stop", step=80, reason="stopped", productive=50.0)
    clocks.pass_(30)
    third = Events(path, 80, clocks.monotonic)
    clocks.pass_(30)
    found = third.goodput(20.0)
    third.add("stop", step=100, reason="done", productive=20.0)
    return found


EXPECTED = (30 + 50 + 20) / (10 + 30 + 10 + 20 + 10 + 50 + 30 + 30)


@pytest.mark.parametrize("jump", [0.0, 1e7, -1e7])
def test_goodput_over_restarts_whatever_the_date(clocks, tmp_path, jump):
    path = tmp_path / "events.jsonl"
    assert lived(clocks, path, jump) == pytest.approx(EXPECTED)
    found = read_events(path)
    assert productive_seconds(found) == 100.0
    assert elapsed_seconds(found) == pytest.approx(190.0)
    # finished, and taken up days later for more steps: that is no time of the run
    clocks.pass_(1e6)
    again = Events(path, 100, clocks.monotonic)
    clocks.pass_(10)
    assert again.goodput(10.0) == pytest.approx(110 / 200)


def test_over_a_reboot_the_dates_count(clocks, tmp_path):
    """The monotonic clock begins anew, and says nothing of the time between."""
    path = tmp_path / "events.jsonl"
    assert lived(clocks, path, reboot=True) == pytest.approx(EXPECTED)


def test_a_date_that_went_back_over_a_reboot_counts_as_no_time(clocks, tmp_path):
    path = tmp_path / "events.jsonl"
    Events(path, 0, clocks.monotonic)
    clocks.reboot(20, jump=-1e6)
    after = Events(path, 0, clocks.monotonic)
    clocks.pass_(10)
    assert after.goodput(5.0) == pytest.approx(0.5)


def test_steps_that_are_lost_are_not_productive(clocks, tmp_path):
    """The run went back twice, once to before the start of the process in between."""
    path = tmp_path / "events.jsonl"
    for start, saved in ((0, {10: 8.0, 20: 16.0}), (20, {30: 7.0}), (10, {20: 9.0})):
        part = Events(path, start, clocks.monotonic)
        for step, productive in saved.items():
            clocks.pass_(10)
            part.add("checkpoint", step=step, productive=productive)
    assert productive_seconds(read_events(path)) == 8.0 + 0.0 + 9.0
    assert productive_seconds(read_events(path), 10) == 8.0
    assert productive_seconds(read_events(path), 0) == 0.0


def test_a_line_that_was_cut_off_is_left_out_and_closed(clocks, tmp_path):
    path = tmp_path / "events.jsonl"
    Events(path, 0, clocks.monotonic).add("checkpoint", step=5, productive=1.0)
    with path.open("a") as file:
        file.write('{"event": "check')
    Events(path, 5, clocks.monotonic)
    assert [e["event"] for e in read_events(path)] == ["start", "checkpoint", "start"]
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5
    assert len(lines) == 4
