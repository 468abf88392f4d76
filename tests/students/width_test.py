"""Slices: what is exactly 0 can go, and everything that depends on it follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax.models import load_pretrained, save_pretrained
from distilljax.students import (
    Importance,
    keep_layers,
    measure_importance,
    quantize_weights,
    slice_width,
)
from distilljax.students.made import filled
from distilljax.typing import path_of
from tests.students.small import BATCH, arrays_of, decoder, logits_of

KINDS = {
    "llama": {},
    "qwen": {"qkv_bias": True, "qk_norm": True, "tied": False},
    # what a block adds is small: norm_eps would count, which the scale leaves out
    "gemma": {
        "post_norm": True, "unit_offset": True, "tied": False, "norm_eps": 1e-12,
    },
    "gemma, tied": {
        "post_norm": True, "unit_offset": True, "norm_eps": 1e-12, "embed_scale": 4.0,
    },
    "biased": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
}  # fmt: skip
DEAD_CHANNELS = [0, 3, 4, 9]
DEAD_NEURONS = [1, 2, 20, 23]
# of two groups of heads the first
ZEROS = {
    "embed/embedding": (1, DEAD_CHANNELS),
    "attention/out/kernel": (1, DEAD_CHANNELS),
    "mlp/down/kernel": (1, DEAD_CHANNELS),
    "out/bias": (0, DEAD_CHANNELS),
    "down/bias": (0, DEAD_CHANNELS),
    "up/kernel": (1, DEAD_NEURONS),
    "up/bias": (0, DEAD_NEURONS),
    "value/kernel": (1, slice(0, 4)),
    "value/bias": (0, slice(0, 4)),
}


def with_zeros(teacher):
    """Channels, neurons and heads that never are anything but 0; all else random."""
    state = nnx.state(teacher, nnx.Param)

    def fill(path, x):
        name = path_of(path)
        key = jax.random.key(sum(name.encode()))
        new = np.array(x + 0.1 * jax.random.normal(key, x.shape))
        lead = int(teacher.config.scan and name.startswith("layers"))
        for end, (axis, index) in ZEROS.items():
            if name.endswith(end):
                new[(slice(None),) * (axis + lead) + (index,)] = 0
        return jnp.array(new)

    arrays = jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state))
    return filled(teacher, arrays)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_zero_can_go(kind, scan):
    teacher = with_zeros(decoder(scan=scan, num_layers=2, **KINDS[kind]))
    found = measure_importance(teacher, [BATCH])
    made = slice_width(teacher, found, width=12, num_kv_heads=1, ffn_width=20)
    config = made.student.config
    assert (config.width, config.num_heads, config.num_kv_heads) == (12, 2, 1)
    want = logits_of(teacher)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(logits_of(made.student), want, atol=1e-5, rtol=1e-5)


def test_slices_of_nothing_are_the_teacher():
    teacher = decoder(num_layers=2, **KINDS["gemma"])
    made = slice_width(teacher, measure_importance(teacher, [BATCH]))
    np.testing.assert_array_equal(logits_of(made.student), logits_of(teacher))
    ours = {id(x) for x in arrays_of(made.student).values()}
    assert not ours & {id(x) for x in arrays_of(teacher).values()}


def test_the_best_stay_in_their_order():
    teacher = decoder(num_layers=1)
    found = Importance(
        channels=jnp.arange(16.0)[::-1],
        neurons=jnp.ones((1, 24)).at[0, 9].set(3.0).at[0, 4].set(2.0),
        heads=jnp.array([[1.0, 0.0, 0.0, 2.0]]),
        energy=measure_importance(teacher, [BATCH]).energy,
    )
    made = slice_width(teacher, found, width=3, num_kv_heads=1, ffn_width=2)
    layer, theirs = made.student.layers[0], teacher.layers[0]
    gate = theirs.mlp.gate.kernel[...]
    np.testing.assert_array_equal(layer.mlp.gate.kernel, gate[:3, np.array([4, 9])])
    value = theirs.attention.value.kernel[...]
    np.testing.assert_array_equal(layer.attention.value.kernel, value[:3, 4:])
    out = theirs.attention.out.kernel[...]
    np.testing.assert_array_equal(layer.attention.out.kernel, out[8:, :3])
    embedding = teacher.embed.embedding[...]
    np.testing.assert_array_equal(made.student.embed.embedding, embedding[:, :3])


def test_norms_keep_the_scale_of_what_stays():
    """On the data that was measured, channels are as large after a norm as before."""
    teacher = decoder(num_layers=1)
    x = teacher.embed.embedding[...].at[:, :4].mul(5.0)
    teacher.embed.embedding.set_value(x)
    found = measure_importance(teacher, [BATCH])
    student = slice_width(teacher, found, width=4).student
    energy = found.energy["attention_norm"][0]
    want = np.sqrt(energy[:4].mean() / energy.mean())
    assert want > 1.5
    np.testing.assert_allclose(student.layers[0].attention_norm.scale, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 17}, "width must be at most the teacher's, 16, got 17"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"ffn_width": 25}, "ffn_width must be at most the teacher's, 24, got 25"),
    ],
)
def test_sizes_that_the_teacher_lacks_are_refused(sizes, message):
    teacher = decoder(num_layers=1)
    with pytest.raises(ValueError, match=message):
        slice_width(teacher, measure_importance(teacher, [BATCH]), **sizes)


def test_scores_of_another_model_are_refused():
    found = measure_importance(decoder(num_layers=1), [BATCH])
    with pytest.raises(ValueError, match="importance must be that of the teacher"):
        slice_width(decoder(num_layers=2), found, width=8)


def test_a_slice_of_gemma_is_a_gemma(tmp_path):
    """Whose files have no scale of embeddings but the root of their width."""
    gemma = {**KINDS["gemma, tied"], "window": 8, "local_layers": (True, False)}
    teacher = decoder(num_layers=2, logit_softcap=3.0, attention_softcap=5.0, **gemma)
    found = measure_importance(teacher, [BATCH])
    student = slice_width(teacher, found, width=9).student
    assert student.config.embed_scale == 3.0
    save_pretrained(student, tmp_path / "student")
    again = load_pretrained(tmp_path / "student")
    np.testing.assert_allclose(logits_of(again), logits_of(student), atol=1e-6)


def test_changed_kernels_are_not_sliced():
    teacher = decoder(num_layers=2)
    found = measure_importance(teacher, [BATCH])
    small = quantize_weights(teacher, "int8")
    for make in (lambda: keep_layers(small, 1), lambda: slice_width(small, found)):
        with pytest.raises(ValueError, match="teacher must have plain linear maps"):
            make()
