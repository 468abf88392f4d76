"""What a compiled program moves between the chip and its memory, as its text says."""

from __future__ import annotations

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
    read = 0
    for name in instruction.operands:
        operand = inside.instructions.get(name)
        read += 0 if operand is None else _in_memory(operand.shapes)
    return read + _in_memory(instruction.shapes)


def _of_fusion(
    instruction: Instruction, inside: Computation, called: Computation
) -> int:
    """What a fusion reads of its operands, which may be slices, and what it writes."""
    total = 0
    for name, parameter in zip(instruction.operands, called.parameters(), strict=False):
        operand = inside.instructions.get(name)
        if operand is None or not _in_memory(operand.shapes):
            continue
        users = [
            one
            for one in called.instructions.values()
            if parameter.name in one.operands
        ]
        sliced = users and all(
            (one.opcode in _PARTS and one.operands[0] == parameter.name)
            or _updates(one, parameter)
            for one in users
        )
        if sliced:
            total += sum(_touched(one, called) for one in users)
        else:
            total += _in_memory(operand.shapes)
    root = called.root
    parts = [root]
    if root.opcode == "tuple":
        parts = [called.instructions[name] for name in root.operands]
    for part, shape in zip(parts, instruction.shapes, strict=False):
        if not shape.on_chip:
            written = part.opcode == "dynamic-update-slice"
            total += _touched(part, called) if written else shape.nbytes
    return total


def _updates(one: Instruction, parameter: Instruction) -> bool:
    return one.opcode == "dynamic-update-slice" and one.operands[0] == parameter.name


def _touched(one: Instruction, called: Computation) -> int:
    """What of its first operand an instruction reads or writes."""
    if one.opcode == "dynamic-update-slice":
        update = called.instructions.get(one.operands[1])
        return 0 if update is None else update.nbytes
    return one.nbytes


def _in_memory(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.nbytes for shape in shapes if not shape.on_chip)
