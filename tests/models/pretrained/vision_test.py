"""Models of images say what transformers says, in both modes, and are written again.

The fixtures are tiny random checkpoints that transformers wrote, with its logits; see
make_vision_fixtures.py. With torch and transformers installed, what we write is read
there.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distilljax._capture import with_features
from distilljax._functional import default_forward
from distilljax.models import ResNetConfig, ViTConfig, load_pretrained, save_pretrained
from distilljax.sharding import mesh_from_string

FIXTURES = Path(__file__).resolve().parent / "vision"
MODELS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / name / "expected.npz"))


def logits_of(model, images) -> np.ndarray:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))
    return np.asarray(run(state, jnp.asarray(images)))


def test_all_families_have_a_fixture():
    assert {name.split("_")[0] for name in MODELS} == {"resnet", "vit", "deit"}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    want = expected(name)
    model = load_pretrained(FIXTURES / name)
    for mode in ("logits", "training_logits"):
        got = logits_of(model, want["images"])
        np.testing.assert_allclose(got, want[mode], **TOLERANCE)
        model.train()


def test_the_distillation_head_is_a_feature_in_both_modes():
    want = expected("deit")
    model = load_pretrained(FIXTURES / "deit")
    forward = with_features(default_forward, ["distillation_head"])
    for _ in range(2):
        graphdef, state = nnx.split(model)

        @jax.jit
        def features_of(state, images, graphdef=graphdef):
            model = nnx.merge(graphdef, state, copy=True)
            return forward(model, {"inputs": images}).features

        got = features_of(state, want["images"])["distillation_head"]
        np.testing.assert_allclose(got, want["distillation_logits"], **TOLERANCE)
        model.train()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_was_read(name, tmp_path):
    model = load_pretrained(FIXTURES / name)
    save_pretrained(model, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    theirs = json.loads((FIXTURES / name / "config.json").read_text())
    ours = json.loads((tmp_path / "out/config.json").read_text())
    assert ours["model_type"] == theirs["model_type"]
    assert ours["architectures"] == theirs["architectures"]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    assert again.config == model.config
    written = load_file(tmp_path / "out/model.safetensors")
    read = load_file(FIXTURES / name / "model.safetensors")
    assert written.keys() == read.keys()


def test_batch_statistics_are_read_and_stay_float32():
    read = load_file(FIXTURES / "resnet_basic/model.safetensors")
    model = load_pretrained(FIXTURES / "resnet_basic", dtype=jnp.bfloat16)
    norm, name = model.stages[1].blocks[0].shortcut.norm, "resnet.encoder.stages.1"
    name = f"{name}.layers.0.shortcut.normalization"
    np.testing.assert_array_equal(norm.mean, read[f"{name}.running_mean"])
    np.testing.assert_array_equal(norm.var, read[f"{name}.running_var"])
    assert norm.mean.dtype == jnp.float32
    assert norm.scale.dtype == model.head.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["resnet_v15", "deit"])
def test_a_mesh_holds_the_pieces_of_the_same_weights(name):
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    model = load_pretrained(FIXTURES / name, mesh=mesh)
    whole = load_pretrained(FIXTURES / name)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(whole))
    if name == "deit":
        kernel, spec = model.layers[1].mlp.up.kernel, ("fsdp", "tensor")
    else:  # [1, 1, 6, 24] is small, [3, 3, 6, 6] too, [7, 7, 3, 8] is not
        kernel, spec = model.stem.conv.kernel, (None, None, None, "fsdp")
    assert tuple(kernel[...].sharding.spec) == spec


def test_what_does_not_fit_is_told_at_once(tmp_path):
    shutil.copytree(FIXTURES / "deit", tmp_path / "deit")
    path = tmp_path / "deit/model.safetensors"
    tensors = load_file(path)
    tensors["classifier.weight"] = tensors.pop("cls_classifier.weight")
    tensors["deit.embeddings.position_embeddings"] = np.zeros((1, 3, 24), np.float32)
    tensors["deit.pooler.dense.weight"] = np.zeros((24, 24), np.float32)  # passed over
    save_file(tensors, path)
    with pytest.raises(ValueError, match="the tensors must be those of") as error:
        load_pretrained(tmp_path / "deit")
    text = str(error.value)
    assert "missing: cls_classifier.weight;" in text
    assert "unexpected: classifier.weight;" in text
    assert "position_embeddings (1, 3, 24) instead of (1, 27, 24)" in text
    assert "pooler" not in text


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("vit", {"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ("vit", {"image_size": [20, 16]}, r"image_size must be as high as it is wide"),
        ("vit", {"patch_size": 3}, "image_size must be a multiple of patch_size, 3"),
        (
            "resnet_basic",
            {"downsample_in_first_stage": True},
            "downsample_in_first_stage must be False, got True",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(name, entries, message, tmp_path):
    json_of = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**json_of, **entries}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_a_square_may_be_said_by_both_sides(tmp_path):
    shutil.copytree(FIXTURES / "vit", tmp_path / "vit")
    path = tmp_path / "vit/config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "image_size": [20, 20]})
    )
    assert load_pretrained(tmp_path / "vit").config.image_size == 20


def test_small_images_have_a_stem_that_transformers_has_not(tmp_path):
    config = ResNetConfig(
        num_classes=3, depths=(1,), widths=(8,), bottleneck=False, small_images=True
    )
    with pytest.raises(ValueError, match=r"that none has \(small_images\)"):
        save_pretrained(config(nnx.Rngs(0)), tmp_path / "out")


def test_models_of_images_have_no_options(tmp_path):
    config = ViTConfig(
        num_classes=3, image_size=8, patch_size=4, width=8, num_layers=1, num_heads=2
    )
    save_pretrained(config(nnx.Rngs(0)), tmp_path / "vit")
    with pytest.raises(TypeError, match=r"be among none for this model, got scan"):
        load_pretrained(tmp_path / "vit", scan=True)


has_transformers = all(importlib.util.find_spec(x) for x in ("torch", "transformers"))


@pytest.mark.skipif(
    not has_transformers, reason="needs torch and transformers to read what we write"
)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_we_write(name, tmp_path):
    import torch
    import transformers

    want = expected(name)
    save_pretrained(load_pretrained(FIXTURES / name), tmp_path / "out")
    architectures = json.loads((tmp_path / "out/config.json").read_text())
    kind = getattr(transformers, architectures["architectures"][0])
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    images = torch.from_numpy(want["images"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        got = model(images).logits.numpy()
    np.testing.assert_allclose(got, want["logits"], **TOLERANCE)
