"""One document in each row: what is kept of it, its class, and the Loader's terms."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from distilljax.data import Few, Loader, eval_batches, labels_of
from distilljax.data.text import Padded, Texts, Tokenized, TokenizerJson
from tests.data.text.packed_test import assert_same, global_batches
from tests.data.text.tiny import documents


@dataclass(frozen=True)
class Labelled(Texts):
    """Texts of which some are about Bath."""

    class_names = ("elsewhere", "Bath")

    @property
    def labels(self):
        return np.array(["Bath" in text for text in self.texts], np.int32)


TEXTS = (*documents(60, longest=4), "")


@pytest.fixture
def framed(model, tmp_path):
    """A tokenizer with a frame around each text, as BERT's is."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "BertProcessing",
        "sep": ["<|im_end|>", 2],
        "cls": ["<|im_start|>", 1],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return TokenizerJson(str(tmp_path))


@pytest.fixture
def text(framed):
    return Tokenized(Labelled(TEXTS), framed)


def test_a_row_is_a_document_and_its_class(text, framed):
    rows = Padded(text, 128)()
    assert len(rows) == 60
    assert rows.drops == {"empty": 1}
    assert (rows.num_classes, rows.class_names) == (2, ("elsewhere", "Bath"))
    tokenizer = framed()
    for i in (0, 31, 59):
        row = rows[i]
        ids = [1, *tokenizer.encode([TEXTS[i]])[0].ids.tolist(), 2]
        n = len(ids)
        assert row["tokens"].tolist() == ids + [0] * (128 - n)
        assert row["segment_ids"].tolist() == [1] * n + [0] * (128 - n)
        assert row["positions"].tolist() == [*range(n)] + [0] * (128 - n)
        assert row["labels"] == ("Bath" in TEXTS[i])
    with pytest.raises(IndexError):
        rows[60]


def test_a_document_that_is_too_long_is_cut_and_keeps_its_end(text):
    rows = Padded(text, 16)()
    cut = np.flatnonzero(rows.store.lengths[rows.kept] > 16)
    assert len(cut) > 10
    whole = rows.store.tokens(int(rows.kept[cut[0]]))
    row = rows[int(cut[0])]
    assert row["tokens"].tolist() == [*whole[:15].tolist(), 2]
    assert row["segment_ids"].all()


def test_a_document_that_is_too_long_is_dropped_or_refused(text):
    long = int((Padded(text, 128)().store.lengths > 48).sum())
    assert long > 10
    assert Padded(text, 48, long="drop")().drops == {"empty": 1, "too long": long}
    with pytest.raises(ValueError, match=r"must have at most 16 tokens, got \d+ "):
        Padded(text, 16, long="error")()


def test_batches_have_classes_and_are_elastic(text):
    rows = Padded(text, 32)()
    batch = next(Loader(4)(rows, seed=0))
    assert sorted(batch) == ["index", "labels", "positions", "segment_ids", "tokens"]
    assert batch["labels"].shape == (4,)
    whole, _ = global_batches(Loader(8), rows, 1, 12)
    first, state = global_batches(Loader(8), rows, 2, 10)
    rest, _ = global_batches(Loader(8), rows, 4, 2, state)
    assert_same([*first, *rest], whole)


def test_selections_and_evaluation_work_by_class(text):
    config = Padded(text, 32)
    few = Few(config, 10, seed=0)()
    assert np.bincount(labels_of(few)).tolist() == [5, 5]
    masks = [batch["loss_mask"] for batch in eval_batches(config(), 16)]
    assert masks[0].shape == (16,)
    assert sum(int(mask.sum()) for mask in masks) == 60


def test_without_classes_there_are_no_labels(framed):
    rows = Padded(Tokenized(Texts(TEXTS), framed), 32)()
    assert "labels" not in rows[0]
    assert rows.num_classes is None


def test_splits_are_those_of_packed_rows(text):
    parts = [
        Padded(text, 32, split=split, validation_fraction=0.3)()
        for split in ("train", "validation")
    ]
    kept = np.concatenate([part.kept for part in parts])
    assert sorted(kept.tolist()) == list(range(60))
    assert all(len(part) > 5 for part in parts)
    for part in parts:
        assert part.labels.tolist() == ["Bath" in TEXTS[i] for i in part.kept]


def test_tokens_have_a_mask_if_it_is_asked_for(text):
    plain, masked = Padded(text, 32)(), Padded(text, 32, token_mask=True)()
    assert "loss_mask" not in plain[0]
    assert plain.fingerprint != masked.fingerprint
    for i in (0, 31):
        row = masked[i]
        assert row["loss_mask"].dtype == bool
        assert row["loss_mask"].tolist() == (row["segment_ids"] == 1).tolist()
    batch = next(eval_batches(masked, 64))
    assert batch["loss_mask"].shape == (64, 32)
    assert not batch["loss_mask"][60:].any()
