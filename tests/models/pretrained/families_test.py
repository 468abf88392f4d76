"""Every family says what transformers says, padded and packed, and is written again.

The fixtures are tiny random checkpoints that transformers wrote, with its logits; see
make_fixtures.py. With torch and transformers installed, what we write is read there.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax.models import load_pretrained, save_pretrained

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FAMILIES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
LENGTH, PADDING, FIRST = 24, 9, 10
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def expected(family: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / family / "expected.npz"))


def logits_of(model, *args) -> np.ndarray:
    return np.asarray(jax.jit(lambda *args: model(*args).logits.logits())(*args))


def test_all_families_have_a_fixture():
    names = {"llama", "smollm", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"}
    assert names <= set(FAMILIES)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, scan):
    want = expected(family)
    tokens = jnp.asarray(want["tokens"])
    model = load_pretrained(FIXTURES / family, scan=scan)
    np.testing.assert_allclose(logits_of(model, tokens), want["logits"], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_changes_nothing(family):
    want = expected(family)
    tokens = jnp.asarray(want["tokens"])
    mask = np.ones(tokens.shape, np.int32)
    mask[1, :PADDING] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    model = load_pretrained(FIXTURES / family)
    got = logits_of(model, tokens, jnp.asarray(positions), jnp.asarray(mask))
    real = mask.astype(bool)
    np.testing.assert_allclose(got[real], want["left_logits"][real], **TOLERANCE)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(family, scan):
    want = expected(family)
    rest = LENGTH - FIRST
    tokens = np.concatenate([want["tokens"][0, :FIRST], want["tokens"][1, :rest]])
    positions = np.concatenate([np.arange(FIRST), np.arange(rest)]).astype(np.int32)
    segments = np.repeat([1, 2], [FIRST, rest]).astype(np.int32)
    model = load_pretrained(FIXTURES / family, scan=scan)
    got = logits_of(
        model, *(jnp.asarray(x)[None] for x in (tokens, positions, segments))
    )
    np.testing.assert_allclose(got[0], want["packed_logits"], **TOLERANCE)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_was_read(family, scan, tmp_path):
    model = load_pretrained(FIXTURES / family, scan=scan)
    save_pretrained(model, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    kind = json.loads((FIXTURES / family / "config.json").read_text())["model_type"]
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == kind
    plain = load_pretrained(FIXTURES / family)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(plain))
    assert again.config == plain.config


has_transformers = all(importlib.util.find_spec(x) for x in ("torch", "transformers"))


@pytest.mark.skipif(
    not has_transformers, reason="needs torch and transformers to read what we write"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(family, tmp_path):
    import torch
    import transformers

    want = expected(family)
    save_pretrained(load_pretrained(FIXTURES / family, scan=True), tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    with torch.no_grad():
        got = model(torch.from_numpy(want["tokens"]).long()).logits.numpy()
    np.testing.assert_allclose(got, want["logits"], **TOLERANCE)
