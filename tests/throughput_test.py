from __future__ import annotations

import jax
import pytest

from distilljax.chips import CHIPS
from distilljax.throughput import Flops, Meter

RECORD = {"examples_per_second": 50.0, "loss": 1.0}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("distilljax.throughput.time.perf_counter", lambda: now[0])
    return now


def test_shares_are_of_all_the_time_and_productive_is_what_is_left(clock):
    meter = Meter(None, 1, "cpu")
    clock[0] += 3  # compiles
    with meter.spent("data"):
        clock[0] += 1
    meter.started()
    for _ in range(2):
        with meter.spent("data"):
            clock[0] += 1
        clock[0] += 2
    found = meter.rates(RECORD)
    shares = {k: x for k, x in found.items() if k.startswith("share_")}
    assert shares == pytest.approx(
        {"share_startup": 0.3, "share_data": 0.3, "share_step": 0.4}
    )
    assert meter.productive == 4
    with meter.spent("checkpoint"):
        clock[0] += 6
    clock[0] += 2
    assert meter.productive == 6
    found = meter.rates(RECORD)
    assert (found["share_checkpoint"], found["share_step"]) == (0.75, 0.25)
    assert meter.productive == 6


def test_before_the_first_step_nothing_is_productive(clock):
    meter = Meter(None, 1, "cpu")
    clock[0] += 10
    assert meter.productive == 0
    meter.started()
    assert meter.productive == 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS.keys())
def test_mfu_is_of_all_chips(clock, chip):
    meter = Meter(Flops(1e12, 3e12), 4, chip.kinds[0])
    clock[0] += 1
    found = meter.rates({**RECORD, "tokens_per_second": 6400.0})
    assert found["tokens_per_second_per_chip"] == 1600
    assert "examples_per_second_per_chip" not in found
    assert found["flops_per_second_per_chip"] == 4e12 * 50 / 4
    assert found["mfu"] == pytest.approx(
        4e12 * 50 / 4 / (chip.peak_flops / chip.devices)
    )


def test_of_an_unknown_chip_there_is_no_mfu(clock):
    found = Meter(Flops(0, 3e12), 1, "cpu").rates(RECORD)
    assert found["flops_per_second_per_chip"] == 150e12
    assert found["examples_per_second_per_chip"] == 50
    assert "mfu" not in found
    assert "memory_peak_bytes" not in found


def test_the_memory_is_that_of_the_fullest_device(clock, monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": 5}), Device({"peak_bytes_in_use": 9})]
    monkeypatch.setattr(jax, "local_devices", lambda: [*devices, Device(None)])
    assert Meter(None, 1, "cpu").rates(RECORD)["memory_peak_bytes"] == 9
