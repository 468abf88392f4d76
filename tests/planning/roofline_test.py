"""The roofline by hand, and the order of what a search has compiled."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from distilljax.chips import CHIPS
from distilljax.planning.collectives import Collective
from distilljax.planning.hlo import Shape
from distilljax.planning.plan import ProgramPlan, balance
from distilljax.planning.roofline import num_links, roofline
from distilljax.planning.search import _rank
from distilljax.planning.topology import Topology


def mesh_of(sizes: dict[str, int], places: list[tuple[int, int, int]]):
    devices = np.empty(len(places), object)
    devices[:] = [SimpleNamespace(coords=place) for place in places]
    return SimpleNamespace(
        devices=devices.reshape(*sizes.values()),
        axis_names=tuple(sizes),
        size=len(places),
    )


CUBE = [(x, y, z) for x in range(2) for y in range(2) for z in range(2)]


def test_a_group_uses_both_links_of_each_dimension_it_spreads_over():
    mesh = mesh_of({"data": 2, "fsdp": 4}, CUBE)
    assert num_links(mesh, ("data",), 3) == 2  # along x
    assert num_links(mesh, ("fsdp",), 3) == 4  # over y and z
    assert num_links(mesh, ("data", "fsdp"), 3) == 6
    assert num_links(mesh, ("data", "fsdp"), 0) == 1  # one port of a switch


@pytest.mark.parametrize(("generation", "cores"), [("v5p", 1), ("tpu7x", 2)])
def test_each_part_is_what_the_chips_figures_say(generation, cores):
    """1e15 operations, 1 GB moved, 7/8 of 8 MB gathered over all three dimensions."""
    chip = CHIPS[generation]
    mesh = mesh_of({"fsdp": 8}, CUBE)
    topology = Topology("x", tuple(mesh.devices), chip, devices_per_chip=cores)
    shape = Shape("f32", (2_000_000,))
    gather = Collective("all-gather", (shape,), 8, ("fsdp",), times=3, op_name="x")
    found = roofline(
        topology, mesh, executed=8e15, model=4e15, traffic=1e9, sent=[gather]
    )
    assert found is not None
    assert found.compute == pytest.approx(1e15 / (chip.peak_flops / cores))
    assert found.memory == pytest.approx(1e9 * cores / chip.memory_bytes_per_sec)
    sent = 3 * 8e6 * 7 / 8
    assert gather.bytes_per_step == sent
    expected = sent * cores / (6 * chip.link_bytes_per_sec)
    assert found.interconnect == pytest.approx(expected)
    assert found.bound_by == "compute"
    assert found.mfu[1] == pytest.approx(0.5)
    assert found.mfu[0] < 0.5


def test_a_chip_that_is_not_known_has_no_roofline():
    mesh = mesh_of({"fsdp": 8}, CUBE)
    topology = Topology("cpu", tuple(mesh.devices), None)
    figures = {"executed": 1.0, "model": 1.0, "traffic": 1.0}
    assert roofline(topology, mesh, sent=[], **figures) is None


def test_what_fits_comes_first_then_what_is_faster_then_what_is_smaller():
    def row(name, fits, seconds, allocated):
        return {"name": name, "fits": fits, "seconds": seconds, "allocated": allocated}

    rows = [
        row("does not fit", False, (1.0, 2.0), 9),
        row("not known", None, None, 1),
        row("slow", True, (10.0, 22.0), 1),
        row("fast and large", True, (10.0, 20.0), 5),
        row("fast and small", True, (10.0, 20.0), 4),
    ]
    order = [r["name"] for r in sorted(rows, key=_rank)]
    assert order == [
        "fast and small",
        "fast and large",
        "slow",
        "not known",
        "does not fit",
    ]


def test_a_teacher_that_takes_as_long_on_a_third_of_the_devices_is_in_balance():
    def part(seconds, devices):
        line = SimpleNamespace(at_least=seconds)
        return Mock(spec=ProgramPlan, roofline=line, mesh={"fsdp": devices})

    even = balance({"step": part(2.0, 8), "teacher": part(2.0, 4)})
    assert even == {"teacher_to_student": 1.0, "devices": 4, "of": 12}
    slow = balance({"step": part(1.0, 8), "teacher": part(4.0, 4)})
    assert slow == {"teacher_to_student": 4.0, "devices": 8, "of": 12}
    assert balance({"step": part(1.0, 8)}) is None
