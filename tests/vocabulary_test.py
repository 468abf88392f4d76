"""Tokens that mean the same to data, teacher and student, or an error that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

from distilljax import models, objectives, students
from distilljax.config import Config
from distilljax.data import Loader
from distilljax.data.text import ByteTokenizer, Packed, Texts, Tokenized, TokenizerJson
from distilljax.sharding import mesh_from_string
from distilljax.train import evaluate, train
from distilljax.vocabulary import aligned, check_same_tokens, check_tokenizers
from tests.data.text.gguf_test import write
from tests.data.text.tiny import documents, train_tokenizer

SHAPE = models.DecoderConfig(
    vocab_size=272, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    ffn_width=16,
)  # fmt: skip


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """A teacher of 272 classes and a student of 264, of 257 tokens."""
    only = jax.devices()[:1]
    monkeypatch.setattr(
        "distilljax.train.mesh_from_string", lambda text: mesh_from_string(text, only)
    )
    text = Tokenized(
        Texts(tuple(documents(8))), ByteTokenizer(), cache_dir=str(tmp_path)
    )
    rows = Packed(text, 32)
    return Config(
        name="padded",
        student=replace(SHAPE, vocab_size=264),
        teacher=students.Untrained(SHAPE, seed=7),
        objective=objectives.LogitKD(),
        data=rows,
        validation=rows,
        loader=Loader(8),
        eval_batch_size=8,
        steps=1,
        select=None,
    )


@pytest.mark.slow
def test_vocabularies_that_are_padded_differently_are_one(config, tmp_path, capfd):
    """The KL is that of the tokens, in training and in every evaluation."""
    run = tmp_path / "run"
    train(config, run)
    said = "the student has 264 classes and the teacher 272: the loss is over the 257"
    assert said in capfd.readouterr().err
    found = evaluate(config, run, split="validation")
    capfd.readouterr()
    by_hand = replace(config, objective=objectives.LogitKD(num_classes=257))
    train(by_hand, tmp_path / "by_hand")
    assert said not in capfd.readouterr().err
    again = evaluate(by_hand, tmp_path / "by_hand", split="validation")
    assert found["student"]["kl_to_teacher"] > 0
    for key in ("kl_to_teacher", "nll"):
        assert found["student"][key] == again["student"][key]
        assert found["teacher"]["nll"] == again["teacher"]["nll"]


def test_what_no_padding_explains_is_left_to_be_refused(config):
    tokenizer = ByteTokenizer()()
    for student, teacher in ((264, 256), (256, 272), (None, 272), (264, None)):
        assert aligned(config, tokenizer, student, teacher) == (config, None)
    labels = replace(config, objective=objectives.FeatureKD({"a": "b"}))
    assert aligned(labels, tokenizer, 264, 272) == (labels, None)
    with pytest.raises(ValueError, match="at most as many tokens as the model has"):
        train(replace(config, student=replace(SHAPE, vocab_size=200)), Path("nowhere"))


def test_a_model_whose_tokenizer_cannot_be_read_is_believed(config, tmp_path):
    """Of SentencePiece in a GGUF file, or none at all."""
    path = write(tmp_path / "a.gguf", train_tokenizer(tmp_path), model="llama")
    models.save_pretrained(SHAPE(nnx.Rngs(0)), tmp_path / "bare")
    for source in (path, str(tmp_path / "bare")):
        teacher = students.Pretrained(source)
        check_tokenizers(replace(config, teacher=teacher), ByteTokenizer()())


def folder_of(path: Path, **fields) -> students.Pretrained:
    models.save_pretrained(replace(SHAPE, vocab_size=320)(nnx.Rngs(0)), path)
    train_tokenizer(path, **fields)
    return students.Pretrained(str(path))


def test_a_tokenizer_of_the_same_size_that_is_another_is_an_error(config, tmp_path):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    teacher = folder_of(right)
    train_tokenizer(wrong, texts=["other words of the same number"] * 9)
    config = replace(config, teacher=teacher, student=students.KeptLayers(teacher, 1))
    check_tokenizers(config, TokenizerJson(str(right))())
    with pytest.raises(ValueError, match=r"be that of .*right, got \d+ of \d+ tokens"):
        check_tokenizers(config, TokenizerJson(str(wrong))())
    # one that has fewer tokens, and the same, is padded
    stored = json.loads((right / "tokenizer.json").read_text())
    last = max(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    del stored["model"]["vocab"][last]
    stored["model"]["merges"].pop()
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    (fewer / "tokenizer.json").write_text(json.dumps(stored))
    check_tokenizers(config, TokenizerJson(str(fewer))())


@pytest.mark.parametrize("split", ["validation", "test", "other_tests"])
def test_every_split_has_the_tokens_of_the_data(config, tmp_path, split):
    """Else a perplexity would be printed that means nothing."""
    other = TokenizerJson(str(train_tokenizer(tmp_path / "other", vocab_size=260)))
    rows = replace(config.data, text=replace(config.data.text, tokenizer=other))
    part = {"news": rows} if split == "other_tests" else rows
    name = "news" if split == "other_tests" else split
    match = f"the tokenizer of {name} must be that of the data, got .* that differ; "
    with pytest.raises(ValueError, match=match):
        train(replace(config, **{split: part}), tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_images_and_equal_tokenizers_are_passed_over(config):
    source = config.data()
    check_same_tokens("test", source, config.data())
    check_same_tokens("test", [{}], source)
