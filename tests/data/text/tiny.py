"""A tokenizer that is trained in a moment, and documents for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from distilljax.data.text import Packed, Texts, Tokenized, TokenizerJson

SUBJECTS = ("The clever", "A handsome", "Her rich", "His poor", "That cheerful")
NOUNS = ("sister", "neighbour", "friend", "governess", "clergyman", "aunt", "cousin")
VERBS = ("admires", "visits", "avoids", "deceives", "remembers", "marries")
PLACES = ("in Highbury.", "at Bath.", "near London.", "by the sea.", "at the ball.")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of a small language."""
    rng = np.random.default_rng(seed)
    words = (SUBJECTS, NOUNS, VERBS, NOUNS, PLACES)
    return [" ".join(str(rng.choice(w)) for w in words) for _ in range(count)]


def documents(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Texts of one to ``longest`` sentences."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(sentences(int(rng.integers(1, longest + 1)), seed=seed * 1000 + i))
        for i in range(count)
    ]


def train_tokenizer(
    folder: Path, vocab_size: int = 320, texts: list[str] | None = None
) -> Path:
    """A byte-level BPE in the files of a model's folder."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or sentences(300), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(*turns: str) -> list[dict[str, Any]]:
    """Turns of user and assistant, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def packed(folder: Path, texts: Any, context: int = 64, **fields: Any) -> Packed:
    """The config of rows of texts in memory, with the tokenizer in ``folder``."""
    text = Tokenized(Texts(tuple(texts)), TokenizerJson(str(folder)))
    return Packed(text, context, **fields)
