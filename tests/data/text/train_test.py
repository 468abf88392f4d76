"""A run on text, from the file to the checkpoint: it learns, resumes, is checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from flax import nnx

from distilljax import objectives
from distilljax.config import Config
from distilljax.data import Loader
from distilljax.data.text import Jsonl, Packed, Tokenized, TokenizerJson
from distilljax.sharding import mesh_from_string
from distilljax.train import train
from tests.data.text.tiny import documents, write_jsonl

pytestmark = pytest.mark.slow


class BigramModel(nnx.Module):
    """The next token from this one."""

    def __init__(self, vocab_size: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab_size, 16, rngs=rngs)
        self.out = nnx.Linear(16, vocab_size, rngs=rngs)

    def __call__(self, tokens, positions=None, segment_ids=None):
        return self.out(self.embed(tokens))


@dataclass(frozen=True)
class Bigram:
    vocab_size: int = 320

    def __call__(self, rngs: nnx.Rngs) -> BigramModel:
        return BigramModel(self.vocab_size, rngs)


@pytest.fixture
def config(model, tmp_path, monkeypatch):
    only = jax.devices()[:1]
    monkeypatch.setattr(
        "distilljax.train.mesh_from_string", lambda text: mesh_from_string(text, only)
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in documents(200)])
    text = Tokenized(Jsonl((path,)), TokenizerJson(str(model)))

    def make(steps: int, student: Bigram = Bigram()) -> Config:
        return Config(
            name="bigram",
            student=student,
            objective=objectives.CrossEntropy(),
            data=Packed(text, 64, split="train", validation_fraction=0.1),
            validation=Packed(text, 64, split="validation", validation_fraction=0.1),
            loader=Loader(8),
            steps=steps,
            select=None,
            log_every_steps=1,
        )

    return make


def losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if r["split"] == "train"}


def test_a_run_that_resumes_sees_what_a_whole_one_does(config, tmp_path):
    train(config(24), tmp_path / "whole")
    train(config(11), tmp_path / "parts")
    train(config(24), tmp_path / "parts")
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "parts") == whole
    assert whole[24] < whole[1]


def test_a_student_with_fewer_classes_than_tokens_is_an_error(config, tmp_path):
    with pytest.raises(ValueError, match="at most as many tokens as the model has"):
        train(config(5, Bigram(300)), tmp_path / "run")
