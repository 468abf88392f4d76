"""Encoders go through the loop: embeddings without labels, and classes of texts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from distilljax import data, losses, optimizers, students
from distilljax.config import Config
from distilljax.data.text import Padded, Texts, Tokenized, TokenizerJson
from distilljax.evaluation.embeddings import TeacherSimilarity
from distilljax.models import EncoderConfig, save_pretrained, sentence_embedding
from distilljax.objectives import AttentionKD, CrossEntropy, FeatureKD, LogitKD, Sum
from distilljax.train import train
from distilljax.workdir import TrainedRun
from tests.data.text.tiny import documents, train_tokenizer

ENCODER = EncoderConfig(
    vocab_size=320, width=16, num_layers=2, num_heads=2, ffn_width=24, max_length=16
)
TEXTS = tuple(documents(48, longest=2))


@dataclass(frozen=True)
class Labelled(Texts):
    """Texts of which some are about Bath."""

    class_names = ("elsewhere", "Bath")

    @property
    def labels(self):
        return np.array(["Bath" in text for text in self.texts], np.int32)


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLJAX_CACHE", str(tmp_path / "cache"))
    return TokenizerJson(str(train_tokenizer(tmp_path / "tokenizer")))


@pytest.fixture
def teacher(tmp_path):
    import jax
    from flax import nnx

    model = ENCODER(nnx.Rngs(0))
    # of a size at which attention looks somewhere
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: 3 * x, state))
    save_pretrained(model, tmp_path / "teacher")
    return students.Pretrained(str(tmp_path / "teacher"))


def config(rows, **fields) -> Config:
    return Config(
        name="encoder",
        data=rows,
        loader=data.Loader(16),
        optimizer=optimizers.AdamW(learning_rate=1e-2),
        steps=30,
        select=None,
        mesh="data=4,fsdp=2",
        eval_every_steps=30,
        eval_batch_size=16,
        **fields,
    )


def test_embeddings_are_distilled_without_labels(tokenizer, teacher, tmp_path):
    rows = Padded(Tokenized(Texts(TEXTS), tokenizer), 16, token_mask=True)
    pairs = {"layers/0/attention/query": "layers/1/attention/query"}
    embedding = {"embedding": "embedding"}
    run = config(
        rows,
        student=students.KeptLayers(teacher, (1,)),
        teacher=teacher,
        student_forward=sentence_embedding,
        teacher_forward=sentence_embedding,
        objective=Sum(
            {
                "cosine": FeatureKD(embedding, loss=losses.hidden_cosine),
                "attention": AttentionKD(pairs, num_relation_heads=2, weight=0.1),
            }
        ),
        probes={
            "texts": TeacherSimilarity(teacher, rows, sentence_embedding, num_texts=20)
        },
    )
    before = train(replace(run, steps=1), tmp_path / "before")
    after = train(run, tmp_path / "after")
    found = [r["student"]["probes"]["texts"]["cosine"] for r in (before, after)]
    assert found[1] > 0.5 * found[0] + 0.5
    assert after["teacher"]["probes"]["texts"]["cosine"] == pytest.approx(1, abs=1e-5)


def test_classes_of_texts_are_taught(tokenizer, teacher, tmp_path):
    rows = Padded(Tokenized(Labelled(TEXTS), tokenizer), 16)
    first = config(
        rows,
        test=rows,
        student=students.WithHead(students.Copied(teacher), 2),
        objective=CrossEntropy(),
    )
    found = train(first, tmp_path / "teacher_run")
    assert found["student"]["accuracy"] > 0.95
    assert found["class_names"] == ["elsewhere", "Bath"]
    second = replace(
        first,
        student=students.WithHead(students.KeptLayers(teacher, 1), 2),
        teacher=TrainedRun(str(tmp_path / "teacher_run")),
        objective=LogitKD(temperature=2.0, ce_weight=0.0),
    )
    found = train(second, tmp_path / "student_run")
    assert found["student"]["accuracy"] > 0.85
    assert found["teacher"]["accuracy"] > 0.95
    assert found["num_examples"] == 48
