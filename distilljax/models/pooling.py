"""How the hidden states of a text become one vector.

Suffixes of names are axes: b batch, t time, d width, s segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distilljax._checks import check_count
from distilljax.terms import Outputs


def mean_pool(
    hidden_btd: Float[Array, "batch time width"],
    segment_ids_bt: Int[Array, "batch time"] | None = None,
    *,
    num_segments: int | None = None,
) -> Float[Array, "batch width"] | Float[Array, "batch segments width"]:
    """The mean over the tokens of each text: a sentence as one vector.

    Args:
      hidden_btd: Last hidden states, [batch, time, width].
      segment_ids_bt: Number of the text that a token is of; 0 is padding, which does
        not count. None: every token counts.
      num_segments: Texts in a packed row, at most; None takes a row as one text.

    Returns:
      [batch, width], or [batch, num_segments, width] with text 1 at 0. A text without
      tokens is 0.

    Numerics: sums in float32, the result in the type of `hidden_btd`.

    Example:
      >>> hidden = jnp.array([[[1.0], [3.0], [8.0], [9.0]]])
      >>> ids = jnp.array([[1, 1, 2, 0]])
      >>> mean_pool(hidden, ids).tolist()
      [[4.0]]
      >>> mean_pool(hidden, ids, num_segments=2).tolist()
      [[[2.0], [8.0]]]

    Reference: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, arXiv 1908.10084,
    section 3.
    """
    if segment_ids_bt is None:
        segment_ids_bt = jnp.ones(hidden_btd.shape[:2], jnp.int32)
    if num_segments is None:
        counts_bst = (segment_ids_bt != 0)[:, None]
    else:
        check_count("mean_pool", "num_segments", num_segments)
        numbers_s = jnp.arange(1, num_segments + 1)
        counts_bst = segment_ids_bt[:, None] == numbers_s[None, :, None]
    hidden_32 = hidden_btd.astype(jnp.float32)
    sums_bsd = jnp.einsum("bst,btd->bsd", counts_bst.astype(jnp.float32), hidden_32)
    number_bs = jnp.maximum(jnp.sum(counts_bst, axis=-1), 1)
    means_bsd = (sums_bsd / number_bs[..., None]).astype(hidden_btd.dtype)
    return means_bsd[:, 0] if num_segments is None else means_bsd


def first_token(
    hidden_btd: Float[Array, "batch time width"],
    segment_ids_bt: Int[Array, "batch time"] | None = None,
) -> Float[Array, "batch width"]:
    """The first token of each row, [CLS] of BERT; for rows of one text.

    Args:
      hidden_btd: Last hidden states, [batch, time, width].
      segment_ids_bt: Not used.

    Example:
      >>> first_token(jnp.array([[[1.0], [3.0]]])).tolist()
      [[1.0]]
    """
    del segment_ids_bt
    return hidden_btd[:, 0]


def sentence_embedding(model: Callable[..., Outputs], batch: Any) -> Outputs:
    """A forward that adds the feature `embedding`: `mean_pool`, of length 1.

    This is what all-MiniLM-L6-v2 and most sentence encoders are used with. Pass it as
    `student_forward` and `teacher_forward`; the objective then names "embedding".

    Args:
      model: An `Encoder`.
      batch: Has `tokens`, and maybe `positions` and `segment_ids`, one text a row.

    Example:
      >>> from flax import nnx
      >>> from distilljax.models import EncoderConfig
      >>> config = EncoderConfig(vocab_size=64, width=32, num_layers=1, num_heads=4,
      ...                        ffn_width=48)
      >>> batch = {"tokens": jnp.array([[1, 2, 3]])}
      >>> x = sentence_embedding(config(nnx.Rngs(0)), batch).features["embedding"]
      >>> x.shape, round(float(jnp.sum(x * x)), 4)
      ((1, 32), 1.0)
    """
    segment_ids = batch.get("segment_ids")
    outputs = model(batch["tokens"], batch.get("positions"), segment_ids)
    x_bd = mean_pool(outputs.features["last_hidden"], segment_ids).astype(jnp.float32)
    square_b1 = jnp.sum(x_bd * x_bd, axis=-1, keepdims=True)
    # a text without tokens stays 0, with a finite gradient
    x_bd = x_bd * jax.lax.rsqrt(jnp.maximum(square_b1, 1e-24))
    features = {**outputs.features, "embedding": x_bd}
    return Outputs(logits=outputs.logits, features=features)
