"""ViT and DeiT: their published sizes, their features, their two heads.

That they compute what others compute is tested in pretrained/vision_test.py.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import Outputs, losses, make_distill_step
from distilljax.models import MLP, VIT_RULES, ViTConfig
from distilljax.objectives import FeatureKD, HardDistillation, LogitKD, Sum
from tests.meshes import assert_close, sharded

TINY_16 = ViTConfig(width=192, num_heads=3, ffn_width=768)
SMALL = ViTConfig(
    num_classes=4,
    image_size=8,
    patch_size=4,
    width=16,
    num_layers=1,
    num_heads=2,
    ffn_width=32,
)
IMAGES = np.random.default_rng(0).standard_normal((8, 8, 8, 3), np.float32)
BATCH = {"inputs": IMAGES, "labels": jnp.arange(8) % 4}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ViTConfig(), 86_567_656),  # of timm
        (replace(TINY_16, distilled=True), 5_910_800),
    ],
)
def test_sizes_are_the_published_ones(config, parameters):
    model = nnx.eval_shape(lambda: config(nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(x.size for x in leaves) == parameters


def test_the_second_head_learns_from_the_teacher_and_both_speak_in_inference():
    teacher = jax.random.normal(jax.random.key(0), (8, 4))
    student, same = (replace(SMALL, distilled=True)(nnx.Rngs(1)) for _ in range(2))
    optimizer = nnx.Optimizer(student, optax.sgd(0.0), wrt=nnx.Param)
    step = make_distill_step(HardDistillation("distillation_head"))
    metrics = step(student, optimizer, {**BATCH, "teacher": Outputs(teacher)})

    @nnx.jit
    def both_modes(model, x):
        model.train()
        by_class = model(x)
        model.eval()
        return by_class, 2 * model(x) - by_class

    by_class, by_teacher = both_modes(same, IMAGES)
    ce = losses.cross_entropy(by_class, BATCH["labels"])
    np.testing.assert_allclose(metrics["ce"].value, ce.mean(), rtol=1e-5)
    kd = losses.cross_entropy(by_teacher, jnp.argmax(teacher, axis=-1))
    np.testing.assert_allclose(metrics["kd"].value, kd.mean(), rtol=1e-5)


def test_a_small_vit_learns_logits_and_tokens_in_bfloat16():
    keys = jax.random.split(jax.random.key(0))
    tokens = 0.1 * jax.random.normal(keys[1], (8, SMALL.num_tokens, SMALL.width))
    teacher = Outputs(jax.random.normal(keys[0], (8, 4)), {"hidden": tokens})
    student = SMALL(nnx.Rngs(1))
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
    tokens = FeatureKD({"layers/0": "hidden"})
    objective = Sum({"soft": LogitKD(ce_weight=0.0), "tokens": tokens})
    step = make_distill_step(objective, compute_dtype=jnp.bfloat16)
    batch = {**BATCH, "teacher": teacher}
    found = [step(student, optimizer, batch) for _ in range(60)]
    for term in ("soft/kd", "tokens/layers/0"):
        assert found[-1][term].value < 0.5 * found[0][term].value, term
    assert student.positions.dtype == jnp.float32


def test_bfloat16_stays_bfloat16():
    model = replace(SMALL, distilled=True)(nnx.Rngs(0))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param))
    nnx.update(model, params)
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s, copy=True)(x))(
        state, IMAGES.astype(jnp.bfloat16)
    )
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) >= 6 * SMALL.num_layers + 2
    assert all(e.invars[0].aval.dtype == jnp.bfloat16 for e in products)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


def test_a_mesh_changes_nothing(capfd):
    # with a bias of keys, whose gradient is 0, Adam would turn rounding into steps
    config = replace(SMALL, qkv_bias=False, distilled=True)
    teacher = MLP(num_features=192, hidden=(8,), num_classes=4)(nnx.Rngs(0))
    student = config(nnx.Rngs(1))
    given = (LogitKD(ce_weight=0.5), teacher, student, BATCH, VIT_RULES)
    one, metrics, _ = sharded("data=1", *given, devices=1)
    many, sharded_metrics, shardings = sharded("data=2,fsdp=2,tensor=2", *given)
    assert_close(many.params, one.params, atol=1e-6)
    assert_close(sharded_metrics["loss"], metrics["loss"])
    # what XLA says where it gathers the tokens of all examples on each device
    assert "full rematerialization" not in capfd.readouterr().err
    layer = shardings.params["layers"][0]
    assert tuple(layer["attention"]["query"]["kernel"].spec) == ("fsdp", "tensor")
    assert tuple(layer["mlp"]["down"]["kernel"].spec) == ("tensor", "fsdp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "image_size must be a multiple of patch_size, 3, got 8"),
        ({"num_heads": 3}, "width must be a multiple of num_heads, 3, got 16"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite, got 0.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 16, 3), (64,)])
def test_examples_of_another_shape_are_refused(shape):
    model = nnx.eval_shape(lambda: SMALL(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"must have the shape \(8, 8, 3\), got"):
        model._check(shape)
