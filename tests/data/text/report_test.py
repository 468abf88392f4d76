"""The numbers of a report are those of the rows, and its examples show the mask."""

from __future__ import annotations

import numpy as np
import pytest

from distilljax.data import Loader
from distilljax.data.text import (
    ChatTemplate,
    Packed,
    Padded,
    Texts,
    Tokenized,
    TokenizerJson,
    summarize,
)
from distilljax.data.text.report import as_html, visible
from tests.data.text.padded_test import Labelled
from tests.data.text.tiny import conversation, documents, packed


@pytest.fixture
def chats(model):
    talks = [conversation(f"Who {i}?", "Her aunt.", "Why?", "So.") for i in range(15)]
    talks += [conversation("Who?"), conversation("Who?", "x" * 500), talks[0]]
    text = Tokenized(Texts(talks), TokenizerJson(str(model)), ChatTemplate(str(model)))
    return Packed(text, 128)()


def test_numbers_are_those_of_the_rows(model):
    texts = [*documents(50), "", "Her rich aunt"]
    rows = packed(model, texts)()
    found = summarize(rows, num_examples=3)
    assert (found.documents, found.kept, found.drops) == (52, 51, {"empty": 1})
    whole = list(rows)
    assert found.rows == len(whole)
    used = sum(int((row["segment_ids"] > 0).sum()) for row in whole)
    assert found.used == used
    assert found.fill == used / (64 * len(whole))
    lengths = sorted(rows.store.lengths[rows.kept].tolist())
    assert found.tokens == sum(lengths)
    assert found.num_bytes == sum(len(text.encode()) for text in texts)
    assert (found.lengths[0], found.lengths[-1]) == (lengths[0], lengths[-1])
    assert found.lengths[3] == lengths[len(lengths) // 2]
    said = dict(found.lines())
    assert said["documents"] == "51 of 52; dropped: 1 empty"
    assert said["supervised"] == f"100.0 % of {used:,} predictions"
    segments = sum(int(row["segment_ids"].max()) for row in whole)
    assert said["segments"] == f"{segments / len(whole):.1f} in a row"


def test_of_conversations_it_says_how_much_is_learnt(chats):
    found = summarize(chats)
    assert found.drops == {"too long": 1, "nothing to learn": 1}
    assert found.copies == 1
    learnt = sum(int(row["loss_mask"].sum()) for row in chats)
    said = dict(found.lines())["supervised"]
    assert said == f"{100 * learnt / found.used:.1f} % of {found.used:,} predictions"
    batches = Loader(1, shuffle=False)(chats, seed=0)
    counted = sum(int(next(batches)["loss_mask"].sum()) for _ in range(len(chats)))
    assert 0 < counted == learnt < found.used


def test_of_a_split_it_says_how_many_documents_are_in_the_other(model):
    rows = packed(model, documents(90), split="train", validation_fraction=0.2)()
    said = dict(summarize(rows).lines())["documents"]
    kept = len(rows.kept)
    assert said == f"{kept} of {kept}; dropped: none (90 with the other split)"


def test_of_single_documents_it_says_what_is_cut_and_the_classes(model):
    texts = documents(60, longest=4)
    text = Tokenized(Labelled(texts), TokenizerJson(str(model)))
    rows = Padded(text, 32)()
    found = summarize(rows, num_examples=4)
    assert found.used == sum(int(row["segment_ids"].sum()) for row in rows)
    said = dict(found.lines())
    long = int((rows.store.lengths > 32).sum())
    assert said["cut"] == f"{long} documents are longer than a row"
    bath = int(rows.labels.sum())
    assert sorted(said["classes"].split(", ")) == [
        f"Bath {bath}",
        f"elsewhere {60 - bath}",
    ]
    for shown in found.shown:
        number, name = shown.where.removeprefix("document ").split(": ")
        assert (name == "Bath") == ("Bath" in texts[int(number)])
        ((part, learnt),) = shown.parts
        assert not learnt
        assert texts[int(number)].startswith(part.removesuffix("<|im_end|>"))


def test_examples_are_text_cut_where_the_mask_changes(chats):
    shown = summarize(chats, num_examples=2).shown
    assert len(shown) == 2
    first = shown[0]
    assert first.where.startswith("document ")
    texts = [text for text, _ in first.parts]
    assert [learnt for _, learnt in first.parts] == [False, True, False, True, False]
    assert texts[0].startswith("<|im_start|>user\nWho ")
    assert texts[0].endswith("assistant\n")
    assert texts[1] == "Her aunt.<|im_end|>"
    assert texts[3] == "So.<|im_end|>"
    assert summarize(chats, num_examples=2).shown == shown


def test_of_a_text_all_is_learnt_but_its_first_token(model):
    rows = packed(model, ["Her rich aunt " * 100], context=400)()
    (shown,) = summarize(rows, num_examples=1).shown
    assert [learnt for _, learnt in shown.parts] == [False, True]
    length = int(rows.store.lengths[0])
    assert shown.num_more > 0
    assert shown.where.endswith(f"of {length:,}")


def test_no_terminal_obeys_the_data():
    assert visible("a\x1b[2Jb\r\n\u202ec") == "a\\x1b[2Jb\\r\n\\u202ec"
    assert visible("café 😀") == "café 😀"


def test_the_page_is_escaped_and_marks_what_is_learnt(model):
    talk = conversation("<script>", "a & b")
    text = Tokenized(
        Texts((talk,)), TokenizerJson(str(model)), ChatTemplate(str(model))
    )
    page = as_html({"data": summarize(Packed(text, 128)())})
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "<mark>a &amp; b&lt;|im_end|&gt;</mark>" in page
    assert "<h2>data</h2>" in page


def test_of_chosen_rows_the_examples_are_theirs(model):
    rows = packed(model, documents(50))()
    chosen = np.array([3, 5])
    found = summarize(rows, 100, chosen=chosen)
    assert dict(found.lines())["chosen"].startswith("2 of these rows, ")
    assert found.rows == len(rows)
    pieces = np.concatenate([rows.units(int(i))[0] for i in chosen])
    assert len(found.shown) == len(np.unique(pieces))
    assert summarize(rows, 3, chosen=chosen[:0]).shown == ()
    whole = summarize(rows, 1000)
    assert {one.where for one in found.shown} < {one.where for one in whole.shown}
