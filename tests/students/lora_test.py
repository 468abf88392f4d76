"""Low-rank updates: nothing at first, trained alone, and merged to the same model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import make_distill_step, objectives
from distilljax.models import load_pretrained, save_pretrained
from distilljax.students import (
    Projected,
    Projection,
    add_lora,
    drift,
    fake_quantize,
    merge_lora,
    quantize_weights,
)
from tests.students.small import BATCH, arrays_of, decoder, logits_of

pytest.importorskip("qwix")


def updated(model, rank=2, **options):
    """With updates that are not 0."""
    student = add_lora(model, rank=rank, alpha=3.0, rngs=nnx.Rngs(1), **options)
    state = nnx.state(student, nnx.LoRAParam)
    nnx.update(student, jax.tree.map(lambda x: x + 0.1, state))
    return student


@pytest.mark.parametrize("scan", [False, True])
def test_it_starts_as_the_model_and_is_merged_to_itself(scan):
    model = decoder(num_layers=2, scan=scan, qkv_bias=True)
    fresh = add_lora(model, rank=2, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(logits_of(fresh), logits_of(model))
    student = updated(model)
    want = logits_of(student)
    assert np.abs(want - logits_of(model)).max() > 0.1
    merged = merge_lora(student)
    np.testing.assert_allclose(logits_of(merged), want, atol=1e-5, rtol=1e-5)
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    assert arrays_of(merged).keys() == arrays_of(model).keys()


def test_the_update_is_that_of_the_paper():
    model = decoder(num_layers=1)
    student = updated(model, modules="layers/0/mlp/up")
    up = student.layers[0].mlp.up
    x = jax.random.normal(jax.random.key(2), (3, 16))
    delta = x @ up.kernel_lora_a[...] @ up.kernel_lora_b[...] * (3.0 / 2)
    np.testing.assert_allclose(up(x), model.layers[0].mlp.up(x) + delta, rtol=1e-5)
    assert len(jax.tree.leaves(nnx.state(student, nnx.LoRAParam))) == 2


def test_layers_of_a_stack_start_differently():
    student = add_lora(decoder(num_layers=2, scan=True), rank=2, rngs=nnx.Rngs(1))
    a = student.layers.mlp.up.kernel_lora_a[...]
    assert a.shape == (2, 16, 2)
    assert np.abs(a[0] - a[1]).min() > 0


def test_over_4_bit_weights_it_is_merged_to_the_same():
    model = decoder(num_layers=1)
    options = {"weight_qtype": "nf4", "tile_size": 8}
    student = updated(model, **options)
    kernel = student.layers[0].mlp.up.kernel
    assert kernel.array.qvalue.dtype == jnp.uint4
    merged = merge_lora(student)
    want = logits_of(student)
    np.testing.assert_allclose(logits_of(merged), want, atol=1e-4, rtol=1e-4)
    assert drift(student, updated(model), [BATCH])["kl"].value > 1e-6


@pytest.mark.parametrize("options", [{}, {"weight_qtype": "nf4", "tile_size": 8}])
@pytest.mark.parametrize("pure", [False, True])
def test_updates_and_projections_are_trained_together(options, pure):
    """Both, and nothing else: the filter of one must not forget the other."""
    teacher = decoder(5, num_layers=2, width=24, scan=True)
    options = {**options, "modules": r".*/(query|up)"}
    student = add_lora(decoder(num_layers=2), rank=2, rngs=nnx.Rngs(1), **options)
    projected = objectives.FeatureKD(
        {"layers/1": "layers/1"}, projection=Projection(16, 24), weight=0.01
    )
    objective = objectives.Sum(
        {"logits": objectives.LogitKD(ce_weight=0.0), "features": projected}
    )
    step = make_distill_step(
        objective,
        teacher,
        student=student,
        tx=optax.adam(0.01),
        trainable=nnx.LoRAParam,
    )
    before = jax.tree.map(np.array, arrays_of(student))
    losses = []
    if pure:
        state = step.init(student)
        start = jax.tree.map(np.array, state.params["objective"])
        for _ in range(4):
            state, metrics = step.pure(state, step.teacher_state, BATCH)
            losses.append(float(metrics["loss"].value))
        own = state.params["objective"]
        nnx.update(student, state.params["student"])
        nnx.update(student, state.rest)
    else:
        both = Projected(student, objective, rngs=nnx.Rngs(2))
        start = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(both.objective)))
        optimizer = nnx.Optimizer(both, optax.adam(0.01), wrt=step.wrt)
        for _ in range(4):
            losses.append(float(step(both, optimizer, BATCH)["loss"].value))
        own = nnx.to_pure_dict(nnx.state(both.objective))
    assert losses[-1] < losses[0]
    assert all(
        np.abs(x - y).max() > 0
        for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(start), strict=True)
    )
    for path, x in arrays_of(student).items():
        assert ("lora" in path) == bool(np.any(np.array(x) != before[path])), path


def test_a_merged_student_can_be_saved(tmp_path):
    student = updated(decoder(num_layers=1, embed_scale=1.0))
    with pytest.raises(ValueError, match="save_pretrained"):
        save_pretrained(student, tmp_path / "adapters")
    save_pretrained(merge_lora(student), tmp_path / "merged")
    loaded = load_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits_of(loaded), logits_of(student), atol=1e-5)


def test_any_model_with_linear_maps_can_have_updates():
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    student = updated(model)
    x = jnp.eye(4)
    np.testing.assert_allclose(merge_lora(student)(x), student(x), rtol=1e-5)


def test_what_has_no_updates_is_not_merged():
    with pytest.raises(ValueError, match="model must have low-rank updates, got none"):
        merge_lora(decoder(num_layers=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "add_lora: rank must be at least 1, got 0"),
        ({"rank": 1, "alpha": 0.0}, "add_lora: alpha must be positive and finite"),
        ({"rank": 1, "modules": "nothing"}, "add_lora: modules must match the path"),
    ],
)
def test_updates_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        add_lora(decoder(num_layers=1), rngs=nnx.Rngs(0), **change)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: add_lora(model, rank=4, rngs=nnx.Rngs(2)),
        lambda model: quantize_weights(model, "int8"),
        lambda model: fake_quantize(model, "int8"),
    ],
    ids=["lora", "quantised", "fake"],
)
def test_updates_are_not_dropped_by_what_comes_after(change):
    student = updated(decoder(num_layers=2), modules=".*/(query|value)")
    match = "low-rank updates in layers/0/.* and 3 more. Call merge_lora first"
    with pytest.raises(ValueError, match=match):
        change(student)
    change(merge_lora(student))


def test_updates_are_added_before_kernels_are_quantised():
    small = quantize_weights(decoder(num_layers=1), "int8")
    with pytest.raises(ValueError, match="got quantised kernels in layers/0/"):
        add_lora(small, rank=2, rngs=nnx.Rngs(0))
    # what is elsewhere does not matter
    mixed = quantize_weights(decoder(num_layers=1), "int8", modules="layers/.*mlp/.*")
    add_lora(mixed, rank=2, rngs=nnx.Rngs(0), modules=".*/(query|value)")
