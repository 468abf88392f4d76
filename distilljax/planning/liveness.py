"""What is in memory when most is: a compiled program, step by step in its schedule.

The compiler says how much a program needs; here is what it is for. The program is
walked in the order in which it runs, and each array counts from where it is written to
where it is read last. Arrays that share their place (a loop's, what is donated, what is
updated in place) count once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from distilljax.planning.hlo import (
    TUPLE_PART,
    Computation,
    Instruction,
    Program,
    Shape,
)

# Their result is their operand, or a part of it.
_ALIASES = {
    "bitcast", "opt-barrier", "while", "add-dependency", "copy-done", "domain",
    "async-update",
}  # fmt: skip
_CALLS = {"while", "conditional", "call", "async-start"}


@dataclass(frozen=True)
class Live:
    """One array that is in memory at the peak."""

    shape: Shape
    op_name: str
    """Where in the traced step it is from; of an argument, its name."""
    opcode: str = ""
    """Of the instruction that writes it."""

    @property
    def nbytes(self) -> int:
        """With what its layout pads."""
        return self.shape.allocated


@dataclass(frozen=True)
class Peak:
    """The moment at which most is in memory."""

    arguments: int
    """Bytes that the program is called with."""
    live: tuple[Live, ...] = ()
    """All else, the largest first."""

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return self.arguments + sum(one.nbytes for one in self.live)


def peak_of(program: Program) -> Peak:
    """What is in memory when most is.

    Args:
      program: A compiled program, whose text is in the order of its schedule.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.ones((256, 256))
      >>> def twice(x):
      ...     return jnp.sort(x, axis=0) @ jnp.sort(x, axis=1)
      >>> found = peak_of(Program(jax.jit(twice).lower(x).compile().as_text()))
      >>> found.nbytes // x.nbytes      # x, both sorted, and the product
      4
    """
    entry = program.entry
    arguments = sum(
        shape.allocated
        for parameter in entry.parameters()
        for shape in parameter.shapes
        if not shape.on_chip
    )
    live = _Walk(program).peak(entry, _donated(program))
    return Peak(arguments, tuple(sorted(live, key=lambda one: -one.nbytes)))


def _donated(program: Program) -> set[int]:
    """Which arrays of the result are written over arguments."""
    header = re.search(r"input_output_alias=\{(.*?) \}[,\n]", program.header)
    if header is None:
        return set()
    return {int(n) for n in re.findall(r"\{(\d*)\}: \(", header[1]) if n} or {0}


def _kind(shape: Shape) -> tuple[str, tuple[int, ...]]:
    """Type and axes, but for those of size 1: they say nothing of where values lie."""
    return shape.dtype, tuple(size for size in shape.dims if size > 1)


@dataclass
class _Buffer:
    live: Live
    counts: bool
    in_place: bool = False
    """Whether it may be written over an operand of its shape that is read last."""
    last: int = -1


@dataclass
class _Walk:
    """The walk; what a loop's body needs is found once."""

    program: Program
    _inside: dict[tuple[str, bool], list[Live]] = field(default_factory=dict)

    def inside(self, name: str, loop: bool) -> list[Live]:
        """What a computation that is called needs besides its arguments."""
        if (name, loop) not in self._inside:
            computation = self.program.computations[name]
            everything = set(range(sum(computation.root.parts)))
            self._inside[name, loop] = self.peak(computation, everything, loop)
        return self._inside[name, loop]

    def peak(
        self, computation: Computation, given: set[int], loop: bool = False
    ) -> list[Live]:
        """What is live at the peak of a computation; `given` results have a place."""
        schedule = list(computation.instructions.values())
        buffers, made = self._buffers(computation, schedule, given, loop)
        ends: dict[int, list[int]] = {}
        for number, buffer in enumerate(buffers):
            ends.setdefault(buffer.last, []).append(number)
        now: set[int] = set()
        total, most, found = 0, -1, ([], [])
        for at, instruction in enumerate(schedule):
            for number in made[at]:
                now.add(number)
                total += buffers[number].live.nbytes
            called = self._called(instruction)
            size = total + sum(one.nbytes for one in called)
            size -= self._written_over(at, made[at], buffers, ends, now)
            if size > most:
                most, found = size, (sorted(now), called)
            for number in ends.get(at, ()):
                if number in now:
                    now.remove(number)
                    total -= buffers[number].live.nbytes
        return [buffers[number].live for number in found[0]] + list(found[1])

    @staticmethod
    def _written_over(
        at: int,
        new: Sequence[int],
        buffers: Sequence[_Buffer],
        ends: dict[int, list[int]],
        now: set[int],
    ) -> int:
        """Bytes of what an instruction reads last, and may write its result over."""
        free = [
            _kind(buffers[number].live.shape)
            for number in ends.get(at, ())
            if number in now and number not in new
        ]
        total = 0
        for number in new:
            buffer = buffers[number]
            if buffer.in_place and (kind := _kind(buffer.live.shape)) in free:
                free.remove(kind)
                total += buffer.live.nbytes
        return total

    def _called(self, instruction: Instruction) -> list[Live]:
        """Of what an instruction runs, the computation that needs the most."""
        if instruction.opcode not in _CALLS:
            return []
        needs = [
            self.inside(name, loop=role == "body")
            for role, names in instruction.called.items()
            for name in names
            if name in self.program.computations
        ]
        return max(needs, key=lambda x: sum(one.nbytes for one in x), default=[])

    def _buffers(
        self,
        computation: Computation,
        schedule: Sequence[Instruction],
        given: set[int],
        loop: bool,
    ) -> tuple[list[_Buffer], list[list[int]]]:
        """All buffers of a computation, and which of them each instruction makes."""
        buffers: list[_Buffer] = []
        values: dict[str, list[int | None]] = {}
        made: list[list[int]] = []
        for at, instruction in enumerate(schedule):
            shared = list(self._shared(instruction, computation, values))
            new = []
            for index, shape in enumerate(instruction.shapes):
                if index < len(shared) and shared[index] is not None:
                    continue
                fresh = instruction.opcode not in ("parameter", "constant", "iota")
                counts = fresh and not shape.on_chip and instruction.opcode != "tuple"
                # value by value, as far as a kernel's kind tells
                in_place = "kind=kLoop" in instruction.attributes
                live = Live(shape, instruction.op_name, instruction.opcode)
                buffers.append(_Buffer(live, counts, in_place))
                shared[index : index + 1] = [len(buffers) - 1]
                if counts:
                    new.append(len(buffers) - 1)
            values[instruction.name] = shared
            made.append(new)
            read = [n for name in instruction.operands for n in values.get(name, ())]
            if instruction.opcode == TUPLE_PART:
                read = shared  # one part of a tuple, and not the others
            for number in read:
                if number is not None:
                    buffers[number].last = max(buffers[number].last, at)
            for number in new:
                buffers[number].last = max(buffers[number].last, at)
        end = len(schedule)
        for index, number in enumerate(values.get(computation.root.name, ())):
            if number is None:
                continue
            if index in given:
                buffers[number].counts = False
            buffers[number].last = end
        if loop:
            self._lent(values, computation, buffers, made)
        made = [[n for n in new if buffers[n].counts] for new in made]
        return buffers, made

    @staticmethod
    def _lent(
        values: dict[str, list[int | None]],
        computation: Computation,
        buffers: list[_Buffer],
        made: list[list[int]],
    ) -> None:
        """Let arrays of a loop's body lie where one of the loop's was read last.

        From there until the next value of it is written its place is free, and the
        compiler gives it to others that live in between.
        """
        (parameter,) = computation.parameters()
        when = {number: at for at, new in enumerate(made) for number in new}
        before, after = values[parameter.name], values.get(computation.root.name, ())
        for old, new in zip(before, after, strict=False):
            if old is None or new is None or old == new or new not in when:
                continue
            room, taken = buffers[old].live.nbytes, []
            inside = [
                (buffers[n].live.nbytes, n)
                for n, at in when.items()
                if buffers[n].counts and buffers[old].last < at
                and buffers[n].last < when[new]
            ]  # fmt: skip
            for size, number in sorted(inside, reverse=True):
                span = when[number], buffers[number].last
                free = all(span[1] < a or b < span[0] for a, b in taken)
                if size <= room and free:
                    taken.append(span)
                    buffers[number].counts = False

    def _shared(
        self,
        instruction: Instruction,
        computation: Computation,
        values: dict[str, list[int | None]],
    ) -> Iterator[int | None]:
        """The buffers of operands in which the result lies, array by array."""
        opcode, operands = instruction.opcode, instruction.operands
        first = values.get(operands[0], []) if operands else []
        if opcode == "tuple":
            for name in operands:
                yield from values.get(name, [None])
        elif opcode == TUPLE_PART:
            before = computation.instructions[operands[0]]
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])  # pyright: ignore
            start = sum(before.parts[:index])
            yield from first[start : start + len(instruction.shapes)]
        elif opcode in _ALIASES:
            yield from first[: len(instruction.shapes)]
        elif opcode.endswith("-done"):
            yield from self._arrived(instruction, computation, first)
        elif opcode == "copy-start":
            yield None  # the copy, which is before what is copied
            yield from first
        elif opcode.endswith("-start"):
            # operands, results, and words that say how far it is
            yield from first
        elif opcode == "dynamic-update-slice":
            yield first[0] if first else None
        elif opcode == "fusion":
            yield from self._updated(instruction, values)

    def _arrived(
        self,
        instruction: Instruction,
        computation: Computation,
        started: list[int | None],
    ) -> list[int | None]:
        """Of what an asynchronous operation holds, its results: the second half."""
        count = len(instruction.shapes)
        arrays = [
            number
            for number, shape in zip(
                started, computation.instructions[instruction.operands[0]].shapes,
                strict=False,
            )
            if shape.dims
        ]  # fmt: skip
        return arrays[len(arrays) - count :] if len(arrays) > count else arrays

    def _updated(
        self, instruction: Instruction, values: dict[str, list[int | None]]
    ) -> Iterator[int | None]:
        """Of a fusion, the results that are updates in place of operands."""
        called = self.program.computations[instruction.called["calls"][0]]
        root = called.root
        parts = [root]
        if root.opcode == "tuple":
            parts = [called.instructions[name] for name in root.operands]
        numbers = {p.name: n for n, p in enumerate(called.parameters())}
        for part in parts:
            while part.opcode in ("bitcast", "dynamic-update-slice"):
                part = called.instructions.get(part.operands[0], part)
                if part.opcode == "parameter":
                    break
            updates = part.opcode == "parameter" and part.name in numbers
            operand = instruction.operands[numbers[part.name]] if updates else ""
            held = values.get(operand, [])
            yield held[0] if len(held) == 1 else None
