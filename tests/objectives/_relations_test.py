"""Every relation loss through the step. What is protected:

tokens and feature maps are points as the page says; values are those of the points that
count, in the pure layer and in place; padding changes nothing, in a row of many
positions neither; eight devices see the whole batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import Outputs, losses, make_distill_step
from distilljax.objectives import RelationKD, Sum
from tests.losses import feature_oracles, relation_oracles
from tests.meshes import assert_close, sharded

TIME, CHANNELS = 3, 3


class Maps(nnx.Module):
    """Each position as two places of an image."""

    def __init__(self, width, rngs):
        self.linear = nnx.Linear(width, 2 * CHANNELS, rngs=rngs)

    def __call__(self, x):
        return self.linear(x).reshape(*x.shape[:-1], 2, CHANNELS)


class Net(nnx.Module):
    """Tokens, and an image made of them."""

    def __init__(self, width, seed):
        rngs = nnx.Rngs(seed)
        self.tokens = nnx.Linear(5, width, rngs=rngs)
        self.maps = Maps(width, rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        h = self.tokens(x)
        self.maps(h)
        return self.head(h)


STUDENT, TEACHER = Net(6, 0), Net(7, 1)
MASK = np.ones((16, TIME), bool)
MASK[::3, 2] = MASK[::5, 1] = MASK[4] = False  # some tokens, and a whole example
INPUTS = jax.random.normal(jax.random.key(2), (16, TIME, 5))

# With its usual weight, so that all gradients are of one size.
POINTS = {
    "rkd_distance": (losses.rkd_distance, relation_oracles.rkd_distance, 25.0),
    "rkd_angle": (losses.rkd_angle, relation_oracles.rkd_angle, 50.0),
    "similarity_preserving": (
        losses.similarity_preserving,
        relation_oracles.similarity_preserving,
        100.0,
    ),
    "probabilistic_transfer": (
        losses.probabilistic_transfer,
        relation_oracles.pkt,
        100.0,
    ),
    "correlation_congruence": (
        losses.correlation_congruence,
        relation_oracles.congruence,
        10.0,
    ),
    "embedding_relation": (losses.embedding_relation, relation_oracles.embedding, 1.0),
    "linear_cka": (losses.linear_cka, feature_oracles.linear_cka, 1.0),
}


def batch_of(size):
    return {"inputs": INPUTS[:size], "loss_mask": jnp.asarray(MASK[:size])}


TOKENS = {
    name: RelationKD({"tokens": "tokens"}, loss, weight)
    for name, (loss, _, weight) in POINTS.items()
}
TOKENS["dist"] = RelationKD({"logits": "logits"}, losses.dist)
MAPS = {
    name: RelationKD({"maps": "maps"}, loss, weight, flatten=True)
    for name, (loss, _, weight) in POINTS.items()
}
MAPS["channels"] = RelationKD({"maps": "maps"}, losses.interchannel_correlation)
ALL = Sum({"tokens": Sum(TOKENS), "maps": Sum(MAPS)})


def features(net, inputs):
    h = net.tokens(inputs)
    found = {"tokens": h, "maps": net.maps(h), "logits": net.head(h)}
    return {name: np.asarray(x) for name, x in found.items()}


def expected_values(size):
    """In float64, of the points that count and of no others."""
    mask = MASK[:size]
    kept, some = mask.any(axis=1), mask[..., None, None]
    found = {}
    pairs = [features(net, INPUTS[:size]) for net in (STUDENT, TEACHER)]
    rows = [
        {
            "tokens": f["tokens"][mask],
            "maps": np.where(some, f["maps"], 0)[kept],
            "logits": f["logits"][mask],
        }
        for f in pairs
    ]
    for name, (_, oracle, _) in POINTS.items():
        found[f"tokens/{name}/tokens"] = oracle(*(r["tokens"] for r in rows))
        flat = (r["maps"].reshape(len(r["maps"]), -1) for r in rows)
        found[f"maps/{name}/maps"] = oracle(*flat)
    channels = relation_oracles.icc(*(r["maps"] for r in rows))
    found["maps/channels/maps"] = channels.mean()
    found["tokens/dist/logits"] = relation_oracles.dist(*(r["logits"] for r in rows))
    return found


def step_in_place(batch):
    student = Net(6, 0)  # a clone would share its arrays, which are overwritten
    optimizer = nnx.Optimizer(student, optax.sgd(0.01), wrt=nnx.Param)
    step = make_distill_step(ALL, TEACHER)
    first = step(student, optimizer, batch)
    step(student, optimizer, batch)
    assert step._in_place.compiled._cache_size() == 1
    return nnx.to_pure_dict(nnx.state(student)), first


def step_of_trees(batch):
    step = make_distill_step(ALL, TEACHER, student=STUDENT, tx=optax.sgd(0.01))
    state, first = step.pure(step.init(STUDENT), step.teacher_state, batch)
    state, _ = step.pure(state, step.teacher_state, batch)
    assert step.pure._cache_size() == 1
    return state.params, first


def test_every_relation_is_that_of_the_points_that_count():
    batch = batch_of(6)
    params, metrics = step_of_trees(batch)
    expected = expected_values(6)
    assert expected.keys() < metrics.keys()
    for name, value in expected.items():
        assert value > 1e-4, f"{name} is trivial"
        np.testing.assert_allclose(
            metrics[name].value, value, rtol=1e-4, atol=1e-6, err_msg=name
        )
    assert int(metrics["maps/channels/maps"].count) == 5  # one example is not there
    before = nnx.to_pure_dict(nnx.state(STUDENT))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, before)
    assert moved["tokens"]["kernel"]
    assert moved["head"]["kernel"]
    assert moved["maps"]["linear"]["kernel"]
    # the same in place, with anything at all in the padding
    loud = jnp.where(batch["loss_mask"][..., None], batch["inputs"], 1e3)
    others, found = step_in_place({**batch, "inputs": loud})
    for name in expected:
        np.testing.assert_allclose(
            found[name].value, metrics[name].value, rtol=1e-6, err_msg=name
        )
    assert_close(others, params, rtol=1e-5, atol=1e-6)


def test_relations_on_eight_devices_are_those_of_the_whole_batch():
    args = (Sum({**TOKENS, "channels": MAPS["channels"]}), TEACHER, STUDENT)
    one = sharded("data=1", *args, batch_of(16), devices=1)
    eight = sharded("data=2,fsdp=2,tensor=2", *args, batch_of(16))
    assert_close(eight[:2], one[:2], rtol=1e-5, atol=1e-6)


def test_distances_are_the_default():
    s, t = ({"h": INPUTS[:6, i]} for i in (0, 1))
    terms = RelationKD({"h": "h"})(Outputs(features=s), Outputs(features=t), {})
    expected = losses.rkd_distance(s["h"], t["h"])
    np.testing.assert_array_equal(terms["h"].mean().value, expected)


def test_images_that_are_no_points_yet_and_heads_are_said_with_the_fix():
    images = Outputs(features={"h": jnp.ones((4, 2, 2, 3))})
    batch = {"loss_mask": jnp.ones(4, bool)}
    for loss in (losses.rkd_distance, losses.similarity_preserving):
        with pytest.raises(ValueError, match="must have the shape") as caught:
            RelationKD({"h": "h"}, loss)(images, images, batch)
        assert "flatten=True" in "".join(caught.value.__notes__)
    head = Outputs(losses.LinearHead(jnp.ones((4, 3)), jnp.ones((3, 5))))
    with pytest.raises(TypeError, match=r"'logits' must be an array, got LinearHead"):
        RelationKD({"logits": "logits"}, losses.dist)(head, head, batch)
