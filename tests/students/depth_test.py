"""A student of the teacher's layers: all of them are the teacher itself."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import make_distill_step, objectives
from distilljax.models import ViTConfig
from distilljax.students import keep_layers
from tests.students.small import BATCH, arrays_of, decoder, logits_of

GEMMA = {
    "window": 3,
    "local_layers": (True, False, False),
    "post_norm": True,
    "unit_offset": True,
    "tied": False,
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("changes", [{}, GEMMA])
def test_all_layers_say_what_the_teacher_says(scan, changes):
    teacher = decoder(scan=scan, **changes)
    made = keep_layers(teacher, 4)
    np.testing.assert_array_equal(logits_of(made.student), logits_of(teacher))
    assert made.layers == {f"layers/{i}": f"layers/{i}" for i in range(4)}
    assert made.parameters.ratio == 1


def test_layers_of_a_vit_are_kept_too():
    config = ViTConfig(
        num_classes=3, image_size=4, patch_size=2, width=8, num_layers=3, num_heads=2,
        ffn_width=16, distilled=True,
    )  # fmt: skip
    teacher = config(nnx.Rngs(0))
    silent = teacher.layers[1]  # what it adds is nothing
    for linear in (silent.attention.out, silent.mlp.down):
        linear.kernel.set_value(0 * linear.kernel[...])
    made = keep_layers(teacher, 2)
    assert made.layers == {"layers/0": "layers/0", "layers/1": "layers/2"}
    assert made.student.config.num_layers == 2
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    says = nnx.jit(lambda model, x: model(x))
    want = says(teacher, images)
    np.testing.assert_allclose(says(made.student, images), want, atol=1e-6)
    other = keep_layers(teacher, [0, 1]).student
    assert np.abs(says(other, images) - want).max() > 1e-4


@pytest.mark.parametrize("scan", [False, True])
def test_kept_layers_are_those_that_were_asked_for(scan):
    """A teacher whose other layers add nothing says the same without them."""
    teacher = decoder(scan=scan, **GEMMA)
    stacks = [teacher.layers] if scan else [teacher.layers[i] for i in (0, 2)]
    for layer in stacks:
        for norm in (layer.post_attention_norm, layer.post_mlp_norm):
            zero = norm.scale[...] * 0 - 1  # the scale is 1 + this
            kept = norm.scale[...] + 0.3
            at = np.isin(np.arange(4), (1, 3))[:, None]
            norm.scale.set_value(np.where(at, kept, zero) if scan else zero)
    made = keep_layers(teacher, [1, 3])
    assert made.student.config.locality == (False, True)
    assert made.layers == {"layers/0": "layers/1", "layers/1": "layers/3"}
    np.testing.assert_allclose(logits_of(made.student), logits_of(teacher), atol=1e-5)
    wrong = keep_layers(teacher, [0, 3]).student
    assert np.abs(logits_of(wrong) - logits_of(teacher)).max() > 1e-2


def test_a_number_of_layers_is_spaced_evenly():
    teacher = decoder(num_layers=6)
    last = {f"layers/{i}": f"layers/{j}" for i, j in enumerate((1, 3, 5))}
    assert keep_layers(teacher, 3, keep_first=False).layers == last
    ends = {f"layers/{i}": f"layers/{j}" for i, j in enumerate((0, 2, 5))}
    assert keep_layers(teacher, 3).layers == ends


def test_the_pairs_are_those_of_a_feature_objective():
    """Both ends are captured, and nothing is shared: the student is donated."""
    teacher = decoder()
    before = jax.tree.map(np.array, arrays_of(teacher))
    made = keep_layers(teacher, 2)
    objective = objectives.FeatureKD(made.layers)
    step = make_distill_step(objective, teacher)
    optimizer = nnx.Optimizer(made.student, optax.adam(1e-2), wrt=nnx.Param)
    first = step(made.student, optimizer, BATCH)
    assert first["layers/0"].value == 0  # the same layer of the same input
    assert first["layers/1"].value > 0
    assert step(made.student, optimizer, BATCH)["layers/0"].value > 0
    jax.tree.map(np.testing.assert_array_equal, arrays_of(teacher), before)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (5, r"num_student must lie in \[1, 4\], the layers of the teacher, got 5"),
        ((1, 4), r"layers must be increasing numbers in \[0, 4\), .* got \(1, 4\)"),
        ((2, 1), "layers must be increasing numbers"),
        ((), "layers must be increasing numbers"),
        ((-1,), "layers must be at least 0, got -1"),
    ],
)
def test_layers_that_the_teacher_lacks_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        keep_layers(decoder(), layers)


def test_a_model_without_layers_is_refused():
    with pytest.raises(TypeError, match="keep_layers: teacher must be a model"):
        keep_layers(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 1)
