"""Gemma 2, 9B to 2B, on a pod: as configs/lm/llama_70b_to_8b.py, which says more.

    distilljax train configs/lm/gemma2_9b_to_2b.py --workdir W --arms smoke --seeds 0

For 64 chips of TPU v5e (8x8). The logits have a soft-cap, the largest vocabulary of
the field, 256,000, and every other layer sees 4,096 tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
from flax import nnx

from distilljax import data, models, objectives, optimizers, students
from distilljax.config import Config, load_module

shared = load_module(Path(__file__).with_name("_recipe.py"))

STEPS = 20_000
CONTEXT = 4_096
TEACHER, STUDENT = "google/gemma-2-9b", "google/gemma-2-2b"

STUDENT_SHAPE = models.DecoderConfig(
    vocab_size=256_000,
    width=2_304,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    ffn_width=9_216,
    max_length=8_192,
    activation=nnx.gelu,
    window=4_096,
    local_layers=(True, False),
    post_norm=True,
    unit_offset=True,
    norm_eps=1e-6,
    embed_scale=2_304**0.5,
    attention_scale=256**-0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    scan=True,
    remat=jax.checkpoint_policies.nothing_saveable,
)
TEACHER_SHAPE = replace(
    STUDENT_SHAPE,
    width=3_584,
    num_layers=42,
    num_heads=16,
    num_kv_heads=8,
    ffn_width=14_336,
    embed_scale=3_584**0.5,
    remat=None,
)


def config(seed: int = 0) -> Config:
    """The whole recipe."""
    return Config(
        name="lm/gemma2_9b_to_2b",
        description="Gemma 2 2B, taught by 9B on text.",
        expected="a lower NLL than from the text alone; not run at this size yet",
        student=students.Copied(
            students.Pretrained(
                STUDENT,
                dtype="float32",
                scan=True,
                remat=STUDENT_SHAPE.remat,
                shape=STUDENT_SHAPE,
            )
        ),
        teacher=students.Pretrained(
            TEACHER, dtype="bfloat16", scan=True, shape=TEACHER_SHAPE
        ),
        objective=objectives.LogitKD(temperature=1.0),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(5e-5, STEPS, warmup_steps=500),
            clip_norm=1.0,
        ),
        data=shared.rows(TEACHER, CONTEXT, "train"),
        validation=data.Slice(shared.rows(TEACHER, CONTEXT, "validation"), 0, 512),
        loader=data.Loader(batch_size=512),
        accumulate=4,
        compute_dtype="bfloat16",
        steps=STEPS,
        select="nll",
        eval_every_steps=1_000,
        eval_batch_size=64,
        checkpoint_every_steps=500,
        mesh="fsdp=16,tensor=4",
        student_rules=models.DECODER_RULES,
        teacher_rules=models.DECODER_RULES,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """The whole recipe, the labels alone on the same budget, and the smallest form."""
    return shared.arms(config(seed), TEACHER_SHAPE, STUDENT_SHAPE)
