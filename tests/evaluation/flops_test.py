"""FLOPs are counted from what a program is traced to, loops as often as they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax.evaluation.flops import count_flops
from distilljax.models import DecoderConfig

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
