"""A config with text, for `distilljax data`; the files are named by the environment."""

from __future__ import annotations

import os
from pathlib import Path

from distilljax import models, objectives
from distilljax.config import Config
from distilljax.data import Loader, Slice
from distilljax.data.text import (
    ChatTemplate,
    Jsonl,
    Mixture,
    Packed,
    Tokenized,
    TokenizerJson,
)

FOLDER = Path(os.environ.get("DISTILLJAX_TINY_TEXT", "tiny_text"))
TOKENIZER = TokenizerJson(str(FOLDER))
TEXTS = Tokenized(Jsonl((str(FOLDER / "texts.jsonl"),)), TOKENIZER)
TALKS = Tokenized(
    Jsonl((str(FOLDER / "talks.jsonl"),), field="messages"),
    TOKENIZER,
    ChatTemplate(str(FOLDER)),
)


def config(seed: int = 0) -> Config:
    return Config(
        name="tiny_text",
        student=models.MLP(num_features=64, hidden=(4,), num_classes=320),
        objective=objectives.CrossEntropy(),
        data=Mixture(
            {"texts": Packed(TEXTS, 64), "talks": Packed(TALKS, 64)},
            {"texts": 3, "talks": 1},
        ),
        validation=Packed(TALKS, 64),
        loader=Loader(4),
        steps=10,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    import dataclasses

    alone = dataclasses.replace(config(seed), data=Packed(TEXTS, 64), validation=None)
    part = dataclasses.replace(
        config(seed),
        data=Slice(config(seed).data, 0, 8),
        validation=None,
        other_tests={"talks": Slice(Packed(TALKS, 64), 0, 1)},
    )
    return {"texts": alone, "part": part}
