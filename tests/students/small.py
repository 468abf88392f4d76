"""A decoder small enough to be made again in every test, and what it says."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import nnx

from distilljax.models import Decoder, DecoderConfig, blocked_attention
from distilljax.students._linears import linears

CONFIG = DecoderConfig(
    vocab_size=32,
    width=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_width=24,
    embed_scale=50.0,  # so that norm_eps is nothing beside the residual stream
    attention=blocked_attention,
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 8), 0, CONFIG.vocab_size)
BATCH = {"tokens": TOKENS}


def decoder(seed: int = 0, **changes) -> Decoder:
    """One whose layers say much beside its embedding, as those of trained ones do."""
    model = replace(CONFIG, **changes)(nnx.Rngs(seed))
    for path, linear in linears(model).items():
        if path.startswith("layers"):
            linear.kernel.set_value(8 * linear.kernel[...])
    return model


def logits_of(model, tokens=TOKENS):
    graphdef, state = nnx.split(model)
    says = jax.jit(lambda s, t: nnx.merge(graphdef, s)(t).logits.logits())
    return says(state, tokens)


def arrays_of(model) -> dict:
    """Every array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {jax.tree_util.keystr(path): x for path, x in leaves}
