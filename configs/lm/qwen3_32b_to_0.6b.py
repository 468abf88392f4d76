"""Qwen3, 32B to 0.6B, on a pod: as configs/lm/llama_70b_to_8b.py, which says more.

    distilljax train configs/lm/qwen3_32b_to_0.6b.py --workdir W --arms smoke --seeds 0

For 64 chips of TPU v6e (8x8). The vocabularies of the two are one, padded to 151,936
classes in both; the student's head is tied, the teacher's is not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax

from distilljax import data, models, objectives, optimizers, students
from distilljax.config import Config, load_module

shared = load_module(Path(__file__).with_name("_recipe.py"))

STEPS = 20_000
CONTEXT = 4_096
TEACHER, STUDENT = "Qwen/Qwen3-32B", "Qwen/Qwen3-0.6B"

STUDENT_SHAPE = models.DecoderConfig(
    vocab_size=151_936,
    width=1_024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    ffn_width=3_072,
    max_length=40_960,
    rope=models.Rope(base=1_000_000.0),
    qk_norm=True,
    norm_eps=1e-6,
    scan=True,
    remat=jax.checkpoint_policies.nothing_saveable,
)
TEACHER_SHAPE = replace(
    STUDENT_SHAPE,
    width=5_120,
    num_layers=64,
    num_heads=64,
    ffn_width=25_600,
    tied=False,
    remat=None,
)


def config(seed: int = 0) -> Config:
    """The whole recipe."""
    return Config(
        name="lm/qwen3_32b_to_0.6b",
        description="Qwen3 0.6B, taught by 32B on text.",
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
            learning_rate=optimizers.WarmupCosine(1e-4, STEPS, warmup_steps=500),
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
