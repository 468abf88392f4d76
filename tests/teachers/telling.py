"""A config whose teacher says what it sees, of enough text for a hundred shards.

What it says is whole numbers: no mesh and no number of processes rounds them otherwise.
"""

from __future__ import annotations

from pathlib import Path

from distilljax.config import Config, load_module
from distilljax.data.text import ByteTokenizer, Texts, Tokenized

tiny = load_module(Path(__file__).with_name("tiny.py"))
TEXTS = tuple(f"{number} times round the sea. " * (number % 7) for number in range(320))


def config(seed: int = 0) -> Config:
    return tiny.text_config(
        seed=seed,
        teacher=tiny.Telling(),
        teacher_forward=tiny.tell,
        data=tiny.rows(Tokenized(Texts(TEXTS), ByteTokenizer())),
    )
