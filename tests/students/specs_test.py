"""Students in a config: they build what the functions build, and are saved with it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from distilljax import students
from distilljax.config import from_json, to_json
from distilljax.models import DecoderConfig, ResNetConfig, save_pretrained
from tests.students.small import BATCH, arrays_of, decoder, logits_of


def calibration():
    return [BATCH]


SMALL = DecoderConfig(
    vocab_size=32, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    ffn_width=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "teacher"
    teacher = decoder(num_layers=2, embed_scale=1.0)
    save_pretrained(teacher, path)
    return teacher, students.Pretrained(str(path))


def specs(source):
    copied = students.Copied(source)
    return {
        "copied": copied,
        "kept": students.KeptLayers(source, layers=(1,)),
        "sliced": students.SlicedWidth(source, calibration, width=8, num_kv_heads=1),
        "embedding": students.WithEmbedding(SMALL, source),
        "lora": students.LoRA(copied, rank=2, weight_qtype="nf4", tile_size=8),
        "fake": students.FakeQuantized(copied, "int4", tile_size=8),
    }


@pytest.mark.parametrize("kind", specs(None))
def test_a_spec_builds_a_student_under_the_transformations_of_a_run(saved, kind):
    """A run asks for shapes first, then for arrays in a compiled program."""
    spec = specs(saved[1])[kind]
    if kind in ("lora", "fake"):
        pytest.importorskip("qwix")
    assert from_json(to_json(spec)) == spec
    want = arrays_of(spec(nnx.Rngs(0)))
    abstract = nnx.eval_shape(lambda: spec(nnx.Rngs(0)))
    shapes = {path: x.shape for path, x in arrays_of(abstract).items()}
    assert shapes == {path: x.shape for path, x in want.items()}
    made = jax.jit(lambda key: nnx.state(spec(nnx.Rngs(key))))(jax.random.key(0))
    got = jax.tree.leaves(nnx.to_pure_dict(made))
    for x, y in zip(got, want.values(), strict=True):
        np.testing.assert_allclose(
            x.astype("float32"), y.astype("float32"), atol=1e-6, rtol=1e-5
        )


def test_specs_make_what_the_functions_make(saved):
    teacher, source = saved
    found = specs(source)
    np.testing.assert_allclose(
        logits_of(found["copied"](nnx.Rngs(0))), logits_of(teacher), atol=1e-6
    )
    made = found["kept"].make()
    assert made.layers == {"layers/0": "layers/1"}
    want = students.keep_layers(teacher, [1]).student
    np.testing.assert_allclose(logits_of(made.student), logits_of(want), atol=1e-6)
    importance = students.measure_importance(teacher, calibration())
    want = students.slice_width(teacher, importance, width=8, num_kv_heads=1).student
    made = found["sliced"].make()
    np.testing.assert_allclose(logits_of(made.student), logits_of(want), atol=1e-5)
    made = found["embedding"].make(nnx.Rngs(0))
    assert made.layers == {"layers/0": "layers/0", "layers/1": "layers/1"}


def test_a_model_of_images_is_a_teacher_of_a_config(tmp_path):
    config = ResNetConfig(
        num_classes=3, depths=(1,), widths=(4,), bottleneck=False, stem_width=4
    )
    teacher = config(nnx.Rngs(0))
    teacher.stem.norm.mean.set_value(teacher.stem.norm.mean[...] + 2)
    save_pretrained(teacher, tmp_path / "resnet")
    found = students.Pretrained(str(tmp_path / "resnet"))()
    for path, x in arrays_of(teacher).items():
        np.testing.assert_array_equal(arrays_of(found)[path], x)


def test_a_quantised_teacher_is_loaded_and_rounded(saved):
    pytest.importorskip("qwix")
    teacher, source = saved
    spec = students.QuantizedTeacher(source, "int4", tile_size=8)
    assert from_json(to_json(spec)) == spec
    want = students.quantize_weights(teacher, "int4", tile_size=8)
    np.testing.assert_allclose(logits_of(spec()), logits_of(want), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: students.Copied(DecoderConfig), "source must be an instance"),
        (lambda: students.KeptLayers(DecoderConfig, 2), "teacher must be an instance"),
        (lambda: students.LoRA(SMALL, rank=0), "LoRA: rank must be at least 1, got 0"),
        (
            lambda: students.QuantizedTeacher(SMALL, tile_size=0),
            "QuantizedTeacher: tile_size must be at least 1, got 0",
        ),
    ],
)
def test_specs_that_cannot_be_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
