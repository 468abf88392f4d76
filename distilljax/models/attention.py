"""Attention behind one function, with an implementation for each kind of device.

Every function here takes and returns the same, and a model takes any of them, or one of
your own. None holds an array of [time, time].
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from distilljax._checks import check_count, check_positive, fail
from distilljax.losses._fused_mesh import automatic_axes, position_axes
from distilljax.models import _blocked_attention

# Lanes of a TPU's registers: the kernel's blocks are multiples of them.
LANES = 128
# Rows and columns of a block of scores, at most.
BLOCK = 256


def dot_product_attention(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "..."],
    value: Float[Array, "..."],
    *,
    segment_ids: Int[Array, "..."] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Attention of a sequence to itself, as fits the device it is compiled for.

    scores = softcap tanh(scale query · key / softcap)
    out = sum over keys of softmax(scores) value

    TPUs run `splash_attention`; GPUs `cudnn_attention` where cuDNN has what is asked
    for, which excludes segments and soft-caps; all else is `blocked_attention`. The
    choice is made when the program is lowered, so that it is right for TPU programs
    that are compiled ahead of time, on a machine without one; cuDNN is chosen only
    where there is a GPU.

    Args:
      query: [batch, time, heads, head_dim].
      key: [batch, time, kv_heads, head_dim]; each is shared by heads / kv_heads
        successive heads of the query.
      value: As `key`.
      segment_ids: Integers [batch, time]: a position sees those of its own number only
        (several documents in a row, or padding with a number of its own); None: one.
      causal: Whether a position sees only itself and what is before it.
      window: How many positions it sees, itself included, in each direction that it
        sees at all; None for all.
      softcap: Bound of the scores; None for none.
      scale: Factor of the scores; None is 1 / sqrt(head_dim).

    Returns:
      [batch, time, heads, head_dim], in the dtype of the query.

    Numerics: products in the dtype of the inputs; scores, sums and softmax in float32.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> out = dot_product_attention(0 * x, x, x)      # all scores are equal: means
      >>> out[0, :, 0, 0].tolist()
      [0.0, 0.5, 1.0, 1.5]
    """
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    _check("dot_product_attention", query, key, value, segment_ids, window, softcap)

    def choice(implementation: Any) -> Any:
        return lambda q, k, v, s: implementation(q, k, v, segment_ids=s, **options)

    devices = {"tpu": choice(splash_attention)}
    # All branches are traced, and that of cuDNN fails where there is none.
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not _cudnn_lacks(query, segment_ids, causal, window, softcap):
        devices["cuda"] = choice(cudnn_attention)
    return jax.lax.platform_dependent(
        query, key, value, segment_ids, default=choice(blocked_attention), **devices
    )


def blocked_attention(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "..."],
    value: Float[Array, "..."],
    *,
    segment_ids: Int[Array, "..."] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> Float[Array, "batch time heads head_dim"]:
    """`dot_product_attention` in plain JAX, for every device.

    Memory grows with time x block: blocks of scores are made one after another, with an
    online softmax, and again for the gradient. Blocks out of reach are not computed.

    Args:
      query: As in `dot_product_attention`, like all below.
      key: Keys.
      value: Values.
      segment_ids: Segments.
      causal: Causality.
      window: Sliding window.
      softcap: Bound of the scores.
      scale: Factor of the scores.
      block: Rows and columns of a block, at most.

    Returns:
      As `dot_product_attention`.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> out = blocked_attention(0 * x, x, x, window=2, block=2)
      >>> out[0, :, 0, 0].tolist()
      [0.0, 0.5, 1.5, 2.5]

    Reference: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021,
    arXiv 2112.05682; Dao et al., "FlashAttention", NeurIPS 2022.
    """
    _check("blocked_attention", query, key, value, segment_ids, window, softcap)
    check_count("blocked_attention", "block", block)
    spec = _blocked_attention.Spec(
        length=query.shape[1],
        block=block,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=_scale(query, scale),
    )
    return _blocked_attention.attend(query, key, value, segment_ids, spec)


def cudnn_attention(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "..."],
    value: Float[Array, "..."],
    *,
    segment_ids: Int[Array, "..."] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: Any = "cudnn",
) -> Float[Array, "batch time heads head_dim"]:
    """`dot_product_attention` by cuDNN, for NVIDIA GPUs.

    Args:
      query: bfloat16 or float16, head_dim a multiple of 8 up to 128; else as in
        `dot_product_attention`, like all below.
      key: Keys.
      value: Values.
      segment_ids: Must be None: cuDNN would need a mask of [time, time].
      causal: Causality; must be True with a window.
      window: Sliding window.
      softcap: Must be None.
      scale: Factor of the scores.
      implementation: "cudnn"; "xla" computes the same on any device, with an array of
        [time, time], for comparison.

    Returns:
      As `dot_product_attention`.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> out = cudnn_attention(0 * x, x, x, window=2, implementation="xla")
      >>> out[0, :, 0, 0].tolist()
      [0.0, 0.5, 1.5, 2.5]
    """
    _check("cudnn_attention", query, key, value, segment_ids, window, softcap)
    dtype = jnp.bfloat16 if implementation == "xla" else query.dtype
    head_dim = 8 if implementation == "xla" else query.shape[-1]
    like = jax.ShapeDtypeStruct((*query.shape[:-1], head_dim), dtype)
    if lacks := _cudnn_lacks(like, segment_ids, causal, window, softcap):
        fail(
            "cudnn_attention",
            "what is asked for",
            "be among what cuDNN has",
            lacks,
            "Use blocked_attention, or dot_product_attention, which chooses.",
        )
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=_scale(query, scale),
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def splash_attention(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "..."],
    value: Float[Array, "..."],
    *,
    segment_ids: Int[Array, "..."] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> Float[Array, "batch time heads head_dim"]:
    """`dot_product_attention` by the Pallas kernel "splash", for TPUs.

    On a mesh each device runs the kernel on its own examples, and on its own heads
    along `tensor`: a kernel is nothing that the compiler could split.

    Args:
      query: As in `dot_product_attention`, like all below.
      key: Keys.
      value: Values.
      segment_ids: Segments.
      causal: Causality.
      window: Sliding window.
      softcap: Bound of the scores.
      scale: Factor of the scores.
      interpret: Whether to run the kernel's program on any device, slowly, for tests.

    Returns:
      As `dot_product_attention`.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> out = splash_attention(0 * x, x, x, window=2, interpret=True)
      >>> out[0, :, 0, 0].tolist()
      [0.0, 0.5, 1.5, 2.5]
    """
    _check("splash_attention", query, key, value, segment_ids, window, softcap)
    kernel = functools.partial(
        _splash, causal=causal, window=window, softcap=softcap, interpret=interpret
    )
    query = query * jnp.asarray(_scale(query, scale), query.dtype)
    axes = automatic_axes()
    if not axes:
        return kernel(query, key, value, segment_ids)
    batch, shards = position_axes(), axes.get("tensor", 1)
    if query.shape[0] % math.prod(axes[axis] for axis in batch):
        batch = ()  # few examples: every device has them all
    if query.shape[2] % shards:
        shards = 1
    if key.shape[2] % shards:
        # as many copies of a head as let each device have the ones of its queries
        copies = math.lcm(key.shape[2], shards) // key.shape[2]
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    spec = PartitionSpec(batch or None, None, "tensor" if shards > 1 else None, None)
    of_ids = None if segment_ids is None else PartitionSpec(batch or None, None)
    return jax.shard_map(
        kernel,
        in_specs=(spec, spec, spec, of_ids),
        out_specs=spec,
        check_vma=False,
    )(query, key, value, segment_ids)


# compiled as one function, so that a model of many layers is traced through it once
@functools.partial(
    jax.jit, static_argnames=("causal", "window", "softcap", "interpret")
)
def _splash(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Any,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Array:
    """The kernel on the arrays of one device, filled up to whole blocks."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    batch, length, heads, _ = query.shape
    time = -(-length // LANES) * LANES
    block = max(b for b in (LANES, 2 * LANES, 4 * LANES) if time % b == 0)
    if not causal and time != length and segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    query, key, value = (
        jnp.pad(x, [(0, 0), (0, time - length), (0, 0), (0, 0)]).swapaxes(1, 2)
        for x in (query, key, value)
    )
    if window is not None:
        reach = (window - 1, 0 if causal else window - 1)
        mask = splash.LocalMask((time, time), reach, 0)
    elif causal:
        mask = splash.CausalMask((time, time))
    else:
        mask = splash.FullMask((time, time))
    attend = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    ids = None
    if segment_ids is not None:
        numbers = segment_ids.astype(jnp.int32)
        # a number that no segment has, where a row was filled up
        free = jnp.full((batch, time - length), numbers.min() - 1)
        filled = jnp.concatenate([numbers, free], axis=1)
        ids = splash.SegmentIds(filled, filled)
    out: Any = jax.vmap(attend)(query, key, value, ids)
    return out.swapaxes(1, 2)[:, :length]


def _scale(query: Array, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _cudnn_lacks(
    query: Any, segment_ids: Any, causal: bool, window: int | None, softcap: Any
) -> str:
    """What cuDNN has not, of all that is asked for; empty if it has everything."""
    if segment_ids is not None:
        return "segment_ids"
    if softcap is not None:
        return "a softcap"
    if window is not None and not causal:
        return "a window without causality"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"head_dim {query.shape[-1]}"
    return ""


def _check(
    function: str,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Any,
    window: int | None,
    softcap: float | None,
) -> None:
    """Shapes that belong together, and sizes that mean something."""
    if query.ndim != 4 or key.ndim != 4 or query.shape[1] == 0:
        fail(
            function,
            "query and key",
            "be [batch, time, heads, head_dim], with at least one position",
            f"{query.shape} and {key.shape}",
            "Split the last axis into heads first.",
        )
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if key.shape != (batch, time, kv_heads, head_dim) or value.shape != key.shape:
        fail(
            function,
            "key and value",
            f"have the batch, time and head_dim of query, {query.shape}",
            f"{key.shape} and {value.shape}",
            "This is the attention of a sequence to itself: project all three from it.",
        )
    if heads % kv_heads:
        fail(
            function,
            "heads",
            f"be a multiple of kv_heads, {kv_heads}",
            heads,
            "Each head of key and value is shared by equally many heads of query.",
        )
    if segment_ids is not None and segment_ids.shape != (batch, time):
        fail(
            function,
            "segment_ids",
            f"have the shape [batch, time] of query, {(batch, time)}",
            segment_ids.shape,
            "One integer belongs to each position.",
        )
    if window is not None:
        check_count(function, "window", window)
    if softcap is not None:
        check_positive(function, "softcap", softcap, "Use None for no bound.")
