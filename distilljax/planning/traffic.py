"""What a compiled program moves between the chip and its memory, as its text says."""

from __future__ import annotations

from collections.abc import Iterator

from distilljax.planning.hlo import Computation, Instruction, Program, Shape

# They name arrays, and move none.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
    "conditional", "call", "after-all", "partition-id", "replica-id", "opt-barrier",
    "async-update", "async-done", "add-dependency", "domain",
}  # fmt: skip
# They read of their first operand no more than they return.
_PARTS = {"dynamic-slice", "slice", "gather"}


def memory_traffic(program: Program) -> int:
    """Bytes that one device reads from and writes to its HBM in a step.

    Every kernel reads its operands and writes its result once, unless they lie in fast
    memory; of a slice, what is sliced. A kernel that reads an array several times, as
    tiles of a product do, is counted once: what is returned is a lower bound.

    Args:
      program: A compiled program.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.ones((256, 256))
      >>> text = jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile().as_text()
      >>> memory_traffic(Program(text)) == 2 * x.nbytes      # read, and written
      True
    """
    total = 0
    for name, times in program.times.items():
        if name in program.inside_fusions:
            continue
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            total += times * _of(instruction, computation, program)
    return total


def _of(instruction: Instruction, inside: Computation, program: Program) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "dynamic-update-slice":
        update = inside.instructions.get(instruction.operands[1])
        return 0 if update is None else 2 * _in_memory(update.shapes)
    if opcode in _PARTS:
        return 2 * _in_memory(instruction.shapes)
    if opcode == "fusion":
        called = program.computations.get(instruction.called["calls"][0])
        if called is not None:
            return _of_fusion(instruction, inside, called)
    if opcode.endswith("-start"):
        return _started(instruction, inside)
    read = 0
    for name in instruction.operands:
        operand = inside.instructions.get(name)
        read += 0 if operand is None else _in_memory(operand.shapes)
    return read + _in_memory(instruction.shapes)


def _started(instruction: Instruction, inside: Computation) -> int:
    """What an asynchronous operation reads and writes: its result has both in it."""
    operands = [inside.instructions.get(name) for name in instruction.operands]
    read = [shape for one in operands if one is not None for shape in one.shapes]
    arrays = [shape for shape in instruction.shapes if shape.dims]
    if instruction.opcode == "copy-start":
        written = arrays[:1]  # the destination is before the operand
    elif instruction.opcode == "all-reduce-start":
        written = arrays
    else:
        written = arrays[len(read) :]
    return _in_memory(tuple(read)) + _in_memory(tuple(written))


def _of_fusion(
    instruction: Instruction, inside: Computation, called: Computation
) -> int:
    """What a fusion reads of its operands, which may be slices, and what it writes."""
    total = 0
    for name, parameter in zip(instruction.operands, called.parameters(), strict=False):
        operand = inside.instructions.get(name)
        if operand is None or not _in_memory(operand.shapes):
            continue
        users = list(_users(parameter, called))
        sliced = users and all(
            (one.opcode in _PARTS and name == one.operands[0]) or _updates(one, name)
            for one, name in users
        )
        if sliced:
            total += sum(_touched(one, called) for one, _ in users)
        else:
            total += _in_memory(operand.shapes)
    root = called.root
    parts = [root]
    if root.opcode == "tuple":
        parts = [called.instructions[name] for name in root.operands]
    for part, shape in zip(parts, instruction.shapes, strict=False):
        while part.opcode == "bitcast" and part.operands[0] in called.instructions:
            part = called.instructions[part.operands[0]]
        if not shape.on_chip:
            written = part.opcode == "dynamic-update-slice"
            total += _touched(part, called) if written else shape.nbytes
    return total


def _users(one: Instruction, called: Computation) -> Iterator[tuple[Instruction, str]]:
    """Who reads a value, under another name too: a bitcast moves nothing."""
    for other in called.instructions.values():
        if one.name in other.operands:
            if other.opcode == "bitcast":
                yield from _users(other, called)
            else:
                yield other, one.name


def _updates(one: Instruction, name: str) -> bool:
    return one.opcode == "dynamic-update-slice" and one.operands[0] == name


def _touched(one: Instruction, called: Computation) -> int:
    """What of its first operand an instruction reads or writes."""
    if one.opcode == "dynamic-update-slice":
        update = called.instructions.get(one.operands[1])
        return 0 if update is None else update.nbytes
    return one.nbytes


def _in_memory(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.nbytes for shape in shapes if not shape.on_chip)
