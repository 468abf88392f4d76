"""Encoders say what transformers says, padded and packed, and are written again.

The fixtures are tiny random checkpoints that transformers wrote, with its answers; see
make_encoder_fixtures.py. With torch and transformers installed, what we write is read
there.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distilljax.models import (
    EncoderConfig,
    exact_gelu,
    first_token,
    load_pretrained,
    mean_pool,
    save_pretrained,
)
from distilljax.sharding import mesh_from_string

FIXTURES = Path(__file__).resolve().parent / "encoders"
MODELS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
LENGTH, PADDING, FIRST = 24, 9, 10
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / name / "expected.npz"))


def answers(model, *args):
    """Hidden states, and logits or None."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, args):
        outputs = nnx.merge(graphdef, state)(*args)
        return {**outputs.features, "logits": outputs.logits}

    return run(state, tuple(None if x is None else jnp.asarray(x) for x in args))


def test_there_are_files_with_and_without_prefix_and_pooler():
    names = {name: load_file(FIXTURES / name / "model.safetensors") for name in MODELS}
    assert {"bert", "bert_classifier", "bert_masked"} == names.keys()
    assert "pooler.dense.weight" in names["bert"]
    assert "bert.pooler.dense.weight" in names["bert_classifier"]
    assert not any("pooler" in name for name in names["bert_masked"])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name, scan):
    want = expected(name)
    model = load_pretrained(FIXTURES / name, scan=scan)
    found = answers(model, want["tokens"], None, None, want["types"])
    np.testing.assert_allclose(found["last_hidden"], want["last_hidden"], **TOLERANCE)
    if "logits" in want:
        np.testing.assert_allclose(found["logits"], want["logits"], **TOLERANCE)
    else:
        assert found["logits"] is None
        assert "pooled" not in found


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    want = expected(name)
    mask = np.ones((2, LENGTH), np.int32)
    mask[1, -PADDING:] = 0
    found = answers(load_pretrained(FIXTURES / name), want["tokens"], None, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(
        found["last_hidden"][real], want["padded_hidden"][real], **TOLERANCE
    )
    if "logits" in want:
        np.testing.assert_allclose(found["logits"], want["padded_logits"], **TOLERANCE)


@pytest.mark.parametrize("scan", [False, True])
def test_packed_texts_do_not_see_each_other(scan):
    want = expected("bert")
    rest = LENGTH - FIRST
    tokens = np.concatenate([want["tokens"][0, :FIRST], want["tokens"][1, :rest]])
    positions = np.concatenate([np.arange(FIRST), np.arange(rest)]).astype(np.int32)
    segments = np.repeat([1, 2], [FIRST, rest]).astype(np.int32)
    model = load_pretrained(FIXTURES / "bert", scan=scan)
    found = answers(model, *(x[None] for x in (tokens, positions, segments)))
    np.testing.assert_allclose(
        found["last_hidden"][0], want["packed_hidden"], **TOLERANCE
    )


def test_the_pooler_is_there_if_it_is_asked_for():
    want = expected("bert")
    model = load_pretrained(FIXTURES / "bert", pooler=True)
    found = answers(model, want["tokens"], None, None, want["types"])
    np.testing.assert_allclose(found["pooled"], want["pooled"], **TOLERANCE)
    with pytest.raises(ValueError, match=r"missing: pooler\.dense\.bias, "):
        load_pretrained(FIXTURES / "bert_masked", pooler=True)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_was_read(name, scan, tmp_path):
    model = load_pretrained(FIXTURES / name, scan=scan)
    save_pretrained(model, tmp_path / "out")
    again, plain = load_pretrained(tmp_path / "out"), load_pretrained(FIXTURES / name)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(plain))
    assert again.config == plain.config
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", FIXTURES / name)
    )
    kept = {n.removeprefix("bert.") for n in theirs if not n.startswith("cls.")}
    if name == "bert":
        kept = {n for n in kept if "pooler" not in n}
    assert {n.removeprefix("bert.") for n in ours} == kept


def test_first_files_of_bert_name_norms_otherwise(tmp_path):
    """And have a buffer of integers, which is no parameter."""
    shutil.copytree(FIXTURES / "bert", tmp_path / "old")
    path = tmp_path / "old/model.safetensors"
    old = {
        "bert." + re.sub(r"(LayerNorm)\.(weight|bias)", _older, n): x
        for n, x in load_file(path).items()
    }
    assert sum("gamma" in name for name in old) == 7
    old["bert.embeddings.position_ids"] = np.arange(32)[None]
    save_file(old, path)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(load_pretrained(tmp_path / "old")),
        nnx.state(load_pretrained(FIXTURES / "bert")),
    )


def _older(found: re.Match) -> str:
    return f"{found[1]}.{'gamma' if found[2] == 'weight' else 'beta'}"


def test_onto_a_mesh_by_the_rules_of_encoders():
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    model = load_pretrained(FIXTURES / "bert", mesh=mesh, dtype="bfloat16")
    kernel = model.layers[0].attention.query.kernel[...]
    assert kernel.dtype == jnp.bfloat16
    assert tuple(kernel.sharding.spec) == ("fsdp", "tensor")
    assert tuple(model.embed.embedding[...].sharding.spec) == (None, "fsdp")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, .*, got 'swish'"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type must be one of absolute, got 'relative_key'",
        ),
        ({"is_decoder": True}, "is_decoder must be one of False, got True"),
        ({"hidden_size": 25}, "width must be a multiple of num_heads, 4, got 25"),
        ({"num_hidden_layers": 4}, r"missing: encoder\.layer\.3\.attention\.self"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, entries, message):
    shutil.copytree(FIXTURES / "bert", tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "model")


def test_a_config_without_a_size_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "bert", tmp_path / "model")
    path = tmp_path / "model/config.json"
    entries = json.loads(path.read_text())
    del entries["vocab_size"]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="must have the key 'vocab_size', got"):
        load_pretrained(tmp_path / "model")


def test_what_transformers_has_no_name_for_is_refused(tmp_path):
    config = EncoderConfig(
        vocab_size=16, width=8, num_layers=1, num_heads=2, ffn_width=8, num_classes=3
    )
    for change, message in (
        ({"pool": mean_pool, "pooler": True}, r"none has \(pool\)"),
        ({"pool": first_token}, r"none has \(pooler\)"),
        ({"activation": nnx.silu, "num_classes": None}, r"none has \(activation\)"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(replace(config, **change)(nnx.Rngs(0)), tmp_path / "out")
    config = replace(config, pool=first_token, pooler=True, activation=exact_gelu)
    save_pretrained(config(nnx.Rngs(0)), tmp_path / "out")
    assert load_pretrained(tmp_path / "out").config == config


has_transformers = all(importlib.util.find_spec(x) for x in ("torch", "transformers"))


@pytest.mark.skipif(
    not has_transformers, reason="needs torch and transformers to read what we write"
)
@pytest.mark.parametrize("name", ["bert", "bert_classifier"])
def test_transformers_reads_what_we_write(name, tmp_path):
    import torch
    import transformers

    want = expected(name)
    pooler = {"pooler": True} if name == "bert" else {}
    model = load_pretrained(FIXTURES / name, scan=True, **pooler)
    save_pretrained(model, tmp_path / "out")
    kind = "BertModel" if name == "bert" else "BertForSequenceClassification"
    model, info = getattr(transformers, kind).from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    with torch.no_grad():
        tokens, types = (torch.from_numpy(want[k]).long() for k in ("tokens", "types"))
        found = model(tokens, token_type_ids=types)
    key = "last_hidden_state" if name == "bert" else "logits"
    want = want["last_hidden" if name == "bert" else "logits"]
    np.testing.assert_allclose(found[key].numpy(), want, **TOLERANCE)
