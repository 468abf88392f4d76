"""A compiled program is read as XLA writes it: on a CPU, and for a TPU."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from distilljax.planning.hlo import Program, shapes_in

# A scan of 7 over a product whose operand is gathered, for 4 chips of TPU v5e, as
# libtpu 0.0.42 compiles it. What libtpu writes is no interface: this is an example of
# it for machines without one.
TPU_TEXT = Path(__file__).with_name("tpu_scan.hlo").read_text()


def compiled(function, *args) -> Program:
    return Program(jax.jit(function).lower(*args).compile().as_text())


def times(program: Program, opcode: str) -> list[int]:
    return sorted(n for one, n in program.executed() if one.opcode == opcode)


def test_what_is_in_nested_loops_runs_as_often_as_both_say():
    def inner(x, _):
        return jnp.sin(x), None

    def outer(x, _):
        return jax.lax.scan(inner, jnp.cos(x), length=5)[0], None

    program = compiled(lambda x: jax.lax.scan(outer, x, length=3)[0], jnp.ones(4))
    assert times(program, "cosine") == [3]
    assert times(program, "sine") == [15]


def test_a_loop_that_counts_from_elsewhere_is_counted():
    def body(i, x):
        return jnp.sin(x) * i

    program = compiled(lambda x: jax.lax.fori_loop(4, 11, body, x), jnp.ones(4))
    assert times(program, "sine") == [7]


def test_a_loop_of_unknown_length_counts_once():
    program = compiled(
        lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) > 1, jnp.sin, x), jnp.ones(4)
    )
    assert times(program, "sine") == [1]


def test_a_program_for_a_tpu_is_read_without_a_known_number_of_trips():
    assert "known_trip_count" not in TPU_TEXT
    program = Program(TPU_TEXT)
    loops = [
        program.trips(program.computations[name], one)
        for name in program.times
        for one in program.computations[name].instructions.values()
        if one.opcode == "while"
    ]
    assert loops == [7]
    (argument,) = program.entry.parameters()
    assert str(argument.shapes[0]) == "f32[256,1024]"


def test_shapes_have_their_place_and_their_padding():
    text = "(bf16[3,200]{1,0:T(8,128)(2,1)S(1)}, f32[3,200]{0,1:T(8,128)}, pred[])"
    fast, slow, flag = shapes_in(text)
    assert (fast.on_chip, slow.on_chip) == (True, False)
    assert fast.nbytes == 3 * 200 * 2
    assert fast.allocated == 8 * 256 * 2
    assert slow.allocated == 200 * 128 * 4  # the axis of 3 is the minor one
    assert (flag.size, flag.nbytes) == (1, 1)


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [("s4[10]", 5), ("f8e4m3fn[10]", 10), ("s8[10]", 10), ("c64[10]", 80)],
)
def test_types_have_their_sizes(dtype, nbytes):
    (shape,) = shapes_in(dtype)
    assert shape.nbytes == nbytes


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match=r"ENTRY.*Pass compiled\.as_text\(\)"):
        Program("not a program")
