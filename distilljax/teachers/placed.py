"""Which devices a config's teacher has: the student's, or its own.

    teacher=Placed(students.Pretrained("org/model"), mesh="tensor=4")

and on the command line ``--teacher.mesh=tensor=4``, ``--teacher.devices=4:8``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh

from distilljax._checks import check_count, check_instance, fail
from distilljax._functional import Forward, default_teacher_forward, shard_as_batch
from distilljax.sharding import Rule, batch_axes, mesh_from_string
from distilljax.terms import as_teacher, shard_outputs

ALL = "all"


@dataclass(frozen=True)
class Placed:
    """A teacher with a mesh that is not the student's.

    Three ways, by memory and devices: on devices of its own (the default), one step
    ahead of the student; with its own sharding on the student's devices, as a program
    of its own (``devices="all"``); or as part of the student's program (`in_step`).

    Example:
      >>> teacher = Placed(lambda mesh, rules: None, mesh="tensor=4", devices="4:8")
      >>> teacher.depth
      1
    """

    teacher: Any
    """What loads it: called with its mesh and rules, such as `students.Pretrained`."""
    mesh: str = "tensor=-1"
    """Its devices by axis, such as "tensor=4"; -1 takes what `devices` leaves it."""
    devices: str = ""
    """Which: "" for the last ones, as many as `mesh` says, of each process as many;
    "4:8" or "2:4,6:8" for slices of `jax.devices()`; "all" for the student's own. The
    student's mesh, such as "data=-1", has those that no teacher has."""
    depth: int = 1
    """How many batches it is ahead of the student; each has its outputs in memory."""
    in_step: bool = False
    """Whether it is part of the student's program, on the student's devices."""

    def __post_init__(self):
        check_instance("Placed", "teacher", self.teacher)
        check_count("Placed", "depth", self.depth)
        if self.in_step and self.devices not in ("", ALL):
            fail(
                "Placed",
                "devices",
                'be "all" for a teacher in the student\'s step',
                repr(self.devices),
                "One program has one set of devices: leave `devices` or `in_step` out.",
            )

    @property
    def has_own_devices(self) -> bool:
        """Whether the student cannot have its devices."""
        return not self.in_step and self.devices != ALL

    def __call__(self, mesh: Mesh | None = None, rules: Sequence[Rule] = ()) -> Any:
        """The teacher, on the mesh that is given."""
        return self.teacher(mesh, rules)


def placed_teachers(teacher: Any) -> dict[str | None, Placed]:
    """Those of `Config.teacher`, by name; under None if it is one; empty without.

    Raises:
      ValueError: Some of several teachers are placed, and others are not.
    """
    if isinstance(teacher, Placed):
        return {None: teacher}
    if not isinstance(teacher, Mapping):
        return {}
    found = {name: x for name, x in teacher.items() if isinstance(x, Placed)}
    if found and len(found) < len(teacher):
        fail(
            "train",
            "several teachers",
            "each be Placed, or none of them",
            f"{sorted(teacher.keys() - found.keys())} that are not",
            'Use Placed(teacher, devices="all") for one on the student\'s devices.',
        )
    if len({x.in_step for x in found.values()}) > 1:
        fail(
            "train",
            "several teachers",
            "all be part of the student's step, or none of them",
            {name: x.in_step for name, x in found.items()},
            "Change in_step.",
        )
    if len({x.mesh for x in found.values() if x.in_step}) > 1:
        fail(
            "train",
            "several teachers in the student's step",
            "have one mesh",
            {name: x.mesh for name, x in found.items()},
            'Give them one, or leave in_step out, with devices="all".',
        )
    return dict(found)


def unplaced(teacher: Any) -> Any:
    """The teacher of a config where nobody trains beside it: on the mesh that is given.

    Example:
      >>> unplaced(Placed(len)) is len, unplaced({"a": Placed(len)}) == {"a": len}
      (True, True)
    """
    parts = placed_teachers(teacher)
    if None in parts:
        return parts[None].teacher
    return {name: part.teacher for name, part in parts.items()} if parts else teacher


def beside(
    teacher: Any, mesh: str, devices: Sequence[Any] | None = None
) -> dict[str, Any]:
    """What of `mesh_from_string` the student's mesh needs besides its text.

    Args:
      teacher: That of the config.
      mesh: The student's mesh, of the config.
      devices: All devices; None: those of this machine.

    Returns:
      ``{"devices": ...}`` if a teacher has devices of its own; else nothing.
    """
    parts = placed_teachers(teacher)
    if not any(part.has_own_devices for part in parts.values()):
        return {}
    return {"devices": _divide(parts, mesh, devices)[0]}


def teacher_meshes(
    teacher: Any, text: str, mesh: Mesh, devices: Sequence[Any] | None = None
) -> dict[str | None, Mesh]:
    """The mesh of each placed teacher of a config, by name.

    Args:
      teacher: That of the config.
      text: The student's mesh, of the config.
      mesh: The same, made.
      devices: All devices; None: those of this machine.
    """
    parts = placed_teachers(teacher)
    if not parts:
        return {}
    _, own = _divide(parts, text, devices) if _any_own(parts) else ([], {})
    students = list(mesh.devices.flat)
    return {
        name: mesh_from_string(part.mesh, own.get(name, students))
        for name, part in parts.items()
    }


def within(mesh: Mesh, forward: Forward | None) -> Forward:
    """A forward that is traced as on another mesh of the same devices."""
    forward = forward or default_teacher_forward

    def on_its_mesh(model: Any, batch: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            # else the compiler splits its pass as the student's, and gathers for that
            batch = shard_as_batch(batch, batch_axes(mesh))
            return shard_outputs(as_teacher(forward(model, batch)), batch_axes(mesh))

    return on_its_mesh


def _any_own(parts: Mapping[str | None, Placed]) -> bool:
    return any(part.has_own_devices for part in parts.values())


def _divide(
    parts: Mapping[str | None, Placed],
    student: str,
    devices: Sequence[Any] | None = None,
) -> tuple[list[Any], dict[str | None, list[Any]]]:
    """The student's devices, and those of each teacher that has its own."""
    own: dict[str | None, list[Any]] = {}
    everything = list(jax.devices() if devices is None else devices)
    free = list(everything)
    named = {n: p for n, p in parts.items() if p.has_own_devices and p.devices}
    for name, part in named.items():
        own[name] = _slices(part.devices, everything)
        if any(device not in free for device in own[name]):
            fail(
                "train",
                f"{_field(name)}.devices",
                "name devices that no other teacher has",
                repr(part.devices),
                "Give each teacher a slice of its own.",
            )
        free = [device for device in free if device not in own[name]]
    unnamed = {n: p for n, p in parts.items() if p.has_own_devices and not p.devices}
    sizes = {name: _size(part.mesh) for name, part in unnamed.items()}
    for name, size in reversed(sizes.items()):
        if size is not None:
            own[name] = _last(free, size, name, unnamed[name].mesh)
            free = [device for device in free if device not in own[name]]
    for name, size in sizes.items():
        if size is None:
            own[name] = _remaining(free, name, student)
            free = [device for device in free if device not in own[name]]
    _check_student(free, student, len(everything))
    return free, own


def _remaining(free: list[Any], name: str | None, student: str) -> list[Any]:
    """What a student of a known size leaves to a teacher that takes the rest."""
    size = _size(student)
    if size is None or size >= len(free):
        fail(
            "train",
            f"{_field(name)}.mesh",
            "say how many devices are the teacher's, or --mesh how many the student's",
            f"-1 beside {student!r} of {len(free)} devices",
            'Write for example --teacher.mesh "tensor=4"; on the student\'s own '
            "devices, --teacher.in-step or --teacher.devices all.",
        )
    return _last(free, len(free) - size, name, student)


def _last(free: list[Any], size: int, name: str | None, mesh: str) -> list[Any]:
    """The last devices, of each process as many, if they divide."""
    by_process: dict[int, list[Any]] = {}
    for device in free:
        by_process.setdefault(device.process_index, []).append(device)
    each, over = divmod(size, len(by_process) or 1)
    if over or any(len(own) <= each for own in by_process.values()):
        processes = f" of {len(by_process)} processes" if len(by_process) > 1 else ""
        fail(
            "train",
            f"{_field(name)}.mesh",
            "leave devices to the student, and have as many of each process",
            f"{mesh!r} where {len(free)} devices{processes} are free",
            "Make it smaller; or put the teacher on the student's devices, with "
            "--teacher.in-step or --teacher.devices all.",
        )
    return [device for own in by_process.values() for device in own[-each:]]


def _check_student(free: list[Any], student: str, count: int) -> None:
    size = _size(student)
    if not free or size not in (None, len(free)):
        fail(
            "train",
            "--mesh",
            f"use the devices that no teacher has, {len(free)} of {count}",
            repr(student),
            'Use "data=-1", or change the devices of the teacher: none may be idle.',
        )


def _size(mesh: str) -> int | None:
    """How many devices a mesh has; None if it takes what remains."""
    sizes = [int(size) for size in re.findall(r"=\s*(-?\d+)", mesh)]
    return None if -1 in sizes else prod(sizes)


def _slices(text: str, devices: list[Any]) -> list[Any]:
    """Devices by slices of `jax.devices()`, such as "4:8" or "2:4,6:8"."""
    found: list[Any] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d*):(-?\d*)(?::(\d+))?\s*", part)
        chosen: list[Any] = []
        if match is not None and match[3] != "0":
            ends: list[int | None] = [int(x) if x else None for x in match.groups()]
            chosen = devices[slice(*ends)]
        if not chosen or any(device in found for device in chosen):
            fail(
                "train",
                "--teacher.devices",
                f"be slices of the {len(devices)} devices that do not overlap",
                repr(text),
                'Write "4:8" or "2:4,6:8"; "all" is the student\'s own, and "" as many '
                "as --teacher.mesh says.",
            )
        found += chosen
    return found


def _field(name: str | None) -> str:
    return "--teacher" if name is None else f"--teacher.{name}"


__all__ = [
    "Placed",
    "beside",
    "placed_teachers",
    "teacher_meshes",
    "unplaced",
    "within",
]
