"""Losses between the self-attention of two transformers, one value for each token."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from distilljax._checks import check_features, check_where, fail
from distilljax.losses import _features as features
from distilljax.losses import _numerics as numerics

# Relations of as many heads are formed together as have this many entries: 64 MiB.
_ENTRIES_AT_ONCE = 2**24


def attention_relation(
    student: Float[Array, "batch time width"],
    teacher: Float[Array, "..."],
    *,
    num_relation_heads: int,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "batch time"]:
    """KL between the self-relations of the queries, keys or values, in nats.

    attention_relation = mean over relation heads of KL(R_t || R_s), for each token
    R = softmax over tokens of X X' / sqrt(d), X: [time, d] of one relation head

    X is the output of a layer's query, key or value projection, all heads side by side,
    cut anew into ``num_relation_heads`` parts, d = width / num_relation_heads wide. So
    student and teacher may differ in width and in their number of attention heads, and
    no projection is needed. MiniLM v2 adds three of these, for Q, K and V, of one layer
    on each side: the student's last, and the teacher's last or one of its upper ones.

    Args:
      student: Queries, or keys, or values [batch, time, width]; gets the gradient.
      teacher: The same of the teacher, [batch, time, any width]; gets none.
      num_relation_heads: Divides both widths. More heads than either model has is
        common: 48 for base models, 64 for large ones.
      where: Mask [batch, time]; a token where it is false is in no softmax, and its
        value and gradient are exactly 0. None counts every token.

    Returns:
      [batch, time], float32 (float64 if an input is).

    Numerics: `masked_mean` of it weighs all tokens the same; the paper divides by the
    length of each sequence, and so weighs all sequences the same. The relations of a
    few heads are formed at a time, and again in the backward pass: memory is a few
    times [batch, time, time] for one head, or a few times 64 MiB, if that is more.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])     # R = 0.67 on itself
      >>> student = jnp.zeros((1, 2, 4))                      # R = 1 / 2
      >>> values = attention_relation(student, teacher, num_relation_heads=1)
      >>> round(float(values[0, 0]), 4)       # log 2 + .67 log .67 + .33 log .33
      0.0588

    Reference: Wang, Bao, Huang, Dong, Wei, "MiniLMv2: Multi-Head Self-Attention
    Relation Distillation for Compressing Pretrained Transformers", Findings of ACL
    2021, arXiv 2012.15828, section 3.1.
    """
    name = "attention_relation"
    s, t, mask = features.prepare(
        name, features.TOKENS, student, teacher, where, lead=2, any_width=True
    )
    for argument, x in (("student", s), ("teacher", t)):
        if num_relation_heads < 1 or x.shape[-1] % num_relation_heads:
            largest = math.gcd(s.shape[-1], t.shape[-1])
            fail(
                name,
                "num_relation_heads",
                f"divide the width of {argument}, {x.shape[-1]}",
                num_relation_heads,
                f"Use {largest}, or a number that divides {largest}.",
            )

    # Without the checkpoint the loop would keep every head for the backward pass.
    @jax.checkpoint
    def head(parts):
        log_s, log_t = (_log_relation(part, mask) for part in parts)
        return numerics.kl(log_t, log_s)

    heads = tuple(
        jnp.moveaxis(x.reshape(*x.shape[:2], num_relation_heads, -1), 2, 0)
        for x in (s, t)
    )
    batch, time = s.shape[:2]
    together = max(1, _ENTRIES_AT_ONCE // max(1, batch * time**2))
    values = jax.lax.map(head, heads, batch_size=min(num_relation_heads, together))
    return numerics.zero_masked(jnp.mean(values, axis=0), mask)


def attention_map_kl(
    student: Float[Array, "batch heads time time"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "batch time"]:
    """KL between the attention maps of two layers, averaged over heads, in nats.

    attention_map_kl = mean over heads of KL(A_t || A_s), for each token as a query
    A = softmax over keys of the scores

    Head i of the student learns from head i of the teacher, so both need as many;
    `attention_relation` does not. TinyBERT, which made attention transfer common, takes
    the mean squared error of the *scores*, which also fixes what no softmax can see, a
    constant for each query. For that, use `hidden_mse` on scores with padding at 0.

    Args:
      student: Attention scores before the softmax, after the division by sqrt(d),
        [batch, heads, time, time], queries before keys; gets the gradient. Of attention
        weights, pass the logarithm.
      teacher: Scores of the same shape; gets none. -inf on both sides, as a causal mask
        has it, counts 0.
      where: Mask [batch, time], for queries and keys alike; a token where it is false
        is in no softmax, and its value and gradient are exactly 0. None counts all.

    Returns:
      [batch, time], float32 (float64 if an input is). +inf where the student gives
      weight 0 (a score of -inf) to a key that the teacher does not.

    Numerics: As `forward_kl`, which does the same for cross-attention:
    [batch, heads, queries, keys] to [batch, heads, queries], padded keys at -inf.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([[[[0.5, 0.5], [0.5, 0.5]]]]))
      >>> student = jnp.log(jnp.array([[[[0.25, 0.75], [0.5, 0.5]]]]))
      >>> values = attention_map_kl(student, teacher)       # .5 log 2 + .5 log(2/3), 0
      >>> [round(float(value), 4) for value in values[0]]
      [0.1438, 0.0]

    Reference: Wang, Wei, Dong, Bao, Yang, Zhou, "MiniLM: Deep Self-Attention
    Distillation for Task-Agnostic Compression of Pre-Trained Transformers", NeurIPS
    2020, arXiv 2002.10957, section 3.1. On scores: Jiao et al., "TinyBERT", Findings of
    EMNLP 2020, arXiv 1909.10351, section 3.1.
    """
    name = "attention_map_kl"
    check_features(name, "batch heads queries keys", student=student, teacher=teacher)
    batch, _, queries, keys = jnp.shape(student)
    if queries != keys:
        fail(
            name,
            "student",
            "have as many queries as keys",
            f"{queries} and {keys}",
            "For cross-attention use forward_kl, with padded keys at -inf.",
        )
    check_where(name, where, (batch, queries))
    mask = numerics.as_mask(where)
    dtype = numerics.compute_dtype(student, teacher)
    log_s, log_t = (
        jax.nn.log_softmax(
            _between_tokens(jnp.asarray(x).astype(dtype), _each_head(mask))
        )
        for x in (student, jax.lax.stop_gradient(teacher))
    )
    values = numerics.zero_masked(numerics.kl(log_t, log_s), _each_head(mask))
    return jnp.mean(values, axis=1)


def _each_head(mask: Bool[Array, "b t"] | None) -> Bool[Array, "b 1 t"] | None:
    return None if mask is None else mask[:, None]


def _log_relation(
    x: Float[Array, "b t d"], mask: Bool[Array, "b t"] | None
) -> Float[Array, "b t t"]:
    """Log of the softmax over tokens of X X' / sqrt(d)."""
    scores = jnp.einsum("bqd,bkd->bqk", x, x, precision=features.PRECISE)
    return jax.nn.log_softmax(_between_tokens(scores / math.sqrt(x.shape[-1]), mask))


def _between_tokens(
    scores: Float[Array, "*b t t"], mask: Bool[Array, "..."] | None
) -> Float[Array, "*b t t"]:
    """Scores with masked keys at -inf, and the rows of masked queries all at 0."""
    if mask is None:
        return scores
    keys = jnp.where(mask[..., None, :], scores, -jnp.inf)
    return jnp.where(mask[..., :, None], keys, jnp.zeros((), scores.dtype))
