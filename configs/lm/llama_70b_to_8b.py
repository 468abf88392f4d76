"""Llama 3.1, 70B to 8B, on a pod: the recipe in full, and its smallest form.

    distilljax train configs/lm/llama_70b_to_8b.py --workdir W --arms smoke --seeds 0
    distilljax train configs/lm/llama_70b_to_8b.py --workdir /mnt/runs/llama \
        --arms labels,distilled --seeds 0 --multihost

For 128 chips of TPU v5p (4x4x8). Teacher and student lie on one mesh: tensor
parallelism by 4 within a host, everything else over `fsdp`, and neither is ever whole
anywhere. Their logits, 128,256 for each token, are made for some positions at a time.
Weights are read from the Hugging Face hub, or from a folder of the same name; the text
is any number of Parquet files with a column `text`.

`smoke` has the shape of all this (families, untied heads, scans, remat, rules, packed
text) with random weights of a few thousand parameters; it runs in seconds on a laptop,
and on up to 32 devices, of which `--mesh=fsdp=2,tensor=4` makes the mesh of a pod.
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
TEACHER, STUDENT = "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-8B"

STUDENT_SHAPE = models.DecoderConfig(
    vocab_size=128_256,
    width=4_096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_width=14_336,
    max_length=131_072,
    rope=models.Rope(base=500_000.0, factor=8.0, original_length=8_192),
    norm_eps=1e-5,
    tied=False,
    scan=True,
    remat=jax.checkpoint_policies.nothing_saveable,
)
TEACHER_SHAPE = replace(
    STUDENT_SHAPE,
    width=8_192,
    num_layers=80,
    num_heads=64,
    ffn_width=28_672,
    remat=None,
)


def config(seed: int = 0) -> Config:
    """The whole recipe."""
    return Config(
        name="lm/llama_70b_to_8b",
        description="Llama 3.1 8B, taught by 70B on text.",
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
            learning_rate=optimizers.WarmupCosine(1e-5, STEPS, warmup_steps=500),
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
        eval_batch_size=128,
        checkpoint_every_steps=500,
        mesh="fsdp=32,tensor=4",
        student_rules=models.DECODER_RULES,
        teacher_rules=models.DECODER_RULES,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """The whole recipe, the labels alone on the same budget, and the smallest form."""
    return shared.arms(config(seed), TEACHER_SHAPE, STUDENT_SHAPE)
