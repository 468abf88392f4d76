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
