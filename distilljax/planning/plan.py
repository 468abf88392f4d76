"""``plan(config)``: compile the step of a config for devices that need not be there.

    found = plan(config, topology="v5p:4x4x8")
    found.fits, found.programs["step"].memory.peak

What is compiled is the step that `train` runs, with its optimizer, its accumulation and
its teacher. That proves that it compiles, what it needs of each device's memory, and
what it sends; how long it takes is an estimate of a roofline, and no measurement.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from distilljax.config import Config
from distilljax.planning.abstract import AbstractRun, abstract_run
from distilljax.planning.collectives import Collective, by_kind, by_part, collectives
from distilljax.planning.flops import Flops, has_head, step_flops
from distilljax.planning.hlo import Program
from distilljax.planning.memory import (
    Memory,
    device_bytes,
    known_owners,
    memory_of,
)
from distilljax.planning.roofline import Roofline, roofline
from distilljax.planning.topology import LOCAL, Topology, open_topology
from distilljax.planning.traffic import memory_traffic
from distilljax.workdir import today, versions

FORMAT = 1


@dataclass(frozen=True)
class ProgramPlan:
    """What is known of one compiled program, on one device."""

    mesh: dict[str, int]
    owners: dict[str, int]
    """Bytes that are known without compiling: what the program is called with."""
    limit: int | None
    """Bytes of a device's memory; None if not known."""
    memory: Memory | None = None
    """None if it does not fit: the compiler then gives no program."""
    needs: int | None = None
    """What the compiler says it needs, if it does not fit; None if it does not say."""
    sent: tuple[Collective, ...] = ()
    traffic: int = 0
    """Bytes to and from memory in a step."""
    roofline: Roofline | None = None
    compile_seconds: float = 0.0
    text: str = ""
    """The compiled program, as XLA writes it."""
    unnamed: str = "other"
    """The part to which belongs what it sends and no scope names: "teacher" in a
    program that is the teacher's alone."""

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None if the memory of a device is not known."""
        if self.memory is None:
            return False
        return None if self.limit is None else self.memory.allocated <= self.limit

    @property
    def headroom(self) -> int | None:
        """Bytes that are left of a device; negative if it does not fit."""
        used = self.needs if self.memory is None else self.memory.allocated
        return None if self.limit is None or used is None else self.limit - used

    @property
    def sent_by_part(self) -> dict[str, int]:
        """Bytes that a device sends in a step, by what they are for."""
        return by_part(self.sent, self.unnamed)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "mesh": self.mesh,
            "fits": self.fits,
            "limit": self.limit,
            "headroom": self.headroom,
            "owners": self.owners,
            "needs": self.needs,
            "memory": self.memory and self.memory.to_json(),
            "collectives": by_kind(self.sent),
            "sent_by_part": self.sent_by_part,
            "traffic": self.traffic,
            "roofline": self.roofline and self.roofline.to_json(),
            "compile_seconds": round(self.compile_seconds, 1),
        }


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its programs, and what they come to together."""

    name: str
    topology: Topology
    batch: dict[str, Any]
    """`examples`, `tokens` per step, and `accumulate`."""
    flops: Flops
    programs: Mapping[str, ProgramPlan]
    """"step"; of a teacher with a program of its own also "teacher"."""
    has_head: bool = False
    """Whether the student's logits are a `LinearHead`, whose loss is made in chunks."""

    @property
    def fits(self) -> bool | None:
        """Whether all programs fit; None if the memory of a device is not known."""
        found = {program.fits for program in self.programs.values()}
        if False in found:
            return False
        return None if None in found else True

    @property
    def seconds(self) -> tuple[float, float] | None:
        """A step's roofline: if everything overlaps, and if nothing does.

        Of a streamed teacher, the slower of the two programs.
        """
        found = [program.roofline for program in self.programs.values()]
        if not found or any(one is None for one in found):
            return None
        known = [one for one in found if one is not None]
        return max(r.at_least for r in known), max(r.at_most for r in known)

    def to_json(self) -> dict[str, Any]:
        """All of it, with versions and date."""
        chip = self.topology.chip
        return {
            "format": FORMAT,
            "name": self.name,
            "date": today(),
            "versions": versions() | compiler_version(),
            "topology": self.topology.name,
            "num_devices": len(self.topology.devices),
            "chip": chip and {"name": chip.name, "source": chip.source},
            "batch": self.batch,
            "flops": self.flops.to_json(),
            "fits": self.fits,
            "seconds": self.seconds,
            "balance": balance(self.programs),
            "programs": {n: p.to_json() for n, p in self.programs.items()},
        }


def plan(config: Config, topology: str | Topology = LOCAL) -> Plan:
    """Compile the step of a config for a topology, and read what was compiled.

    Args:
      config: What would be trained; `mesh` and batch size are its own.
      topology: A name as `open_topology` takes it, or what that returned.

    Returns:
      The plan. A program that does not fit is one whose `fits` is False; where the
      memory of a device is not known, as on a CPU, it is None.

    Raises:
      ValueError: The config does not divide over the devices, or cannot be planned.

    Example:
      >>> import tempfile
      >>> from distilljax import data, models, objectives
      >>> folder = tempfile.TemporaryDirectory()
      >>> config = Config(
      ...     name="example",
      ...     student=models.MLP(num_features=64, hidden=(32,), num_classes=10),
      ...     objective=objectives.CrossEntropy(),
      ...     data=data.Tfds("digits", "train", data_dir=folder.name),
      ...     loader=data.Loader(batch_size=128, scale=16.0),
      ...     steps=1,
      ... )
      >>> found = plan(config)
      >>> found.flops.student    # 3 * 2 * 128 * (64 * 32 + 32 * 10)
      1818624
      >>> found.fits is None, found.programs["step"].memory.allocated > 10_000
      (True, True)
      >>> folder.cleanup()
    """
    if isinstance(topology, str):
        topology = open_topology(topology)
    run = abstract_run(config, topology)
    flops = step_flops(run)
    programs: dict[str, ProgramPlan] = {}
    model = flops.model if run.streamed is None else flops.student
    programs["step"] = _compiled(
        run.lower,
        run.mesh,
        topology,
        known_owners(run),
        flops.executed,
        model,
        run.training.like.params,
    )
    if run.streamed is not None:
        for name, lowered in run.streamed.lower(run.batch).items():
            part = run.streamed.parts[name]
            key = "teacher" if name is None else f"teacher {name}"
            own = {
                "teacher parameters": device_bytes(part.state),
                "batch": device_bytes(run.batch),
            }
            programs[key] = _compiled(
                lambda lowered=lowered: lowered,
                part.mesh,
                topology,
                own,
                flops.teacher / len(run.streamed.parts),
                flops.teacher / len(run.streamed.parts),
                unnamed="teacher",
            )
    return Plan(config.name, topology, _batch(run), flops, programs, has_head(run))


def _batch(run: AbstractRun) -> dict[str, Any]:
    tokens = run.batch.get("tokens")
    leaf = next(iter(jax.tree.leaves(run.batch)))
    return {
        "examples": leaf.shape[0],
        "tokens": None if tokens is None else prod(tokens.shape),
        "context": None if tokens is None else tokens.shape[1],
        "accumulate": run.config.accumulate,
    }


def _compiled(
    lower: Any,
    mesh: Any,
    topology: Topology,
    owners: dict[str, int],
    executed: float,
    model: float,
    params: Any = None,
    unnamed: str = "other",
) -> ProgramPlan:
    """Compile one program; what does not fit is an answer."""
    start = time.perf_counter()
    shape = {axis: size for axis, size in mesh.shape.items() if size > 1}
    known: dict[str, Any] = {
        "mesh": shape or {"data": 1},
        "owners": owners,
        "limit": topology.memory_bytes,
    }
    try:
        with jax.set_mesh(mesh):
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error):
            raise  # a kernel that does not fit on the chip is nobody's memory
        used, limit = _needs(str(error), sum(owners.values()))
        return ProgramPlan(
            **{**known, "limit": limit or topology.memory_bytes},
            needs=used,
            compile_seconds=time.perf_counter() - start,
        )
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    program = Program(text)
    sent, traffic = collectives(program, mesh), memory_traffic(program)
    return ProgramPlan(
        **known,
        memory=memory_of(
            compiled, program, owners, params, has_peak=topology.chip is not None
        ),
        sent=tuple(sent),
        traffic=traffic,
        roofline=roofline(
            topology, mesh, executed=executed, model=model, traffic=traffic, sent=sent
        ),
        compile_seconds=seconds,
        text=text,
        unnamed=unnamed,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _needs(message: str, arguments: int) -> tuple[int | None, int | None]:
    """What a program would use of how much, as the compiler refuses it.

    Args:
      message: The compiler's.
      arguments: Bytes that the program is called with, for a message that leaves them
        out.

    Example:
      >>> _needs("Ran out of memory in memory space hbm. Used 3.00G of 2.00G hbm.", 0)
      (3221225472, 2147483648)
      >>> _needs("memory required for HLO temporaries (3.00G) exceeds available HBM "
      ...        "(2.00G).", 2**30)
      (4294967296, 2147483648)
    """
    size = r"([\d.]+)([KMGT]?)"
    for pattern, more in (
        (rf"[Uu]sed {size} of {size} hbm", 0),
        (rf"temporaries \({size}\) exceeds available HBM \({size}\)", arguments),
    ):
        if found := re.search(pattern, message):
            used, unit, limit, of = found.groups()
            return int(float(used) * _UNITS[unit]) + more, int(
                float(limit) * _UNITS[of]
            )
    return None, None


def balance(programs: Mapping[str, ProgramPlan]) -> dict[str, Any] | None:
    """How the time of a streamed teacher compares with that of the student's step.

    Returns:
      `teacher_to_student`, the ratio of their rooflines, and `devices`, how many of all
      the teacher would have if both took equally long, were they to scale; None where
      the teacher is part of the step.
    """
    teachers = [p for name, p in programs.items() if name != "step"]
    step = programs["step"]
    if not teachers or step.roofline is None:
        return None
    times = [p.roofline.at_least for p in teachers if p.roofline is not None]
    if len(times) < len(teachers):
        return None
    sizes = [prod(p.mesh.values()) for p in teachers]
    work = sum(t * n for t, n in zip(times, sizes, strict=True))
    own = step.roofline.at_least * prod(step.mesh.values())
    total = sum(sizes) + prod(step.mesh.values())
    return {
        "teacher_to_student": max(times) / step.roofline.at_least,
        "devices": round(total * work / (work + own)),
        "of": total,
    }


def compiler_version() -> dict[str, str]:
    """The version of the TPU's compiler, if it is installed."""
    from importlib import metadata

    try:
        return {"libtpu": metadata.version("libtpu")}
    except metadata.PackageNotFoundError:
        return {}
