"""Objectives over features, and the projections that they own. What is protected:

masks mean the same for tokens, images and pooled features; projections are trained with
the student, map each position by itself, have a group and a checkpoint, and are no part
of the student that is evaluated or exported.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import Outputs, losses, make_distill_step, reduce_terms
from distilljax.objectives import (
    AttentionKD,
    ContrastiveKD,
    FeatureKD,
    LogitKD,
    RelationKD,
    Sum,
    evenly_spaced,
)
from distilljax.optimizers import AdamW, Group
from distilljax.students import Projected, Projection


def features(*shape, seed=0):
    return Outputs(features={"h": jax.random.normal(jax.random.key(seed), shape)})


class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden = nnx.Linear(5, width, rngs=rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


HINT = FeatureKD({"hidden": "hidden"}, projection=Projection(4, 7))
BOTH = Sum({"logits": LogitKD(), "hint": HINT})
BATCH = {
    "inputs": jax.random.normal(jax.random.key(3), (8, 5)),
    "loss_mask": jnp.arange(8) != 1,
}


# --- layers, masks, weights -----------------------------------------------------------


def test_layers_are_evenly_spaced():
    """distil-whisper's choice, which keeps both ends, and TinyBERT's g(m) = 3 m."""
    assert evenly_spaced(2, 24) == (0, 23)
    assert evenly_spaced(4, 32) == (0, 10, 20, 31)
    assert evenly_spaced(1, 12) == (11,)
    assert evenly_spaced(4, 12, keep_first=False) == (2, 5, 8, 11)
    assert evenly_spaced(3, 3) == evenly_spaced(3, 3, keep_first=False) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"num_student must lie in \[1, 2\].*got 3"):
        evenly_spaced(3, 2)


@pytest.mark.parametrize(
    ("shape", "mask", "count"),
    [
        ((4, 6), [1, 1, 0, 1], 3),  # an example
        ((4, 2, 6), [[1, 0], [1, 1], [0, 0], [1, 1]], 5),  # a token
        ((4, 2, 3, 6), [1, 1, 0, 1], 18),  # an image counts in all its places
        ((4, 6), [[1, 0], [1, 1], [0, 0], [1, 1]], 3),  # pooled over tokens
    ],
)
def test_the_mask_is_that_of_the_batch(shape, mask, count):
    batch = {"loss_mask": jnp.array(mask, bool)}
    s, t = features(*shape), features(*shape, seed=1)
    broken = Outputs(features={"h": s.features["h"].at[2].set(jnp.nan)})
    objective = FeatureKD({"h": "h"}, weight=2.0)
    (loss, metrics), (other, _) = (
        reduce_terms(objective(x, t, batch)) for x in (s, broken)
    )
    assert metrics["h"].count == count
    np.testing.assert_allclose(loss, other)
    np.testing.assert_allclose(loss, 2 * metrics["h"].value, rtol=1e-6)


def test_nan_at_a_masked_position_does_not_reach_the_projection():
    objective = FeatureKD({"h": "h"}, projection=Projection(6, 9))
    student, teacher = features(4, 6), features(4, 9, seed=1)
    student = Outputs(features={"h": student.features["h"].at[2].set(jnp.nan)})
    batch = {"loss_mask": jnp.arange(4) != 2}

    def loss(params):
        return reduce_terms(objective(student, teacher, batch, params=params))[0]

    grads = jax.grad(loss)(objective.init_params(jax.random.key(0)))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_weight_is_that_of_the_mean_over_pairs():
    student = Outputs(features={"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 3))})
    teacher = Outputs(features={"c": jnp.zeros((2, 3)), "d": 3 * jnp.ones((2, 3))})
    objective = FeatureKD({"a": "c", "b": "d"}, weight=lambda step: 0.5 * step)
    loss, _ = reduce_terms(objective(student, teacher, {"step": 4}))
    np.testing.assert_allclose(loss, 2.0 * (1 + 9) / 2)
    assert objective.student_features == ("a", "b")
    assert objective.teacher_features == ("c", "d")


def test_bad_layers_widths_and_names_are_said():
    with pytest.raises(ValueError, match="layers must map features"):
        FeatureKD({})
    with pytest.raises(ValueError, match=r"projection must name features.*got x"):
        FeatureKD({"h": "h"}, projection={"x": Projection(1, 1)})
    noisy = losses.variational_information
    with pytest.raises(ValueError, match="variance must be None without a projection"):
        FeatureKD({"h": "h"}, noisy, variance=1.0)
    with pytest.raises(ValueError, match="variance must be given for a loss with raw"):
        FeatureKD({"h": "h"}, noisy)
    with pytest.raises(ValueError, match="variance must be None for a loss without"):
        FeatureKD({"h": "h"}, projection=Projection(1, 1), variance=1.0)
    with pytest.raises(ValueError, match="variance must be positive and finite"):
        FeatureKD({"h": "h"}, noisy, projection=Projection(1, 1), variance=-1.0)
    with pytest.raises(ValueError, match=r"student's features must have 'x'.*\['h'\]"):
        FeatureKD({"x": "h"})(features(2, 3), features(2, 3), {})
    with pytest.raises(ValueError, match="teacher must have features, got no outputs"):
        FeatureKD({"h": "h"})(features(2, 3), None, {})
    with pytest.raises(ValueError, match=r"loss_mask'\] must begin as"):
        FeatureKD({"h": "h"})(
            features(2, 3), features(2, 3), {"loss_mask": jnp.ones(5)}
        )
    objective = FeatureKD({"h": "h"}, projection=Projection(4, 3))
    params = objective.init_params(jax.random.key(0))
    with pytest.raises(ValueError, match=r"student_width must be .*\(2, 3\), got 4"):
        objective(features(2, 3), features(2, 3), {}, params=params)
    with pytest.raises(ValueError, match="num_relation_heads must be given"):
        AttentionKD({"q": "q"})
    with pytest.raises(ValueError, match="num_relation_heads must be at least 1"):
        AttentionKD({"q": "q"}, num_relation_heads=0)
    for name in ("queue_size", "width"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ContrastiveKD("h", "h", 3, 3, **{name: 0})
    with pytest.raises(ValueError, match="student_width must be at least 1, got 0"):
        Projection(0, 3)


def test_the_layers_of_a_scan_are_named_one_by_one():
    """Stacked features have the layers before the examples, where a mask has none."""
    batch = {"loss_mask": jnp.arange(16) != 1}
    stacked = features(2, 16, 3)
    with pytest.raises(ValueError, match=r"layers of a scan.*\{'blocks/0': 'blocks/0"):
        FeatureKD({"h": "h"})(stacked, stacked, batch)


def test_logits_that_are_never_whole_are_no_feature():
    head = Outputs(losses.LinearHead(jnp.ones((4, 2)), jnp.ones((2, 3))))
    for objective in (
        FeatureKD({"logits": "logits"}),
        RelationKD({"logits": "logits"}, losses.dist),
        ContrastiveKD("logits", "logits", 3, 3, width=2, queue_size=4),
    ):
        state = {"params": {}, "state": {}}
        own = state if isinstance(objective, ContrastiveKD) else {}
        with pytest.raises(TypeError, match=r"'logits' must be an array.*head\.logits"):
            objective(head, head, {}, **own)


def test_a_loss_of_the_whole_batch_is_one_value():
    s, t = features(6, 2, 3), features(6, 2, 5, seed=1)
    mask = jnp.array([[1, 1]] * 5 + [[0, 0]], bool)
    tokens = RelationKD({"h": "h"}, losses.linear_cka)(s, t, {"loss_mask": mask})
    expected = losses.linear_cka(*(x.features["h"][:5].reshape(10, -1) for x in (s, t)))
    np.testing.assert_allclose(tokens["h"].mean().value, expected, rtol=1e-4)
    images = RelationKD({"h": "h"}, losses.linear_cka, flatten=True)
    terms = images(s, t, {"loss_mask": mask[:, 0]})
    expected = losses.linear_cka(*(x.features["h"][:5].reshape(5, -1) for x in (s, t)))
    np.testing.assert_allclose(terms["h"].mean().value, expected, rtol=1e-4)


def test_attention_takes_heads_as_nnx_has_them():
    s, t = features(2, 5, 2, 4), features(2, 5, 3, 4, seed=1)
    mask = jnp.arange(5)[None, :] < jnp.array([[5], [3]])
    terms = AttentionKD({"h": "h"}, num_relation_heads=4)(s, t, {"loss_mask": mask})
    assert terms["h"].mean().count == 8
    flat = (x.features["h"].reshape(2, 5, -1) for x in (s, t))
    expected = losses.attention_relation(*flat, num_relation_heads=4, where=mask)
    np.testing.assert_allclose(terms["h"].values, expected)
    maps = AttentionKD({"h": "h"}, losses.attention_map_kl)
    terms = maps(
        features(2, 3, 5, 5), features(2, 3, 5, 5, seed=1), {"loss_mask": mask}
    )
    assert terms["h"].mean().count == 8


# --- projections ----------------------------------------------------------------------


def test_a_projection_maps_each_example_by_itself():
    """Changing example 1 does not move example 0; another batch size works."""
    objective = FeatureKD({"h": "h"}, projection=Projection(6, 9))
    params = objective.init_params(jax.random.key(0))
    student, teacher = features(3, 2, 6), features(3, 2, 9, seed=1)
    changed = Outputs(features={"h": student.features["h"].at[1].add(7.0)})

    def values(student, size=3):
        part = [
            Outputs(features={"h": x.features["h"][:size]}) for x in (student, teacher)
        ]
        return objective(*part, {}, params=params)["h"].values

    before, after = values(student), values(changed)
    np.testing.assert_array_equal(before[jnp.array([0, 2])], after[jnp.array([0, 2])])
    assert (before[1] != after[1]).all()
    np.testing.assert_allclose(values(student, 2), before[:2], rtol=1e-6)


def trained(objective=BOTH, steps=3, tx=None, **kwargs):
    """A student of width 4 and a teacher of width 7 in the pure layer."""
    student = Net(4, nnx.Rngs(0))
    tx = optax.adam(0.05) if tx is None else tx
    step = make_distill_step(
        objective, Net(7, nnx.Rngs(1)), student=student, tx=tx, **kwargs
    )
    state, first = step.init(student, rng=jax.random.key(5)), None
    start = jax.tree.map(np.array, state.params)
    for _ in range(steps):
        state, metrics = step.pure(state, step.teacher_state, BATCH)
        first = first or metrics
    return step, start, state, (first, metrics)


def test_projections_are_trained_and_are_not_the_student():
    step, start, state, (first, last) = trained(steps=60)
    own = state.params["objective"]["hint"]["hidden"]["projection"]
    before = start["objective"]["hint"]["hidden"]["projection"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).any()), own, before))
    assert last["hint/hidden"].value < 0.2 * first["hint/hidden"].value
    assert set(first) >= {"logits/kd", "hint/hidden", "kl", "loss"}
    # what is exported is a student as any other
    exported = Net(4, nnx.Rngs(9))
    nnx.update(exported, step.student_of(state.params), state.rest)
    assert jax.tree.structure(step.student_of(state.params)) == jax.tree.structure(
        nnx.to_pure_dict(nnx.state(exported))
    )
    assert step.pure._cache_size() == 1


def test_projections_have_a_group_of_their_own():
    tx = AdamW(0.05, groups=(Group("projection/", scale=0.0),))()
    _, start, state, _ = trained(tx=tx)
    np.testing.assert_array_equal(
        state.params["objective"]["hint"]["hidden"]["projection"]["kernel"],
        start["objective"]["hint"]["hidden"]["projection"]["kernel"],
    )
    moved = state.params["student"]["hidden"]["kernel"]
    assert (moved != start["student"]["hidden"]["kernel"]).all()


def test_accumulation_and_the_average_know_projections():
    _, _, one, _ = trained(tx=optax.sgd(0.1), ema_decay=0.5)
    _, _, two, _ = trained(tx=optax.sgd(0.1), ema_decay=0.5, accumulate=2)
    for a, b in ((one.params, two.params), (one.ema, two.ema)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), a, b)


@pytest.mark.parametrize("trainable", [nnx.Param, nnx.PathContains("out")])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_a_module_with_projections_is_updated_in_place(graph, trainable):
    """Adapters and projections together: neither is forgotten by the filter."""
    whole = trainable is nnx.Param
    with nnx.set_graph_mode(graph):
        student = Net(4, nnx.Rngs(0))
        both = Projected(student, BOTH, rngs=nnx.Rngs(2))
        before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(both)))
        step = make_distill_step(
            BOTH, Net(7, nnx.Rngs(1)), trainable=trainable, ema_decay=0.5
        )
        optimizer = nnx.Optimizer(both, optax.adam(0.05), wrt=step.wrt)
        for _ in range(2):
            step(both, optimizer, BATCH)
    after = nnx.to_pure_dict(nnx.state(both))
    assert both.student is student
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, before)
    assert moved["student"]["hidden"]["kernel"] == whole
    assert moved["student"]["out"]["kernel"]
    assert all(jax.tree.leaves(moved["objective"]))
    assert step._in_place.compiled._cache_size() == 1


def test_a_bare_module_is_refused_where_parameters_are_needed():
    student = Net(4, nnx.Rngs(0))
    optimizer = nnx.Optimizer(student, optax.adam(0.05), wrt=nnx.Param)
    step = make_distill_step(BOTH, Net(7, nnx.Rngs(1)))
    with pytest.raises(ValueError, match=r"got a bare module.*Projected\(student"):
        step(student, optimizer, BATCH)
    both = Projected(student, BOTH, rngs=nnx.Rngs(2))
    optimizer = nnx.Optimizer(both, optax.adam(0.05), wrt=nnx.Param)
    with pytest.raises(ValueError, match="objective that has none"):
        make_distill_step(LogitKD(), Net(7, nnx.Rngs(1)))(both, optimizer, BATCH)


def test_learned_variances_are_trained():
    objective = FeatureKD(
        {"hidden": "hidden"},
        loss=losses.variational_information,
        projection=Projection(4, 7),
        variance=5.0,
    )
    _, start, state, _ = trained(objective)
    before = start["objective"]["hidden"]["raw_scale"]
    np.testing.assert_allclose(jnp.log1p(jnp.exp(before)), 5.0, rtol=1e-5)
    assert (state.params["objective"]["hidden"]["raw_scale"] != before).all()


def test_the_queue_holds_the_teachers_of_all_microbatches():
    objective = ContrastiveKD("hidden", "hidden", 4, 7, width=3, queue_size=20)
    _, _, one, _ = trained(objective, steps=2)
    _, _, two, _ = trained(objective, steps=2, accumulate=2)
    for state in (one, two):
        assert int(state.objective_state["queue"].count) == 14  # the masked one is not
    rows = [np.sort(s.objective_state["queue"].features, axis=0) for s in (one, two)]
    np.testing.assert_allclose(*rows, atol=1e-6)
    head = objective.init_state()["teacher"]["kernel"]
    np.testing.assert_array_equal(one.objective_state["teacher"]["kernel"], head)
