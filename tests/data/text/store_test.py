"""Tokens on disk: encoded once, by one process, under a digest of what they are of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from distilljax.data.text import ChatTemplate, Jsonl, Texts, Tokenized, TokenizerJson
from distilljax.data.text.encoder import learnt
from tests.data.text.tiny import CHATML, conversation, documents, write_jsonl


@pytest.fixture
def text(model):
    return Tokenized(Texts(tuple(documents(30))), TokenizerJson(str(model)))


@contextlib.contextmanager
def counted(calls, title, total):
    calls.append((title, total))
    yield lambda done: None


def builds(config):
    calls = []
    config(lambda title, total: counted(calls, title, total))
    return len(calls)


def test_documents_are_encoded_once(text):
    assert builds(text) == 1
    assert builds(text) == 0
    assert builds(dataclasses.replace(text, documents=Texts(("Emma",)))) == 1


def test_whatever_changes_the_tokens_makes_another_store(text, model, tmp_path):
    assert builds(text) == 1
    other = TokenizerJson(str(model), eos="<|endoftext|>")
    assert builds(dataclasses.replace(text, tokenizer=other)) == 1
    assert builds(dataclasses.replace(text, add_eos=False)) == 1
    assert builds(dataclasses.replace(text, cache_dir=str(tmp_path / "mine"))) == 1
    assert builds(dataclasses.replace(text, cache_dir=str(tmp_path / "mine"))) == 0
    talk = Tokenized(
        Texts((conversation("Who?", "Emma."),)),
        text.tokenizer,
        ChatTemplate(str(model)),
    )
    assert builds(talk) == 1
    changed = ChatTemplate(source="{# new #}" + CHATML)
    assert builds(dataclasses.replace(talk, template=changed)) == 1


def test_a_store_follows_files_that_are_moved_and_not_those_that_change(
    model, tmp_path
):
    def config(name, texts):
        path = write_jsonl(tmp_path / name, [{"text": t} for t in texts])
        return Tokenized(Jsonl((path,)), TokenizerJson(str(model)))

    assert builds(config("a.jsonl", ["Emma", "Anne"])) == 1
    assert builds(config("moved.jsonl", ["Emma", "Anne"])) == 0
    assert builds(config("a.jsonl", ["Emma", "Anna"])) == 1


def test_a_store_has_the_tokens_of_each_document(text):
    store = text()
    tokenizer = store.tokenizer
    for i, document in enumerate(text.documents.texts):
        ids = [*tokenizer.encode([document])[0].ids.tolist(), tokenizer.eos_id]
        assert store.tokens(i).tolist() == ids
        assert store.tokens(i, 2, 5).tolist() == ids[2:5]
        assert store.tokens(i, 2, 10**6).tolist() == ids[2:]
        assert store.learnt(i).all()
        assert store.lengths[i] == len(ids)
        assert store.num_learnt[i] == len(ids) - 1
        assert store.num_bytes[i] == len(document.encode())


def test_a_large_vocabulary_takes_four_bytes(text, monkeypatch):
    assert text().meta["dtype"] == "uint16"

    class Wide:
        vocab_size, prefix, suffix = 2**16 + 1, (), ()
        bos_id, eos_id, fingerprint = None, 2**16, "wide"

        def encode(self, texts, *, with_starts=False):
            from distilljax.data.text.tokenizer import Encoded

            return [Encoded(np.array([2**16, 7], np.int32)) for _ in texts]

        def decode(self, ids):
            return ""

        def token(self, token_id):
            return ""

        def num_bytes(self):
            return np.ones(self.vocab_size, np.int32)

    store = dataclasses.replace(text, tokenizer=Wide)()
    assert store.tokens(3).tolist() == [2**16, 7, 2**16]


def test_the_tokenizers_own_frame_is_kept(text, model, tmp_path):
    content = json.loads((model / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            token: {"id": token, "ids": [i], "tokens": [token]}
            for i, token in ((1, "<|im_start|>"), (2, "<|im_end|>"))
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    framed = dataclasses.replace(text, tokenizer=TokenizerJson(str(tmp_path)))
    ids = framed().tokens(0).tolist()
    assert (ids[0], ids[-1]) == (1, 2)
    bare = dataclasses.replace(framed, add_bos=False, add_eos=False)().tokens(0)
    assert bare.tolist() == ids[1:-1]
    named = TokenizerJson(str(tmp_path), eos="<|endoftext|>")
    both = dataclasses.replace(framed, tokenizer=named)().tokens(0).tolist()
    assert both[-2:] == [2, 0]


def test_a_text_without_an_end_is_an_error(text, model, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    text = dataclasses.replace(text, tokenizer=TokenizerJson(str(tmp_path)))
    with pytest.raises(ValueError, match="have an end-of-sequence token where add_eos"):
        text()
    assert dataclasses.replace(text, add_eos=False)().lengths.min() > 0


def test_no_documents_are_an_error(text):
    with pytest.raises(ValueError, match="documents must have at least one document"):
        dataclasses.replace(text, documents=Texts(()))()


def test_a_document_that_cannot_be_read_leaves_no_store(model, tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n')
    config = Tokenized(Jsonl((str(path),)), TokenizerJson(str(model)))
    with pytest.raises(ValueError, match=r"a\.jsonl:2 must be one JSON object"):
        config()
    assert [p for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_a_conversation_that_cannot_be_rendered_is_named(model, tmp_path):
    talk = [{"role": "user", "content": 3}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}])
    documents = Jsonl((path,), field="messages")
    config = Tokenized(documents, TokenizerJson(str(model)), ChatTemplate(str(model)))
    with pytest.raises(ValueError, match=r"conversation at .*a\.jsonl:1 must be one"):
        config()


def test_a_cache_that_cannot_be_written_is_named(text, tmp_path):
    (tmp_path / "file").write_text("")
    text = dataclasses.replace(text, cache_dir=str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cache_dir must be a folder that can be writ"):
        text()


def test_a_store_that_was_cut_short_is_named(text):
    store = text()
    path = store.folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens\.bin must have \d+ bytes, got"):
        text().tokens(0)


def test_a_token_is_learnt_if_it_begins_in_the_span():
    starts = np.array([0, 2, 4, 6, 8], np.int32)
    assert learnt(starts, ((2, 5), (8, 9))).tolist() == [0, 1, 1, 0, 1]
    assert learnt(starts, ((1, 2),)).tolist() == [0, 0, 0, 0, 0]


def test_learnt_tokens_are_counted_without_the_first(model):
    talks = (conversation("Who?", "Emma."), conversation("Why?", "So.", "Oh?", "Yes."))
    store = Tokenized(
        Texts(talks), TokenizerJson(str(model)), ChatTemplate(str(model))
    )()
    for i in range(2):
        assert store.num_learnt[i] == store.learnt(i)[1:].sum() > 0


PROGRAM = """
import pickle, sys
config = pickle.load(open(sys.argv[1], "rb"))
from distilljax.data.text.progress import show_progress
import contextlib
@contextlib.contextmanager
def said(title, total):
    print("builds")
    yield lambda done: None
print(len(config(said)))
"""


@pytest.mark.slow
def test_of_several_processes_one_encodes(text, tmp_path):
    (tmp_path / "config").write_bytes(pickle.dumps(text))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "config")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert sorted(said) == [["30"], ["30"], ["builds", "30"]]
