"""What is live at the peak is what the compiler says, and has a name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from distilljax.planning.hlo import Program
from distilljax.planning.liveness import peak_of

MIB = 2**20
X = jax.ShapeDtypeStruct((512, 512), "float32")  # 1 MiB


def both(function, *args, **options):
    compiled = jax.jit(function, **options).lower(*args).compile()
    return peak_of(Program(compiled.as_text())), compiled.memory_analysis()


def sort(x):
    return jnp.sort(x, axis=0)


def test_an_array_that_waits_counts_until_it_is_read():
    found, _ = both(lambda x: sort(sort(sort(x))) + sort(x.T), X)
    assert found.arguments == MIB
    assert found.nbytes >= 3 * MIB


def test_what_is_donated_is_written_over():
    kept, _ = both(lambda x: sort(x) * 2, X)
    donated, _ = both(lambda x: jnp.sin(x) * 2, X, donate_argnums=0)
    assert kept.nbytes >= 2 * MIB
    assert donated.nbytes == MIB


def test_the_state_of_a_loop_is_in_memory_once():
    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x) @ x, None), x, length=9)[0]

    found, _ = both(loop, X)
    assert found.nbytes <= 5 * MIB


def test_what_a_loop_stacks_is_in_memory_whole():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, x), x, length=9)[1]

    found, _ = both(loop, X)
    largest = found.live[0]
    assert str(largest.shape) == "f32[9,512,512]"
    assert 10 * MIB <= found.nbytes <= 14 * MIB


def layers(x, kernels):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, kernels)[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, k: layers(x, k),
        lambda x, k: jax.grad(layers, argnums=1)(x, k),
        lambda x, k: sort(x) @ k[0] + sort(x.T) @ k[1],
    ],
    ids=["forward", "backward", "waiting"],
)
def test_the_peak_is_near_what_the_compiler_sets_aside(function):
    """Its sum has gaps between arrays; the walk has none, and may not be larger."""
    kernels = jax.ShapeDtypeStruct((6, 512, 512), "float32")
    found, said = both(function, X, kernels)
    total = (
        said.argument_size_in_bytes + said.temp_size_in_bytes
        + said.output_size_in_bytes - said.alias_size_in_bytes
    )  # fmt: skip
    assert found.arguments == said.argument_size_in_bytes
    assert 0.75 * total <= found.nbytes <= 1.1 * total


LENT = """HloModule lent, is_scheduled=true

%twice (p: (s32[], f32[1048576])) -> (s32[], f32[1048576]) {
  %p = (s32[], f32[1048576]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[1048576]{0} get-tuple-element(%p), index=1
  %read = f32[1048576]{0} sort(%x), dimensions={0}
  %within = f32[1048576]{0} sort(%read), dimensions={0}
  %beside = f32[1048576]{0} sort(%within), dimensions={0}
  %both = f32[1048576]{0} add(%within, %beside)
  %next = f32[1048576]{0} sort(%both), dimensions={0}
  ROOT %r = (s32[], f32[1048576]{0}) tuple(%i, %next)
}

%more (p: (s32[], f32[1048576])) -> pred[] {
  %p = (s32[], f32[1048576]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[1048576]) -> f32[1048576] {
  %a = f32[1048576]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = f32[1048576]{0} sort(%a), dimensions={0}
  %t = (s32[], f32[1048576]{0}) tuple(%zero, %start)
  %loop = (s32[], f32[1048576]{0}) while(%t), condition=%more, body=%twice
  ROOT %end = f32[1048576]{0} get-tuple-element(%loop), index=1
}
"""


def test_the_place_of_a_loops_state_is_lent_between_its_values():
    """`x` is read last where `read` is written: `beside` may lie there after that.

    In memory are the argument, the state, and two of the three that the body holds when
    `both` is written. A state that is read at the end of the body lends nothing.
    """
    assert peak_of(Program(LENT)).nbytes == 4 * 4 * MIB
    held = LENT.replace("%next = f32[1048576]{0} sort(%both), dimensions={0}",
                        "%next = f32[1048576]{0} add(%x, %both)")  # fmt: skip
    assert held != LENT
    assert peak_of(Program(held)).nbytes == 5 * 4 * MIB


FETCHED = """HloModule fetched, is_scheduled=true

ENTRY %main (a: f32[1048576]) -> f32[1048576] {
  %a = f32[1048576]{0} parameter(0)
  %start = (f32[1048576]{0:S(1)}, f32[1048576]{0}, u32[]{:S(2)}) copy-start(%a)
  %near = f32[1048576]{0:S(1)} copy-done(%start)
  ROOT %end = f32[1048576]{0:S(1)} sort(%near), dimensions={0}
}
"""


def test_what_is_copied_to_the_chip_is_not_in_memory_twice():
    """An asynchronous copy names its source too, which is where it was."""
    assert peak_of(Program(FETCHED)).nbytes < 4 * MIB + 8
    apart = FETCHED.replace("{0:S(1)}, f32", "{0}, f32")
    assert peak_of(Program(apart)).nbytes >= 2 * 4 * MIB
