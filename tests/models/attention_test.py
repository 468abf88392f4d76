"""Attention: all implementations are one function, and none holds [time, time]."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax.models import (
    blocked_attention,
    cudnn_attention,
    dot_product_attention,
    splash_attention,
)
from distilljax.sharding import mesh_from_string


def direct(q, k, v, *, segment_ids=None, causal=True, window=None, softcap=None,
           scale=None):  # fmt: skip
    """From the formula, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("bqnh,bsnh->bnqs", q, k)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    at = np.arange(q.shape[1])
    behind = at[:, None] - at[None]
    keep = np.ones_like(behind, bool) if not causal else behind >= 0
    if window is not None:
        keep &= np.abs(behind) < window
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        keep = keep & (ids[:, None, :, None] == ids[:, None, None, :])
    scores = np.where(keep, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnqs,bsnh->bqnh", weights, v)


def inputs(time=40, heads=4, kv_heads=2, head_dim=8, batch=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, time, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [
        jax.random.normal(k, shape, dtype)
        for k, shape in zip(keys, shapes, strict=True)
    ]


def segments(time=40, batch=2):
    ids = np.stack([np.arange(time) * (i + 2) // time for i in range(batch)])
    return jnp.asarray(ids, jnp.int32)


OPTIONS = [
    {},
    {"causal": False},
    {"window": 7},
    {"window": 1},
    {"window": 9, "causal": False},
    {"softcap": 1.5},
    {"scale": 0.2},
    {"segment_ids": segments()},
    {"segment_ids": segments(), "causal": False},
    {"segment_ids": segments(), "window": 11, "softcap": 2.0, "scale": 0.5},
]


def ids_of(options):
    return ",".join(options) or "plain"


@pytest.mark.parametrize("block", [4, 16, 40, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=ids_of)
def test_blocks_of_any_size_follow_the_formula(options, block):
    q, k, v, _ = inputs()
    got = jax.jit(functools.partial(blocked_attention, block=block, **options))(q, k, v)
    np.testing.assert_allclose(got, direct(q, k, v, **options), atol=2e-6)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=ids_of)
def test_gradients_of_blocks_are_those_of_the_formula(options, block):
    """The backward pass is written by hand; that of the formula is JAX's."""
    q, k, v, weights = inputs()

    def loss(attend, *operands):
        return jnp.sum(attend(*operands, **options) * weights)

    def whole(q, k, v, *, segment_ids=None, causal=True, window=None, softcap=None,
              scale=None):  # fmt: skip
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        scores = jnp.einsum("bqnh,bsnh->bnqs", q, k) * (scale or q.shape[-1] ** -0.5)
        scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
        behind = jnp.arange(40)[:, None] - jnp.arange(40)
        keep = (behind >= 0) | (not causal)
        keep &= jnp.abs(behind) < (window or 99)
        if segment_ids is not None:
            keep &= (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
        weights = jax.nn.softmax(jnp.where(keep, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnqs,bsnh->bqnh", weights, v)

    gradient = functools.partial(jax.grad, argnums=(0, 1, 2))
    blocks = functools.partial(blocked_attention, block=block)
    got = jax.jit(gradient(functools.partial(loss, blocks)))(q, k, v)
    want = jax.jit(gradient(functools.partial(loss, whole)))(q, k, v)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 100},
        {"softcap": 1.5, "scale": 0.2},
        {"segment_ids": segments(200), "window": 90, "softcap": 2.0},
        {"segment_ids": segments(200), "causal": False},
        {"segment_ids": segments(200) - 2, "causal": False},  # -1 is a number, too
        {"causal": False},
    ],
    ids=ids_of,
)
def test_all_implementations_are_one_function(options):
    """Outputs and gradients; 200 positions are no whole number of any block."""
    q, k, v, weights = inputs(time=200, head_dim=16)
    implementations = {
        "blocked": functools.partial(blocked_attention, block=64),
        "splash": functools.partial(splash_attention, interpret=True),
        "chosen": dot_product_attention,
    }
    if not {"segment_ids", "softcap"} & set(options):
        implementations["cudnn"] = functools.partial(
            cudnn_attention, implementation="xla"
        )

    def outputs(attend):
        def loss(*operands):
            out = attend(*operands, **options)
            return jnp.sum(out * weights), out

        compute = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, out), grads = jax.jit(compute)(q, k, v)
        return out, *grads

    found = {name: outputs(attend) for name, attend in implementations.items()}
    want = direct(q, k, v, **options)
    for name, (out, *grads) in found.items():
        np.testing.assert_allclose(out, want, atol=1e-5, err_msg=name)
        for x, y in zip(grads, found["blocked"][1:], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("mesh", ["data=2,tensor=2", "fsdp=2,tensor=4", "data=8"])
def test_the_kernel_of_tpus_runs_on_a_mesh(mesh):
    """Examples over data and fsdp, heads over tensor; 2 kv heads are copied for 4."""
    q, k, v, _ = inputs(time=130, batch=2)
    ids = segments(130)
    sizes = int(np.prod([int(x) for x in re.findall(r"=(\d)", mesh)]))
    attend = jax.jit(functools.partial(splash_attention, interpret=True))
    with jax.set_mesh(mesh_from_string(mesh, jax.devices()[:sizes])):
        got = attend(q, k, v, segment_ids=ids)
    np.testing.assert_allclose(got, direct(q, k, v, segment_ids=ids), atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    q, k, v, _ = inputs(time=64, dtype=jnp.bfloat16)
    got = blocked_attention(q, k, v, block=16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), direct(q, k, v), atol=0.02, rtol=0.01
    )


@pytest.mark.parametrize("attend", [blocked_attention, dot_product_attention])
def test_no_array_of_time_by_time(attend):
    time = 2048
    q, k, v, weights = inputs(time=time, heads=2, kv_heads=1, batch=1)
    ids = segments(time, 1)

    def loss(q, k, v):
        out = attend(q, k, v, segment_ids=ids, window=1000, softcap=5.0)
        return jnp.sum(out * weights)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    shapes = re.findall(r"\[([\d,]+)\]", compiled.as_text())
    largest = max(
        int(np.prod([int(x) for x in shape.split(",")])) for shape in set(shapes)
    )
    assert largest < time * time / 4
    assert compiled.memory_analysis().temp_size_in_bytes < time * time


def test_padding_changes_neither_values_nor_gradients():
    q, k, v, weights = inputs()
    ids = jnp.asarray(np.arange(40) < 30, jnp.int32)[None].repeat(2, 0)
    weights = weights * ids[..., None, None]

    def loss(q, k, v):
        return jnp.sum(blocked_attention(q, k, v, segment_ids=ids, block=16) * weights)

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, grads = compute(q, k, v)
    spoilt = [x.at[:, 30:].multiply(-3.0) for x in (q, k, v)]
    other, other_grads = compute(*spoilt)
    np.testing.assert_array_equal(value, other)
    for x, y in zip(grads, other_grads, strict=True):
        np.testing.assert_array_equal(x[:, :30], y[:, :30])
        np.testing.assert_array_equal(x[:, 30:], 0)


def test_only_blocks_in_reach_are_computed():
    """Keys out of reach may hold anything: they are not even multiplied."""
    q, k, v, _ = inputs(time=64, batch=1)
    k, v = (x.at[:, :16].set(jnp.nan) for x in (k, v))
    out = blocked_attention(q, k, v, window=8, block=8)
    assert np.isnan(out[:, 20]).any()
    assert np.isfinite(out[:, 32:]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 39, 2, 8)}, "key and value must have the batch, time and head_dim"),
        (dict.fromkeys("qkv", (2, 0, 2, 8)), "with at least one position, got"),
        ({"k": (2, 40, 3, 8), "v": (2, 40, 3, 8)}, "heads must be a multiple of"),
        ({"segment_ids": (2, 39)}, r"segment_ids must have the shape .*\(2, 40\), got"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"softcap": -1.0}, "softcap must be positive and finite, got -1.0"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message):
    q, k, v, _ = inputs()
    change = {
        name: jnp.zeros(x, jnp.int32 if name == "segment_ids" else jnp.float32)
        if isinstance(x, tuple)
        else x
        for name, x in change.items()
    }
    q, k, v = (change.pop(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    with pytest.raises(ValueError, match=message):
        blocked_attention(q, k, v, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_ids": segments()}, "got segment_ids"),
        ({"softcap": 2.0}, "got a softcap"),
        ({"window": 3, "causal": False}, "got a window without causality"),
        ({}, "got the dtype float32"),
    ],
    ids=ids_of,
)
def test_what_cudnn_has_not_is_refused(options, message):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=message):
        cudnn_attention(q, k, v, **options)


def test_bfloat16_needs_no_cudnn():
    """What cuDNN could do is traced only where there is a GPU."""
    x = jnp.ones((1, 8, 1, 8), jnp.bfloat16)
    assert dot_product_attention(x, x, x).dtype == jnp.bfloat16
