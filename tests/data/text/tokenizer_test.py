"""Two kinds of tokenizer behind one protocol, and what is wrong with a file of one."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import sentencepiece

from distilljax.data.text import (
    ByteTokenizer,
    ChatTemplate,
    SentencePiece,
    Texts,
    Tokenized,
    Tokenizer,
    TokenizerJson,
    check_vocabulary,
)
from distilljax.data.text.documents import digest
from distilljax.data.text.encoder import Encoder
from tests.data.text.tiny import conversation, sentences

TEXT = "The clever sister admires a 😀 café."


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        user_defined_symbols=["<turn>"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(params=["json", "pieces"])
def tokenizer(request, model, piece_model):
    if request.param == "json":
        return TokenizerJson(str(model))()
    return SentencePiece(piece_model)()


def test_a_text_survives_the_round_trip(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    for text in (TEXT, sentences(1)[0], ""):
        (encoded,) = tokenizer.encode([text])
        assert tokenizer.decode(encoded.ids.tolist()) == text
        assert encoded.starts is None


def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
    texts = [*sentences(5), "", TEXT]
    batch = tokenizer.encode(texts)
    for text, encoded in zip(texts, batch, strict=True):
        assert encoded.ids.tolist() == tokenizer.encode([text])[0].ids.tolist()


def test_a_token_knows_where_in_the_text_it_begins(tokenizer):
    """By characters, not bytes: some here take four."""
    (encoded,) = tokenizer.encode([TEXT], with_starts=True)
    starts = encoded.starts.tolist()
    assert starts == sorted(starts)
    assert len(starts) == len(encoded.ids)
    assert encoded.ids.tolist() == tokenizer.encode([TEXT])[0].ids.tolist()
    cut = TEXT.index("café") - 1  # a space, where both kinds begin a token
    assert cut in starts
    before = tokenizer.decode(encoded.ids[: starts.index(cut)].tolist())
    assert before == TEXT[:cut]


def test_what_comes_before_and_after_a_text_is_the_tokenizers_own(
    model, piece_model, tmp_path
):
    plain = TokenizerJson(str(model))()
    assert (plain.prefix, plain.suffix) == ((), ())
    assert plain.token(plain.bos_id) == "<|endoftext|>"
    assert plain.token(plain.eos_id) == "<|im_end|>"
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
    framed = TokenizerJson(str(tmp_path / "tokenizer.json"))()
    assert (framed.prefix, framed.suffix) == ((1,), (2,))
    assert (framed.bos_id, framed.eos_id) == (None, None)  # no config beside it
    pieces = SentencePiece(piece_model)()
    assert (pieces.prefix, pieces.suffix) == ((1,), ())
    assert pieces.token(pieces.eos_id) == "</s>"


def test_symbols_of_a_chat_are_single_tokens(model, piece_model):
    text = "<|im_start|>Emma<|im_end|>"
    ids = TokenizerJson(str(model))().encode([text])[0].ids.tolist()
    assert (ids[0], ids[-1]) == (1, 2)
    pieces = SentencePiece(piece_model)()
    ids = pieces.encode(["<turn>Emma"])[0].ids.tolist()
    assert pieces.token(ids[1]) == "<turn>"


def test_cutting_and_padding_in_the_file_are_switched_off(model, tmp_path):
    import tokenizers

    cutting = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    cutting.enable_truncation(3)
    cutting.enable_padding(length=50)
    cutting.save(str(tmp_path / "tokenizer.json"))
    found = TokenizerJson(str(tmp_path))().encode([TEXT])[0].ids.tolist()
    assert found == TokenizerJson(str(model))().encode([TEXT])[0].ids.tolist()


def test_special_tokens_are_named_or_read(model, tmp_path):
    shutil.copy(model / "tokenizer.json", tmp_path)
    named = TokenizerJson(str(tmp_path), eos="<|endoftext|>")()
    assert (named.bos_id, named.eos_id) == (None, 0)
    flags = {"content": "<|im_end|>", "lstrip": False}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": flags, "bos_token": None}))
    assert TokenizerJson(str(tmp_path))().eos_id == 2
    assert TokenizerJson(str(tmp_path))().fingerprint != named.fingerprint
    with pytest.raises(ValueError, match="eos must be a token of"):
        TokenizerJson(str(tmp_path), eos="</s>")()
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must be JSON"):
        TokenizerJson(str(tmp_path))()


def test_a_file_that_is_no_tokenizer_is_named(model, tmp_path):
    whole = (model / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="path must be a whole tokenizer"):
        TokenizerJson(str(tmp_path))()
    (tmp_path / "tokenizer.model").write_bytes(whole[:100])
    with pytest.raises(ValueError, match="path must be a whole SentencePiece model"):
        SentencePiece(str(tmp_path / "tokenizer.model"))()
    for config in (TokenizerJson, SentencePiece):
        with pytest.raises(ValueError, match="path must be a file that exists"):
            config(str(tmp_path / "none"))()


def test_a_tokenizer_goes_to_worker_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (
        copy.encode([TEXT])[0].ids.tolist() == tokenizer.encode([TEXT])[0].ids.tolist()
    )
    assert copy.fingerprint == tokenizer.fingerprint


def test_every_token_must_be_a_class_of_the_model(tokenizer):
    size = tokenizer.vocab_size
    assert check_vocabulary(tokenizer, size + 271) == 271
    assert check_vocabulary(tokenizer, size) == 0
    with pytest.raises(ValueError, match=f"the model has classes, {size - 1}, got"):
        check_vocabulary(tokenizer, size - 1)


def test_a_tokenizer_of_the_hub_is_fetched_without_the_weights(
    model, tmp_path, monkeypatch
):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(model)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # pyright: ignore
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    fetched, local = TokenizerJson("owner/tiny")(), TokenizerJson(str(model))()
    assert fetched.fingerprint == local.fingerprint
    ((name, patterns),) = asked
    assert name == "owner/tiny"
    assert "tokenizer*" in patterns
    assert not any("safetensors" in pattern for pattern in patterns)


LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["pieces", "bytes"])
def test_what_a_template_writes_for_bos_and_eos_are_those_tokens(
    kind, piece_model, tmp_path
):
    """As letters the student would learn to spell "</s>", and never to end."""
    config = SentencePiece(piece_model) if kind == "pieces" else ByteTokenizer()
    tokenizer = config()
    talk = conversation("Who is clever?", "Her sister.")
    text = Tokenized(
        Texts((talk,)), config, ChatTemplate(source=LLAMA_2), cache_dir=str(tmp_path)
    )
    store = text()
    tokens, learnt = store.tokens(0), store.learnt(0)
    assert tokens[-1] == tokenizer.eos_id
    assert learnt[-1]
    assert (tokens == tokenizer.eos_id).sum() == 1
    if kind == "pieces":
        assert tokens[0] == tokenizer.bos_id
        assert not learnt[0]
    # what lies between is what the tokenizer says of it alone
    between = "[INST] Who is clever? [/INST] Her sister. "
    want = tokenizer.encode([between])[0].ids
    begin = 1 if kind == "pieces" else 0
    np.testing.assert_array_equal(tokens[begin:-1], want)
    said = tokenizer.decode(tokens[learnt][:-1].tolist())
    assert said.strip() == "Her sister."


def test_a_tokenizer_that_finds_them_itself_keeps_its_store(model):
    """No other digest, and so no tokens that are encoded again."""
    tokenizer = TokenizerJson(str(model))()
    chat = ChatTemplate(str(model))(bos="<|endoftext|>", eos="<|im_end|>")
    found = Encoder(tokenizer, chat, (), ())
    assert found._apart == {}
    assert found.fingerprint == digest(tokenizer.fingerprint, chat.fingerprint, (), ())


def test_bos_is_put_before_a_text_where_it_is_asked_for(model):
    assert TokenizerJson(str(model))().prefix == ()
    tokenizer = TokenizerJson(str(model), bos="<|im_start|>")()
    assert tokenizer.prefix == (tokenizer.bos_id,)


def test_added_tokens_that_are_text_have_its_bytes(model, tmp_path):
    """Runs of spaces, say, as code models have them; special ones are no text."""
    stored = json.loads((model / "tokenizer.json").read_text())
    last = max(stored["model"]["vocab"].values())
    for i, content in enumerate(("    ", "\n\n", "é!"), start=last + 1):
        flags = dict.fromkeys(
            ("single_word", "lstrip", "rstrip", "normalized", "special"), False
        )
        stored["added_tokens"].append({"id": i, "content": content, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = TokenizerJson(str(tmp_path))()
    text = "if clever:\n\n    admires é!"
    ids = tokenizer.encode([text + "<|im_end|>"])[0].ids
    assert (ids > last).sum() == 3
    assert tokenizer.num_bytes()[ids].sum() == len(text.encode())


def test_a_config_that_is_a_list_is_named(model, tmp_path):
    shutil.copy(model / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TypeError, match=r"tokenizer_config\.json must be"):
        TokenizerJson(str(tmp_path))()
