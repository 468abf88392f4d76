"""The tokenizer of a GGUF file says what the tokenizer.json it was made of says."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from distilljax.data.text import GgufTokenizer, Texts, Tokenized, TokenizerJson
from tests.data.text.tiny import train_tokenizer

TEXT = "Her rich cousin visits 1984 friends, at  Bath.\n\ndéjà vu!<|im_end|>"


def write(
    path: Path,
    folder: Path,
    pre: str = "gpt-2",
    model: str = "gpt2",
    add_bos: bool | None = None,
) -> str:
    """The tokenizer in a folder as GGUF has it."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    special = {t["content"] for t in stored["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_bos_token_id(vocab["<|endoftext|>"])
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


def test_it_reads_and_writes_as_the_original(model, tmp_path):
    found = GgufTokenizer(write(tmp_path / "a.gguf", model))()
    original = TokenizerJson(str(model))()
    ids = found.encode([TEXT])[0].ids
    np.testing.assert_array_equal(ids, original.encode([TEXT])[0].ids)
    assert found.decode(ids.tolist()) == TEXT
    assert found.vocab_size == original.vocab_size
    assert found.eos_id == original.eos_id == ids[-1]
    assert found.bos_id is None  # the file does not say that it is put before a text
    assert found.prefix == ()
    asked = GgufTokenizer(str(tmp_path / "a.gguf"), bos="<|im_start|>")()
    assert (asked.bos_id, asked.prefix) == (1, (1,))


@pytest.mark.parametrize(
    ("pre", "says", "begins"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_a_text_begins_as_the_file_says(model, tmp_path, pre, says, begins):
    """Where it says nothing as llama.cpp reads it, which has BOS with Llama 3."""
    path = write(tmp_path / "a.gguf", model, pre=pre, add_bos=says)
    tokenizer = GgufTokenizer(path)()
    bos = TokenizerJson(str(model))().bos_id
    assert tokenizer.prefix == ((bos,) if begins else ())
    text = Tokenized(Texts(("Her aunt",)), GgufTokenizer(path))()
    assert (text.tokens(0)[0] == bos) == begins


def test_a_word_of_llama_3_needs_no_merges(model, tmp_path):
    """Its vocabulary has words that no sequence of merges makes."""
    stored = json.loads((model / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    vocab["Bathclergyman"] = len(vocab)  # and no merge that makes it
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    for pre, is_whole in (("gpt-2", False), ("llama-bpe", True)):
        path = write(tmp_path / f"{pre}.gguf", tmp_path, pre=pre)
        ids = GgufTokenizer(path)().encode(["Bathclergyman"])[0].ids
        assert (len(ids) == 1) == is_whole


def test_tokens_have_the_bytes_of_the_text(model, tmp_path):
    tokenizer = GgufTokenizer(write(tmp_path / "a.gguf", model))()
    ids = tokenizer.encode([TEXT])[0].ids
    text = TEXT.removesuffix("<|im_end|>")  # which is no text
    assert tokenizer.num_bytes()[ids].sum() == len(text.encode())


def test_smollm_takes_digits_one_by_one_and_llama_three_at_a_time(tmp_path):
    """Of a vocabulary that has longer numbers, too."""
    numbers = train_tokenizer(tmp_path, texts=["198 456 198 456 1984567 1984567"])
    for pre, longest in (("gpt-2", 4), ("smollm", 1), ("qwen2", 1), ("llama-bpe", 3)):
        tokenizer = GgufTokenizer(write(tmp_path / f"{pre}.gguf", numbers, pre))()
        ids = tokenizer.encode(["1984567"])[0].ids.tolist()
        assert tokenizer.decode(ids) == "1984567"
        assert max(len(tokenizer.token(i)) for i in ids) == longest


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"pre": "tekken"}, "cut as 'tekken'"), ({"model": "llama"}, "'llama' cut as")],
)
def test_other_tokenizers_are_named_and_refused(model, tmp_path, fields, message):
    path = write(tmp_path / "a.gguf", model, **fields)
    with pytest.raises(ValueError, match=message):
        GgufTokenizer(path)()


def test_no_file_and_no_gguf_are_errors(tmp_path):
    with pytest.raises(ValueError, match="path must be a file that exists"):
        GgufTokenizer(str(tmp_path / "none.gguf"))()
    (tmp_path / "b.gguf").write_bytes(b"no such thing" * 9)
    with pytest.raises(ValueError, match="path must be a whole GGUF file"):
        GgufTokenizer(str(tmp_path / "b.gguf"))()
    path = write(tmp_path / "c.gguf", train_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match="eos must be a token of"):
        GgufTokenizer(path, eos="</s>")()
