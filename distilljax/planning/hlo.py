"""Reading a compiled program: its instructions, and how often each of them runs.

    program = Program(compiled.as_text())
    for instruction, times in program.executed(): ...

The text is that of XLA after all its passes, for one device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16,
    "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
    "c64": 64, "c128": 128, "s2": 2, "u2": 2, "token": 0, "opaque": 0,
}  # fmt: skip
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
# Iterations of a loop whose number is not known when it is compiled.
UNKNOWN_TRIPS = 1


@dataclass(frozen=True)
class Shape:
    """One array of one device."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False
    """Whether it lies in the chip's own fast memory, and not in HBM."""
    padded: int = 0
    """Values with what its layout pads."""

    @property
    def size(self) -> int:
        """How many values it has."""
        return prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Without what its layout pads."""
        bits = 8 if self.dtype.startswith("f8") else _BITS.get(self.dtype, 32)
        return (self.size * bits + 7) // 8

    @property
    def allocated(self) -> int:
        """Bytes with what its layout pads."""
        return self.nbytes * self.padded // max(self.size, 1)

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of its result; of a tuple, of its parts."""
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False
    parts: tuple[int, ...] = (1,)
    """How many arrays each part of its result has; one part if it is no tuple."""

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """The computations that it runs, by how."""
        found: dict[str, list[str]] = {}
        for how, names in _CALLED.findall(self.attributes):
            found.setdefault(how, []).extend(re.findall(r"[\w.\-]+", names))
        return found

    @property
    def op_name(self) -> str:
        """Where in the traced function it is from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def nbytes(self) -> int:
        """Of its result."""
        return sum(shape.nbytes for shape in self.shapes)


@dataclass(frozen=True)
class Computation:
    """A function of a program."""

    name: str
    is_entry: bool
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions.values() if i.is_root)

    def parameters(self) -> list[Instruction]:
        """Its parameters, in order."""
        found = {
            int(i.operands[0]): i
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }
        return [found[number] for number in sorted(found)]


class Program:
    """A compiled program, parsed.

    Args:
      text: `compiled.as_text()`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def five(x):
      ...     return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=5)[0]
      >>> program = Program(jax.jit(five).lower(jnp.ones(3)).compile().as_text())
      >>> max(times for _, times in program.executed())
      5
    """

    def __init__(self, text: str):
        self.header = text[: text.find("\n") + 1]
        self.computations = _parse(text)
        entry = next((c for c in self.computations.values() if c.is_entry), None)
        if entry is None:
            raise ValueError(
                "Program: text must be that of a compiled program, with an ENTRY, got "
                f"{text[:80]!r}. Pass compiled.as_text()."
            )
        self.entry = entry

    @cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one call of the program."""
        times: dict[str, int] = {}

        def visit(computation: Computation, factor: int) -> None:
            times[computation.name] = times.get(computation.name, 0) + factor
            for instruction in computation.instructions.values():
                trips = 1
                if instruction.opcode == "while":
                    trips = self.trips(computation, instruction)
                for how, names in instruction.called.items():
                    if how == "to_apply" and instruction.opcode != "call":
                        continue  # applied to single values: its cost is the caller's
                    for name in names:
                        if name in self.computations:
                            visit(self.computations[name], factor * trips)

        visit(self.entry, 1)
        return times

    @cached_property
    def inside_fusions(self) -> frozenset[str]:
        """Computations that run within one kernel: what is in them is in no memory."""
        found: set[str] = set()
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                if instruction.opcode == "fusion":
                    found.update(instruction.called.get("calls", ()))
        return frozenset(found)

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs, with how often it does."""
        for _, instruction, times in self.executed_in():
            yield instruction, times

    def executed_in(self) -> Iterator[tuple[str, Instruction, int]]:
        """The same, after the name of the computation that it is in."""
        for name, times in self.times.items():
            for instruction in self.computations[name].instructions.values():
                yield name, instruction, times

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """How often a loop's body runs."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called["condition"][0]]
        root = condition.root
        if root.opcode != "compare" or len(root.operands) != 2:
            return UNKNOWN_TRIPS
        sides = [condition.instructions.get(name) for name in root.operands]
        limits = [_constant(side) for side in sides]
        direction = re.search(r"direction=(\w+)", root.attributes)
        if limits[1] is None or sides[0] is None or sides[0].opcode != TUPLE_PART:
            return UNKNOWN_TRIPS
        index = _tuple_index(sides[0])
        start, step = self._start_and_step(computation, loop, index)
        limit = limits[1] + (direction is not None and direction[1] == "LE")
        return max(0, -(-(limit - start) // step))

    def _start_and_step(
        self, computation: Computation, loop: Instruction, index: int
    ) -> tuple[int, int]:
        """Where the counter of a loop begins and by how much it grows; 0 and 1."""
        start, step = 0, 1
        before = computation.instructions.get(loop.operands[0])
        if before is not None and before.opcode == "tuple":
            value = computation.instructions.get(before.operands[index])
            while value is not None and value.opcode in ("copy", "bitcast"):
                value = computation.instructions.get(value.operands[0])
            start = _constant(value) or 0
        body = self.computations[loop.called["body"][0]]
        if body.root.opcode == "tuple":
            grown = body.instructions.get(body.root.operands[index])
            if grown is not None and grown.opcode == "add":
                by = [_constant(body.instructions.get(o)) for o in grown.operands]
                step = next((x for x in by if x), 1)
        return start, step


TUPLE_PART = "get-tuple-element"


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    text = instruction.operands[0] if instruction.operands else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _tuple_index(instruction: Instruction) -> int:
    match = re.search(r"index=(\d+)", instruction.attributes)
    return int(match[1]) if match else 0


def shapes_in(text: str) -> tuple[Shape, ...]:
    """All arrays of a type, such as `(f32[2,3]{1,0}, s32[])`.

    Example:
      >>> [str(shape) for shape in shapes_in("(f32[2,3]{1,0:T(8,128)S(1)}, s32[])")]
      ['f32[2,3]', 's32[]']
    """
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, "S(1)" in layout, _padded(sizes, layout)))
    return tuple(found)


def _padded(sizes: tuple[int, ...], layout: str) -> int:
    """Values of an array whose minor axes are whole tiles, such as `{1,0:T(8,128)}`.

    Example:
      >>> _padded((3, 100), "{1,0:T(8,128)}")     # 8 x 128
      1024
    """
    tile = re.search(r":T\(([\d,]+)\)", layout)
    order = re.match(r"\{([\d,]*)", layout)
    if tile is None or order is None or not sizes:
        return prod(sizes)
    minor = [int(n) for n in order[1].split(",") if n]
    blocks = [int(n) for n in tile[1].split(",")]
    full = list(sizes)
    for axis, block in zip(minor, reversed(blocks), strict=False):
        full[axis] = -(-full[axis] // block) * block
    return prod(full)


def _parse(text: str) -> dict[str, Computation]:
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if not line or line.startswith(("HloModule", "//", "#")):
            continue
        if not line.startswith(" "):
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head:
                current = Computation(head[2], is_entry=bool(head[1]))
                computations[current.name] = current
            continue
        if current is not None and (found := _instruction(line.strip())):
            current.instructions[found.name] = found
    return computations


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.partition(" = ")
    if not equals:
        return None
    is_root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    type_, rest = right[:end], right[end:].strip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    return Instruction(
        name,
        opcode,
        shapes_in(type_),
        tuple(_operands(inside)),
        rest[close + 1 :],
        is_root,
        _parts(type_),
    )


def _parts(type_: str) -> tuple[int, ...]:
    """How many arrays each part of a tuple type has.

    Example:
      >>> _parts("(f32[2], (s32[], u32[]), pred[])"), _parts("f32[2]{0}")
      ((1, 2, 1), (1,))
    """
    if not type_.startswith("("):
        return (1,)
    depth, counts, start = 0, [], 1
    for at, letter in enumerate(type_):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 or (depth == 1 and letter == ","):
            counts.append(len(_SHAPE.findall(type_[start:at])))
            start = at + 1
    return tuple(counts)


def _operands(text: str) -> list[str]:
    """Names without types: `f32[2]{0} %a, %b` is a and b; of a constant, its value."""
    names = re.findall(r"%([\w.\-]+)", text)
    return names or ([text.strip()] if text.strip() else [])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text) - 1
