"""What a compiled program sends between devices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distilljax.planning.hlo import Instruction, Program, Shape

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


@dataclass(frozen=True)
class Collective:
    """One instruction by which devices exchange arrays."""

    kind: str
    """As XLA calls it, such as "all-gather"."""
    shapes: tuple[Shape, ...]
    """Of its result on one device."""
    group_size: int
    """How many devices exchange with each other."""
    axes: tuple[str, ...]
    """The axes of the mesh along which they lie."""
    times: int
    """How often it runs in a step."""
    op_name: str
    """Where in the traced step it is from."""

    @property
    def nbytes(self) -> int:
        """What one device sends each time, by the best algorithm on a ring."""
        n = max(self.group_size, 1)
        size = sum(shape.nbytes for shape in self.shapes)
        if self.kind == "all-reduce":
            return 2 * size * (n - 1) // n
        if self.kind == "reduce-scatter":
            return size * (n - 1)
        if self.kind in ("collective-permute", "collective-broadcast"):
            return size
        return size * (n - 1) // n

    @property
    def bytes_per_step(self) -> int:
        """What one device sends in a step."""
        return self.nbytes * self.times


def collectives(program: Program, mesh: Any) -> list[Collective]:
    """All collectives of a program, the one that sends the most first.

    Args:
      program: A compiled program.
      mesh: Its mesh: groups are named by the axes along which they lie.
    """
    found = []
    for inside, instruction, times in program.executed_in():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or instruction.opcode.endswith("-done"):
            continue
        shapes = _result(instruction, kind)
        if kind == "all-reduce" and "all-reduce-scatter" in inside:
            # as libtpu writes one: each device keeps its share of the sum
            kind, shapes = "reduce-scatter", program.computations[inside].root.shapes
        groups = _first_group(instruction)
        size = len(groups) if groups else mesh.size
        found.append(
            Collective(
                kind,
                shapes,
                size,
                _axes(groups, mesh),
                times,
                instruction.op_name,
            )
        )
    return sorted(found, key=lambda c: -c.bytes_per_step)


def by_kind(found: Iterable[Collective]) -> dict[str, dict[str, Any]]:
    """Count and bytes per step of each kind along each set of axes.

    Returns:
      By "kind over axes": `instructions`, `times` per step, `bytes_per_step`.
    """
    table: dict[str, dict[str, Any]] = {}
    for one in found:
        name = f"{one.kind} over {','.join(one.axes) or 'one device'}"
        row = table.setdefault(
            name, {"instructions": 0, "times": 0, "bytes_per_step": 0}
        )
        row["instructions"] += 1
        row["times"] += one.times
        row["bytes_per_step"] += one.bytes_per_step
    return dict(sorted(table.items(), key=lambda kv: -kv[1]["bytes_per_step"]))


# The scopes of a step; an operation of XLA's own has no name. Where a gradient is
# taken a scope is in brackets, `jvp(teacher)`; where none is, between slashes.
PARTS = {"teacher": "teacher", "student": "student", "loss": "fused_loss"}


def by_part(found: Iterable[Collective], unnamed: str = "other") -> dict[str, int]:
    """Bytes per step of the teacher, the student, the loss over heads, and others.

    Args:
      found: Of one program.
      unnamed: The part to which belongs what is in no scope.
    """
    total = dict.fromkeys([*PARTS, "other"], 0)
    for one in found:
        scopes = re.split(r"[/()]", one.op_name)
        parts = (part for part, scope in PARTS.items() if scope in scopes)
        total[next(parts, unnamed)] += one.bytes_per_step
    return total


def _result(instruction: Instruction, kind: str) -> tuple[Shape, ...]:
    """The shapes that arrive: an asynchronous one has its operands before them."""
    shapes = instruction.shapes
    if not instruction.opcode.endswith("-start"):
        return shapes
    if kind == "collective-permute":
        return shapes[1:2]  # operand, result, and two words of context
    if kind == "all-reduce":
        return shapes
    arrays = [shape for shape in shapes if shape.dims or shape.dtype not in ("u32",)]
    return tuple(arrays[len(arrays) // 2 :])


def _first_group(instruction: Instruction) -> list[int]:
    """The devices of one group; of a permutation, one that sends and who receives."""
    text = instruction.attributes
    if match := re.search(r"source_target_pairs=\{(\{[^=]*\})\}", text):
        pairs = re.findall(r"\{(\d+),(\d+)\}", match[1])
        apart = [(int(a), int(b)) for a, b in pairs if a != b]
        return sorted(apart[0]) if apart else []
    if match := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ):
        sizes = [int(n) for n in match[3].split(",")]
        order = np.arange(np.prod(sizes)).reshape(sizes)
        if match[4]:
            order = order.transpose([int(n) for n in match[4].split(",")])
        return order.reshape(int(match[1]), int(match[2]))[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        names, among = list(sizes), re.findall(r"'(\w+)'", match[2])
        order = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        index = tuple(slice(None) if name in among else 0 for name in names)
        return order[index].ravel().tolist()
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(n) for n in match[1].split(",")]
    return []


def _axes(group: Sequence[int], mesh: Any) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    names = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)
    if not group:
        return names
    sizes = [mesh.shape[name] for name in mesh.axis_names]
    places = np.array(np.unravel_index(np.asarray(group), sizes))
    return tuple(
        name
        for name, along in zip(mesh.axis_names, places, strict=True)
        if len(set(along.tolist())) > 1
    )
