"""Embeddings measured: by hand for cosines, by a teacher that is the student."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax.data.text import TokenizerJson
from distilljax.evaluation.embeddings import (
    HumanSimilarity,
    TeacherSimilarity,
    cosines,
    embed,
)
from distilljax.models import EncoderConfig, sentence_embedding
from distilljax.sharding import mesh_from_string
from distilljax.terms import Outputs
from tests.data.text.tiny import documents, train_tokenizer

CONFIG = EncoderConfig(
    vocab_size=512, width=16, num_layers=1, num_heads=4, ffn_width=24, max_length=64
)


def rows(count: int = 7):
    tokens = np.random.default_rng(0).integers(0, 32, (count, 8)).astype(np.int32)
    return [{"tokens": x, "segment_ids": np.ones(8, np.int32)} for x in tokens]


@dataclass(frozen=True)
class Fixed:
    """What loads a model that is there."""

    model: nnx.Module

    def __call__(self):
        return self.model


def test_every_row_is_embedded_in_its_place():
    model, some = CONFIG(nnx.Rngs(0)), rows(53)  # a batch, and a part of one
    found = embed(model, sentence_embedding, some)
    assert found.shape == (53, 16)
    for i in (0, 49, 52):
        alone = embed(model, sentence_embedding, [some[i]])
        np.testing.assert_allclose(found[i], alone[0], atol=1e-6)
    batch = {name: np.stack([row[name] for row in some[:2]]) for name in some[0]}
    want = nnx.jit(sentence_embedding)(model, batch).features["embedding"]
    np.testing.assert_allclose(found[:2], want, atol=1e-6)


def test_a_model_on_one_device_is_measured_on_a_mesh():
    model = CONFIG(nnx.Rngs(0))
    want = embed(model, sentence_embedding, rows())
    one = jax.device_put(nnx.state(model), jax.devices()[0])
    nnx.update(model, one)
    with jax.set_mesh(mesh_from_string("data=4,fsdp=2")):
        np.testing.assert_allclose(
            embed(model, sentence_embedding, rows()), want, atol=1e-6
        )


def test_cosines_are_those_of_pairs():
    x = np.array([[3.0, 4.0], [4.0, 3.0], [-3.0, -4.0]])
    np.testing.assert_allclose(cosines(x), [24 / 25, -1, -24 / 25])


def test_the_teacher_is_like_itself_and_not_like_another():
    model = CONFIG(nnx.Rngs(0))
    measure = TeacherSimilarity(Fixed(model), rows, sentence_embedding)
    assert measure(model, sentence_embedding) == {
        "cosine": pytest.approx(1, abs=1e-6),
        "pair_correlation": pytest.approx(1, abs=1e-6),
        "num_texts": 7,
    }
    other = measure(CONFIG(nnx.Rngs(1)), sentence_embedding)
    assert other["cosine"] < 0.9

    def turned(model, batch):
        """The same cosines between texts, with every other sign turned."""
        x = sentence_embedding(model, batch).features["embedding"]
        return Outputs(features={"embedding": x * jnp.array([1.0, -1.0] * 8)})

    found = measure(model, turned)
    assert found["cosine"] < 0.9
    assert found["pair_correlation"] == pytest.approx(1, abs=1e-5)

    def wider(model, batch):
        x = sentence_embedding(model, batch).features["embedding"]
        return Outputs(features={"embedding": jnp.concatenate([x, x], axis=-1)})

    found = measure(model, wider)
    assert found["cosine"] is None
    assert found["pair_correlation"] == pytest.approx(1, abs=1e-5)


def test_some_texts_are_enough():
    model = CONFIG(nnx.Rngs(0))
    measure = TeacherSimilarity(Fixed(model), rows, sentence_embedding, num_texts=3)
    assert measure(model, sentence_embedding)["num_texts"] == 3
    with pytest.raises(ValueError, match="num_texts must be at least 2, got 1"):
        TeacherSimilarity(Fixed(model), rows, sentence_embedding, num_texts=1)


def test_a_forward_without_embedding_is_refused():
    with pytest.raises(ValueError, match="the forward must return the feature 'emb"):
        embed(CONFIG(nnx.Rngs(0)), lambda m, b: m(b["tokens"]), rows())


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Five texts, and judgements that are their cosines by a model, but for one."""
    monkeypatch.setenv("DISTILLJAX_CACHE", str(tmp_path / "cache"))
    train_tokenizer(tmp_path / "model")
    folder = tmp_path / "lee"
    folder.mkdir()
    (folder / "lee.cor").write_text("\n".join(documents(5)), encoding="latin-1")
    np.savetxt(folder / "similarities0-1.txt", np.eye(5))
    tokenizer = TokenizerJson(str(tmp_path / "model"))
    return folder, HumanSimilarity(str(folder), tokenizer, context=32)


def test_judgements_are_compared_pair_by_pair(judged):
    folder, measure = judged
    model = CONFIG(nnx.Rngs(0))
    seen = {}

    def forward(model, batch):
        outputs = sentence_embedding(model, batch)
        seen["tokens"] = batch["tokens"].shape
        return outputs

    upper = np.triu_indices(5, 1)
    table = np.eye(5)
    table[upper] = np.arange(10) / 10
    np.savetxt(folder / "similarities0-1.txt", table)
    found = measure(model, forward)
    assert found["num_pairs"] == 10
    assert seen["tokens"][1] == 32
    assert -1 <= found["pearson"] <= 1
    # a model that is asked for what people said agrees with them
    table[upper] = 2 * table[upper] - 1
    np.savetxt(folder / "similarities0-1.txt", table)
    again = measure(model, forward)
    assert again["pearson"] == pytest.approx(found["pearson"], abs=1e-6)
    table[upper] = -table[upper]
    np.savetxt(folder / "similarities0-1.txt", table)
    assert measure(model, forward)["pearson"] == pytest.approx(-found["pearson"])


def test_files_that_are_not_there_or_do_not_fit_are_refused(judged, tmp_path):
    folder, measure = judged
    model = CONFIG(nnx.Rngs(0))
    np.savetxt(folder / "similarities0-1.txt", np.eye(4))
    with pytest.raises(ValueError, match=r"a row and a column for each of 5 texts"):
        measure(model, sentence_embedding)
    lost = HumanSimilarity(str(tmp_path / "none"), measure.tokenizer)
    with pytest.raises(ValueError, match=r"hold lee\.cor and similarities.*DIR lee"):
        lost(model, sentence_embedding)
