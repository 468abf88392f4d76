"""Attention in blocks, in plain JAX: no array of [time, time], forwards or backwards.

The softmax of a row of scores is computed block by block, with a running maximum and a
running sum; the backward pass makes the scores again from the log-sum-exp of each row.
Blocks that causality or a window masks as a whole are not computed.

Inside, arrays are [batch, kv_heads, group, time, head_dim] for queries and [batch,
kv_heads, time, head_dim] for keys and values: a group of query heads shares its keys.

Reference: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021, arXiv
2112.05682; Dao et al., "FlashAttention", NeurIPS 2022, algorithms 1 and 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Finite, so that no difference of two of them is nan; its exponential is 0.
MASKED = -1e30


class Spec(NamedTuple):
    """What is known when the program is compiled."""

    length: int
    block: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float


def attend(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch time kv_heads head_dim"],
    value: Float[Array, "batch time kv_heads head_dim"],
    segment_ids: Any,
    spec: Spec,
) -> Float[Array, "batch time heads head_dim"]:
    """Attention over whole arrays: they are cut into blocks here."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    num_blocks = -(-length // spec.block)
    # blocks as equal as can be, so that little is added
    spec = spec._replace(block=-(-length // num_blocks))
    short = num_blocks * spec.block - length

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))

    query, key, value = padded(query), padded(key), padded(value)
    if segment_ids is not None:
        segment_ids = padded(segment_ids)
    q = query.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)
    k, v = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    out: Any = _attend(spec, q.transpose(0, 2, 3, 1, 4), k, v, segment_ids)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, head_dim)
    return out[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: Spec, q: Array, k: Array, v: Array, segments: Any) -> Array:
    return _forward(spec, q, k, v, segments)[0]


def _forward(
    spec: Spec, q: Array, k: Array, v: Array, segments: Any
) -> tuple[Array, Any]:
    """The outputs, and what the backward pass needs."""

    def row(i: Any) -> tuple[Array, Array]:
        q_i = _block(q, i, spec)

        def column(j: Any, carry: tuple[Array, Array, Array]):
            top, total, acc = carry
            scores, keep = _scores(spec, q_i, _block(k, j, spec), i, j, segments)
            scores = jnp.where(keep, scores, MASKED)
            # a row without a valid key so far counts wrong ones, until its maximum
            # rises and their factor is 0; each row has a valid key, itself
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            factor = jnp.exp(top - higher)
            total = total * factor + jnp.sum(weights, axis=-1)
            part = _product("bkgqs,bksh->bkgqh", weights, _block(v, j, spec))
            return higher, total, acc * factor[..., None] + part

        start = jnp.full(q_i.shape[:-1], MASKED, jnp.float32)
        carry = (start, jnp.zeros_like(start), jnp.zeros(q_i.shape, jnp.float32))
        top, total, acc = _over_columns(spec, q, i, column, carry)
        out = (acc / total[..., None]).astype(q.dtype)
        return out, top + jnp.log(total)

    num_blocks = _num_blocks(q, spec)
    if num_blocks == 1:
        out, log_total = _one_block(spec, q, k, v, segments)
    else:
        out, log_total = (_join(x, 3) for x in jax.lax.map(row, jnp.arange(num_blocks)))
    return out, (q, k, v, segments, out, log_total)


def _one_block(
    spec: Spec, q: Array, k: Array, v: Array, segments: Any
) -> tuple[Array, Array]:
    """As a row of blocks, of which there is one: nothing runs along."""
    scores, keep = _scores(spec, q, k, 0, 0, segments)
    scores = jnp.where(keep, scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product("bkgqs,bksh->bkgqh", weights, v) / total
    return out.astype(q.dtype), (top + jnp.log(total))[..., 0]


def _backward(spec: Spec, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    """Gradients of queries, keys and values, from scores that are made again."""
    q, k, v, segments, out, log_total = residuals
    # of each row, what the gradient of its softmax subtracts
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def row(carry: tuple[Array, Array], i: Any) -> tuple[Any, Array]:
        q_i, d_out_i = _block(q, i, spec), _block(d_out, i, spec)
        inner_i, log_total_i = (_block(x, i, spec, 3) for x in (inner, log_total))

        def column(j: Any, carry: tuple[Array, Array, Array]):
            d_q_i, d_k, d_v = carry
            k_j, v_j = _block(k, j, spec), _block(v, j, spec)
            scores, keep = _scores(spec, q_i, k_j, i, j, segments)
            weights = jnp.exp(jnp.where(keep, scores, MASKED) - log_total_i[..., None])
            d_v = _add(d_v, _product("bkgqs,bkgqh->bksh", weights, d_out_i), j, spec)
            d_weights = _product("bkgqh,bksh->bkgqs", d_out_i, v_j)
            d_scores = weights * (d_weights - inner_i[..., None]) * spec.scale
            if spec.softcap is not None:
                d_scores *= 1 - (scores / spec.softcap) ** 2
            d_k = _add(d_k, _product("bkgqs,bkgqh->bksh", d_scores, q_i), j, spec)
            return d_q_i + _product("bkgqs,bksh->bkgqh", d_scores, k_j), d_k, d_v

        start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
        d_q_i, d_k, d_v = _over_columns(spec, q, i, column, start)
        return (d_k, d_v), d_q_i

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    if _num_blocks(q, spec) == 1:
        (d_k, d_v), d_q = row(start, 0)
    else:
        (d_k, d_v), d_q = jax.lax.scan(row, start, jnp.arange(_num_blocks(q, spec)))
        d_q = _join(d_q, 3)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _scores(
    spec: Spec, q_i: Array, k_j: Array, i: Any, j: Any, segments: Any
) -> tuple[Array, Array]:
    """Scores of a block of queries and one of keys, and which of them count."""
    scores = _product("bkgqh,bksh->bkgqs", q_i, k_j) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    at = jnp.arange(spec.block)
    behind = (i * spec.block + at)[:, None] - (j * spec.block + at)[None, :]
    keep = behind >= 0 if spec.causal else (j * spec.block + at < spec.length)[None, :]
    if spec.window is not None:
        keep &= behind < spec.window
        keep &= behind > -spec.window
    if segments is not None:
        of_queries = _block(segments, i, spec, 1)
        of_keys = _block(segments, j, spec, 1)
        same = of_queries[:, :, None] == of_keys[:, None, :]
        keep = keep & same[:, None, None]
    return scores, keep


def _over_columns(
    spec: Spec, q: Array, i: Any, column: Callable[[Any, Any], Any], carry: Any
) -> Any:
    """Go through the blocks of keys that the block `i` of queries may see."""
    num_blocks = _num_blocks(q, spec)
    if num_blocks == 1:
        return column(0, carry)
    first, last = 0, i + 1 if spec.causal else num_blocks
    if spec.window is not None:
        reach = -(-(spec.window - 1) // spec.block)
        first = jnp.maximum(i - reach, 0)
        last = last if spec.causal else jnp.minimum(i + reach + 1, num_blocks)

    def loop(first: Any, last: Any, carry: Any) -> Any:
        return jax.lax.fori_loop(first, last, column, carry)

    # its trips depend on the row: `evaluation.flops` reads their sum from the name
    loop.__name__ = f"trips_{_num_visits(num_blocks, spec)}_of_{num_blocks}"
    return jax.jit(loop)(first, last, carry)


def _num_visits(num_blocks: int, spec: Spec) -> int:
    """How many pairs of blocks are looked at."""
    reach = num_blocks
    if spec.window is not None:
        reach = -(-(spec.window - 1) // spec.block)
    return sum(
        min(i if spec.causal else i + reach, num_blocks - 1) - max(i - reach, 0) + 1
        for i in range(num_blocks)
    )


def _num_blocks(q: Array, spec: Spec) -> int:
    return q.shape[3] // spec.block


def _product(equation: str, a: Array, b: Array) -> Array:
    """In the dtype of the inputs, summed in float32."""
    dtype = b.dtype
    return jnp.einsum(equation, a.astype(dtype), b, preferred_element_type=jnp.float32)


def _block(x: Array, i: Any, spec: Spec, axis: int = -2) -> Array:
    if x.shape[axis] == spec.block:
        return x
    start = i * spec.block
    return jax.lax.dynamic_slice_in_dim(x, start, spec.block, axis=axis % x.ndim)


def _add(x: Array, part: Array, j: Any, spec: Spec) -> Array:
    """Add to the block `j` of the axis of time."""
    if x.shape[2] == spec.block:
        return x + part
    block = _block(x, j, spec) + part
    return jax.lax.dynamic_update_slice_in_dim(x, block, j * spec.block, axis=2)


def _join(x: Array, axis: int) -> Array:
    """Blocks along a new first axis, put together along `axis` of the blocks."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
