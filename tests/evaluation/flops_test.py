"""FLOPs are counted from what a program is traced to, loops as often as they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from distilljax.evaluation.flops import count_flops
from distilljax.models import DecoderConfig
from distilljax.models.attention import blocked_attention

X = jnp.ones((2, 8))


def decoder(scan: bool):
    model = DecoderConfig(
        vocab_size=32, width=16, num_layers=5, num_heads=2, num_kv_heads=1, head_dim=8,
        ffn_width=24, scan=scan,
    )(nnx.Rngs(0))  # fmt: skip
    graphdef, state = nnx.split(model)
    return lambda state, x: nnx.merge(graphdef, state)(x).logits.logits(), state


def test_scanned_layers_count_as_the_same_layers_in_a_row():
    tokens = jnp.zeros((1, 12), int)
    stacked, plain = (count_flops(*decoder(scan), tokens) for scan in (True, False))
    assert stacked == plain
    # products with parameters alone: 2 each, for every token; attention is the rest
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24
    assert plain >= 2 * 12 * (5 * layer + 16 * 32)


def test_batched_products_and_convolutions():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert count_flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5 * 6
    image, kernel = jnp.ones((1, 7, 7, 3)), jnp.ones((3, 3, 3, 8))

    def convolve(image, kernel):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=names
        )

    assert count_flops(convolve, image, kernel) == 2 * 5 * 5 * 8 * 27


def test_of_two_branches_the_dearest_counts_and_jit_changes_nothing():
    def either(x):
        one, three = lambda x: x @ x.T, lambda x: x @ x.T @ x @ x.T
        return jax.lax.cond(x[0, 0] > 0, one, three, x)

    assert count_flops(jax.jit(either), X) == 3 * 2 * (2 * 2 * 8)


def test_of_branches_by_kind_of_device_the_one_for_any_counts():
    def by_device(x):
        kinds = {"tpu": lambda x: x @ x.T @ x @ x.T, "default": lambda x: x @ x.T}
        return jax.lax.platform_dependent(x, **kinds)

    assert count_flops(by_device, X) == 2 * (2 * 2 * 8)


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, 4 + 3 + 2 + 1),
        ({"causal": False}, 16),
        ({"window": 17}, 4 + 3),  # itself and one block before it
        ({"window": 18}, 4 + 3 + 2),
        ({"window": 17, "causal": False}, 4 + 2 * 3),
    ],
)
def test_attention_grows_with_the_blocks_that_are_seen(options, pairs):
    """Two products for each pair of blocks of 16 positions; there are four blocks."""
    x = jax.ShapeDtypeStruct((1, 64, 2, 8), "float32")

    def attend(x):
        return blocked_attention(x, x, x, block=16, **options)

    assert count_flops(attend, x) == pairs * 2 * (2 * 16 * 16 * 8 * 2)


def test_attention_of_four_times_the_context_takes_sixteen_times_as_much():
    def full(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), "float32")
        return count_flops(lambda x: blocked_attention(x, x, x, causal=False), x)

    assert full(4096) == 16 * full(1024) == 4 * 4096**2 * 8
