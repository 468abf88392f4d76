"""Files in, files out: what does not fit is told, all of it, before it is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distilljax import students
from distilljax.models import (
    DECODER_RULES,
    DecoderConfig,
    load_pretrained,
    save_pretrained,
)
from distilljax.models.pretrained._convert import fill, tensors_of
from distilljax.models.pretrained._families import DECODERS
from distilljax.models.pretrained._kinds import config_json
from distilljax.models.pretrained._safetensors import SafetensorsSource
from distilljax.models.pretrained._tables import decoder_table
from distilljax.sharding import mesh_from_string

CONFIG = DecoderConfig(
    vocab_size=64,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_width=48,
    tied=False,
)


@pytest.fixture
def directory(tmp_path) -> Path:
    save_pretrained(CONFIG(nnx.Rngs(0)), tmp_path / "model")
    return tmp_path / "model"


def change(directory: Path, **tensors) -> None:
    """Replace tensors of the file; None takes one away."""
    path = directory / "model.safetensors"
    found = {**load_file(path), **{k.replace("__", "."): v for k, v in tensors.items()}}
    save_file({name: x for name, x in found.items() if x is not None}, path)


def change_config(directory: Path, **entries) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def states_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


def test_all_that_does_not_fit_is_told_at_once(directory):
    change(
        directory,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=np.zeros((48, 31), np.float32),
        model__layers__3__mlp__up_proj__weight=np.zeros((48, 32), np.float32),
        lm_head__bias=np.zeros(64, np.float32),
    )
    with pytest.raises(ValueError, match="the tensors must be those of") as error:
        load_pretrained(directory)
    text = str(error.value)
    assert "missing: model.norm.weight;" in text
    assert "unexpected: lm_head.bias, model.layers.3.mlp.up_proj.weight;" in text
    assert (
        "wrong shape: model.layers.1.mlp.up_proj.weight (48, 31) instead of (48, 32)"
        in text
    )
    assert str(directory) in text


def test_a_config_that_contradicts_the_weights_names_every_kind(directory):
    change_config(directory, num_hidden_layers=20, intermediate_size=40)
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more; wrong shape: "):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type must be one of .*gemma2, .*, got 'mamba'",
        ),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu, .*, got 'relu'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type must be default, linear or llama3, got 'yarn'",
        ),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
    ],
)
def test_what_cannot_be_built_is_refused(directory, entries, message):
    change_config(directory, **entries)
    with pytest.raises(ValueError, match=message):
        load_pretrained(directory)


def test_a_config_without_a_size_is_refused(directory):
    path = directory / "config.json"
    entries = json.loads(path.read_text())
    del entries["hidden_size"]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="must have the key 'hidden_size', got"):
        load_pretrained(directory)


@pytest.mark.parametrize("size", [0, 5, 200, 20_000])
def test_a_file_that_was_cut_short_is_refused(directory, size):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"must be a whole safetensors file.* cut short"
    ):
        load_pretrained(directory)


def test_a_config_that_was_cut_short_is_refused(directory):
    path = directory / "config.json"
    path.write_text(path.read_text()[:30])
    with pytest.raises(ValueError, match=r"config.json must be JSON, got"):
        load_pretrained(directory)


def test_directories_without_a_model_are_refused(tmp_path, directory):
    with pytest.raises(ValueError, match=r"with a config.json, or with one GGUF file"):
        load_pretrained(tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="must have weights in"):
        load_pretrained(directory)


def test_many_files_are_one_model(tmp_path):
    model = replace(CONFIG, scan=True)(nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model", max_file_bytes=20_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert max(path.stat().st_size for path in files) < 22_000
    states_equal(load_pretrained(tmp_path / "model", scan=True), model)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"without {files[1].name}. Fetch the rest"):
        load_pretrained(tmp_path / "model")


def test_weights_are_cast_on_the_way(directory):
    model = load_pretrained(directory, dtype=jnp.bfloat16, compute_dtype=jnp.float32)
    for x, y in zip(
        jax.tree.leaves(nnx.state(model)),
        jax.tree.leaves(nnx.state(load_pretrained(directory))),
        strict=True,
    ):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))
    assert model(jnp.array([[1, 2]])).logits.hidden.dtype == jnp.float32


def test_bfloat16_files_stay_bfloat16(directory, tmp_path):
    half = load_pretrained(directory, dtype=jnp.bfloat16)
    save_pretrained(half, tmp_path / "half")
    again = load_pretrained(tmp_path / "half")
    assert again.config.param_dtype == jnp.bfloat16
    states_equal(again, half)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,tensor=2,fsdp=2"])
def test_a_mesh_holds_the_pieces_of_the_same_weights(directory, mesh, scan):
    mesh = mesh_from_string(mesh)
    model = load_pretrained(directory, mesh=mesh, scan=scan)
    states_equal(model, load_pretrained(directory, scan=scan))
    layers = model.layers if scan else model.layers[1]
    kernel = layers.attention.query.kernel[...]
    stack = (None,) if scan else ()
    assert tuple(kernel.sharding.spec) == (*stack, "fsdp", "tensor")


class Spy(SafetensorsSource):
    """Notes how much is read."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.largest: dict[str, int] = {}

    def read(self, name, index):
        piece = super().read(name, index)
        self.largest[name] = max(self.largest.get(name, 0), piece.size)
        return piece


@pytest.mark.parametrize("scan", [False, True])
def test_only_the_pieces_of_the_devices_are_read(directory, scan):
    source, config = Spy(directory), replace(CONFIG, scan=scan)
    model = nnx.eval_shape(lambda: config(nnx.Rngs(0)))
    mesh = mesh_from_string("fsdp=4,tensor=2")
    table = decoder_table(config)
    fill(model, source, table, rules=DECODER_RULES, mesh=mesh)
    assert source.largest["model.layers.2.self_attn.q_proj.weight"] == 32 * 32 // 8
    assert source.largest["model.layers.0.mlp.down_proj.weight"] == 32 * 48 // 8
    assert source.largest["model.embed_tokens.weight"] == 64 * 32 // 8


def test_other_types_of_numbers_are_refused(directory):
    change(directory, lm_head__weight=np.zeros((64, 32), np.int8))
    with pytest.raises(ValueError, match=r"lm_head.weight must be of a type of F64"):
        load_pretrained(directory)


def test_a_copy_of_a_tied_embedding_is_passed_over_and_another_head_is_not(tmp_path):
    model = replace(CONFIG, tied=True)(nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model")
    embedding = np.asarray(model.embed.embedding[...])
    change(tmp_path / "model", lm_head__weight=embedding)
    states_equal(load_pretrained(tmp_path / "model"), model)
    change(tmp_path / "model", lm_head__weight=embedding + 1)
    with pytest.raises(ValueError, match=r"tie_word_embeddings in .* must be false"):
        load_pretrained(tmp_path / "model")


def test_weights_of_a_model_that_was_there_are_not_mixed_with_another(tmp_path):
    model = CONFIG(nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model")
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(ValueError, match="path must be a directory without a model"):
        save_pretrained(model, tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path, text):
    save_pretrained(CONFIG(nnx.Rngs(0)), tmp_path / "model", max_file_bytes=20_000)
    (tmp_path / "model/model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json must be JSON with a weight_map"):
        load_pretrained(tmp_path / "model")


def test_a_config_that_is_a_list_is_refused(tmp_path):
    save_pretrained(CONFIG(nnx.Rngs(0)), tmp_path / "model")
    (tmp_path / "model/config.json").write_text("[]")
    with pytest.raises(TypeError, match=r"config.json must be"):
        load_pretrained(tmp_path / "model")


def test_the_same_weights_in_another_layout_are_passed_over(tmp_path):
    model = CONFIG(nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model")
    (tmp_path / "model/consolidated.safetensors").write_bytes(b"in another layout")
    states_equal(load_pretrained(tmp_path / "model"), model)


def test_of_two_tensors_of_a_name_the_one_that_the_index_names_is_read(tmp_path):
    model = CONFIG(nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model", max_file_bytes=20_000)
    last = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    held = load_file(last)
    stale = np.zeros_like(model.embed.embedding[...])
    assert "model.embed_tokens.weight" not in held
    save_file({**held, "model.embed_tokens.weight": stale}, last)
    states_equal(load_pretrained(tmp_path / "model"), model)


def test_one_whole_file_goes_before_an_index_of_older_ones(tmp_path):
    """As in transformers: the parts may lie there from before."""
    old, model = CONFIG(nnx.Rngs(0)), CONFIG(nnx.Rngs(1))
    save_pretrained(old, tmp_path / "model", max_file_bytes=20_000)
    save_pretrained(model, tmp_path / "whole")
    shutil.copy(tmp_path / "whole/model.safetensors", tmp_path / "model")
    states_equal(load_pretrained(tmp_path / "model"), model)


def test_what_cannot_be_written_leaves_a_place_to_write_to(tmp_path):
    model = CONFIG(nnx.Rngs(0))
    adapted = students.add_lora(model, rank=2, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"got layers/0/.*lora_a\. Merge adapters"):
        save_pretrained(adapted, tmp_path / "model", max_file_bytes=20_000)
    assert list((tmp_path / "model").iterdir()) == []
    save_pretrained(students.merge_lora(adapted), tmp_path / "model")
    states_equal(load_pretrained(tmp_path / "model"), model)


def test_what_no_family_is_cannot_be_written(tmp_path):
    model = replace(CONFIG, qk_norm=True, logit_softcap=3.0)(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"a combination that none has \(logit_softcap"
    ):
        save_pretrained(model, tmp_path / "model")
    with pytest.raises(
        TypeError, match=r"model must be one of Decoder, .* got a Linear"
    ):
        save_pretrained(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_is_not_overwritten(directory):
    with pytest.raises(ValueError, match="path must be a directory without a model"):
        save_pretrained(CONFIG(nnx.Rngs(0)), directory)


def test_further_entries_are_written(tmp_path):
    save_pretrained(CONFIG(nnx.Rngs(0)), tmp_path / "m", config={"eos_token_id": 2})
    assert json.loads((tmp_path / "m/config.json").read_text())["eos_token_id"] == 2


def test_parameters_are_floats(directory):
    with pytest.raises(ValueError, match="dtype must be a floating-point type, got 'i"):
        load_pretrained(directory, dtype="int8")


def test_what_the_hub_does_not_give_is_named(monkeypatch):
    def snapshot_download(name, *, allow_patterns):
        raise FileNotFoundError("no such snapshot on disk\nand more")

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    said = r"can be fetched from the hub, got 'a/b' \(FileNotFoundError: no such snap"
    with pytest.raises(ValueError, match=said):
        load_pretrained("a/b")


def test_unknown_options_are_refused(directory):
    with pytest.raises(TypeError, match=r"options must be among scan, .*, got windows"):
        load_pretrained(directory, windows=3)


def test_names_of_the_hub_are_fetched(directory, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        shutil.copytree(directory, tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # pyright: ignore
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    states_equal(load_pretrained("owner/tiny-1.0"), load_pretrained(directory))
    assert asked[0][0] == "owner/tiny-1.0"
    assert "*.safetensors" in asked[0][1]


def test_paths_and_names_that_are_none_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="the path must exist, or be owner/name"):
        load_pretrained("no/such/directory")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        load_pretrained("owner/model")


PEAK = """
import resource, sys
import jax
from distilljax.models import load_pretrained

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, scan = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
load_pretrained(small, scan=scan)
before = peak()
model = load_pretrained(large, scan=scan)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_loading_holds_little_more_than_the_weights(tmp_path, scan):
    """Of one device: 0.3 of the bytes beside them, what is read and what is cast."""
    config = replace(CONFIG, width=1024, ffn_width=4096, num_heads=128, num_layers=3)
    abstract = nnx.eval_shape(lambda: config(nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    tensors = {
        name: np.asarray(rng.standard_normal(transform.shape(x.shape), np.float32))
        for name, x, transform in tensors_of(abstract, decoder_table(config))
    }
    small, large = tmp_path / "small", tmp_path / "large"
    for directory in (small, large):
        save_pretrained(CONFIG(nnx.Rngs(0)), directory)
    save_file(tensors, large / "model.safetensors")
    (large / "config.json").write_text(json.dumps(config_json(DECODERS, config)))
    size = sum(x.nbytes for x in tensors.values())
    assert size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, small, large, str(scan)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * size
