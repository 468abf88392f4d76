"""ResNets: their published sizes, their features, and both modes of BatchNorm.

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

from distilljax import losses, make_distill_step
from distilljax._capture import with_features
from distilljax._functional import default_forward
from distilljax.models import ResNetConfig
from distilljax.objectives import FeatureKD, LogitKD, Sum
from distilljax.sharding import batch_sharding, mesh_from_string, tree_shardings
from tests.meshes import assert_close

BASIC = ResNetConfig(widths=(64, 128, 256, 512), bottleneck=False)
SMALL = ResNetConfig(
    num_classes=100,
    depths=(3, 3, 3),
    widths=(16, 32, 64),
    bottleneck=False,
    stem_width=16,
    small_images=True,
)
TINY = replace(SMALL, num_classes=4, depths=(1, 1), widths=(4, 8), stem_width=4)
IMAGES = np.random.default_rng(0).standard_normal((8, 8, 8, 3), np.float32)
BATCH = {"inputs": IMAGES, "labels": np.arange(8, dtype=np.int32) % 4}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (replace(BASIC, depths=(2, 2, 2, 2)), 11_689_512),  # 18, 50, 101: torchvision
        (ResNetConfig(), 25_557_032),
        (ResNetConfig(depths=(3, 4, 23, 3)), 44_549_160),
        (SMALL, 278_324),  # resnet20 of contrastive representation distillation
    ],
)
def test_sizes_are_the_published_ones(config, parameters):
    model = nnx.eval_shape(lambda: config(nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(x.size for x in leaves) == parameters


@pytest.mark.parametrize(
    ("config", "size", "stem", "stages"),
    [
        (replace(BASIC, depths=(1, 1, 1, 1)), 224, 112, (56, 28, 14, 7)),
        (replace(SMALL, depths=(1, 1, 1)), 32, 32, (32, 16, 8)),
    ],
)
def test_stages_are_features_of_falling_size(config, size, stem, stages):
    names = ["stem", *(f"stages/{i}" for i in range(len(stages)))]
    forward = with_features(default_forward, [*names, "stages/0/blocks/0"])

    def features(x):
        return forward(config(nnx.Rngs(0)), {"inputs": x}).features

    found = nnx.eval_shape(features, jnp.zeros((2, size, size, 3)))
    got = [found[name].shape for name in names]
    widths = (config.stem_width, *config.widths)
    sizes = zip((stem, *stages), widths, strict=True)
    assert got == [(2, side, side, width) for side, width in sizes]
    assert found["stages/0/blocks/0"].shape == found["stages/0"].shape


def test_a_small_resnet_learns_logits_and_attention_in_bfloat16():
    teacher = replace(TINY, widths=(8, 16))(nnx.Rngs(0))
    student = TINY(nnx.Rngs(1))
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
    stages = {"stages/0": "stages/0", "stages/1": "stages/1"}
    attention = FeatureKD(stages, loss=losses.attention_transfer)
    objective = Sum({"soft": LogitKD(ce_weight=0.0), "maps": attention})
    step = make_distill_step(objective, teacher, compute_dtype=jnp.bfloat16)
    teachers = nnx.to_pure_dict(nnx.state(teacher, nnx.BatchStat))
    found = [step(student, optimizer, BATCH) for _ in range(30)]
    for term in ("soft/kd", "maps/stages/1"):
        assert found[-1][term].value < 0.6 * found[0][term].value, term
    norm = student.stages[1].blocks[0].shortcut.norm
    assert norm.mean.dtype == norm.scale.dtype == jnp.float32
    assert jnp.abs(norm.mean[...]).max() > 0
    assert_close(nnx.to_pure_dict(nnx.state(teacher, nnx.BatchStat)), teachers, 0, 0)


def test_nothing_but_statistics_is_computed_in_float32_in_bfloat16():
    """Else a single norm would make all that follows it float32."""
    model = TINY(nnx.Rngs(0))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param))
    nnx.update(model, params)
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s, copy=True)(x))(
        state, IMAGES.astype(jnp.bfloat16)
    )
    convolutions = [
        eqn for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"
    ]
    assert len(convolutions) == 1 + 2 * 2 + 1
    assert all(eqn.outvars[0].aval.dtype == jnp.bfloat16 for eqn in convolutions)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


def test_an_image_is_normalised_with_the_batch_then_by_itself():
    model = TINY(nnx.Rngs(0))
    run = nnx.jit(lambda model, x: model(x))
    assert not np.allclose(run(model, IMAGES[:4]), run(model, IMAGES)[:4], atol=1e-3)
    model.eval()
    kept = np.array(model.stem.norm.mean)
    np.testing.assert_allclose(
        run(model, IMAGES[:4]), run(model, IMAGES)[:4], atol=1e-6
    )
    np.testing.assert_array_equal(model.stem.norm.mean, kept)


def test_a_mesh_changes_nothing():
    """Statistics are those of the whole batch, wherever its parts are."""
    graphdef, state = nnx.split(TINY(nnx.Rngs(0)))

    @jax.jit
    def gradient(state, images):
        def loss(state):
            model = nnx.merge(graphdef, state, copy=True)
            return jnp.mean(model(images) ** 2), nnx.state(model, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(state)

    want = gradient(state, IMAGES)
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    state = jax.device_put(state, tree_shardings(state, mesh, min_size=1))
    assert state.head.kernel.get_value().sharding.spec == jax.P("fsdp")
    with jax.set_mesh(mesh):
        found = gradient(state, jax.device_put(IMAGES, batch_sharding(mesh)))
    assert_close(found, want, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1,)}, r"widths must be of one length with depths, \(1,\)"),
        ({"depths": (), "widths": ()}, "widths must be of one length"),
        ({"depths": (1, 0)}, "depths must be at least 1, got 0"),
        ({"bottleneck": True, "widths": (4, 6)}, "widths must be multiples of 4"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("shape", [(8, 8, 1), (64,)])
def test_examples_of_another_shape_are_refused(shape):
    model = nnx.eval_shape(lambda: TINY(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"be \[height, width, 3\], got the shape"):
        model._check(shape)
