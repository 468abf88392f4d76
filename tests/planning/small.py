"""A config of small language models, for the tests of plans."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest

from distilljax import data, models, objectives, optimizers, students
from distilljax.config import Config
from distilljax.data import text

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: pip install [plan]"
)
SMALL = models.DecoderConfig(
    vocab_size=264,
    width=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    ffn_width=48,
    tied=False,
    scan=True,
)


def language_model(**fields) -> Config:
    documents = text.Tokenized(
        text.Texts(("a text of some words",)), text.ByteTokenizer()
    )
    base = Config(
        name="small",
        student=SMALL,
        teacher=students.Untrained(replace(SMALL, num_layers=4)),
        objective=objectives.LogitKD(),
        optimizer=optimizers.AdamW(learning_rate=1e-3),
        data=text.Packed(documents, 64),
        loader=data.Loader(batch_size=8),
        eval_batch_size=8,
        steps=1,
        mesh="fsdp=4,tensor=2",
        student_rules=models.DECODER_RULES,
        teacher_rules=models.DECODER_RULES,
    )
    return replace(base, **fields)
