"""Optimizers: the parts of optax that a config names, checked against optax itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distilljax.optimizers import SGD, AdamW, Group, Linear, WarmupCosine

PARAMS = {
    "head": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)},
    "projections": {"kernel": jnp.full((3, 3), 2.0)},
}
GRADS = jax.tree.map(lambda x: 0.5 * x, PARAMS)


def updates(tx, grads=GRADS, steps=1):
    state, found = tx.init(PARAMS), None
    for _ in range(steps):
        found, state = tx.update(grads, state, PARAMS)
    return found


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_adamw_is_that_of_optax():
    ours = AdamW(learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-6)()
    assert_same(
        updates(ours, steps=3),
        updates(optax.adamw(0.1, 0.8, 0.9, 1e-6, weight_decay=0), steps=3),
    )


def test_weight_decay_spares_vectors():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for tx in (AdamW(0.1, weight_decay=0.5)(), SGD(0.1, 0.0, weight_decay=0.5)()):
        found = updates(tx, zeros)
        assert not found["head"]["bias"].any()
        np.testing.assert_allclose(found["head"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    norm = float(optax.tree.norm(GRADS))
    clipped = updates(SGD(1.0, momentum=0.0, clip_norm=norm / 4)())
    plain = updates(SGD(1.0, momentum=0.0)())
    assert_same(clipped, jax.tree.map(lambda x: x / 4, plain))


def test_groups_have_learning_rates_of_their_own():
    groups = (Group("projections/", 10.0), Group("bias$", 0.0))
    plain, grouped = updates(AdamW(0.1)()), updates(AdamW(0.1, groups=groups)())
    assert_same(grouped["head"]["kernel"], plain["head"]["kernel"])
    assert_same(
        grouped["projections"], jax.tree.map(lambda x: 10 * x, plain["projections"])
    )
    assert not grouped["head"]["bias"].any()


def test_a_group_that_matches_nothing_is_a_mistake():
    with pytest.raises(
        ValueError, match=r"groups must match some parameter.*'adapter'"
    ):
        AdamW(groups=(Group("adapter", 2.0),))().init(PARAMS)


def test_moments_may_be_bfloat16():
    def types(tx):
        adam = next(s for s in tx.init(PARAMS) if hasattr(s, "mu"))
        return adam.mu["head"]["kernel"].dtype, adam.nu["head"]["kernel"].dtype

    assert types(AdamW(moment_dtype="bfloat16")()) == (jnp.bfloat16, jnp.float32)
    assert types(AdamW()()) == (jnp.float32, jnp.float32)


def test_momentum():
    found = updates(SGD(1.0, momentum=0.5)(), steps=2)
    np.testing.assert_allclose(found["head"]["bias"], -1.5, rtol=1e-6)
    nesterov = updates(SGD(1.0, momentum=0.5, nesterov=True)(), steps=2)
    np.testing.assert_allclose(nesterov["head"]["bias"], -1.75, rtol=1e-6)


def test_schedules_as_learning_rates():
    tx = SGD(learning_rate=Linear(1.0, 0.0, num_steps=2), momentum=0.0)()
    np.testing.assert_allclose(updates(tx, steps=2)["head"]["bias"], -0.5)
    assert not updates(tx, steps=3)["head"]["bias"].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupCosine(0.0, 10), "peak must be positive and finite, got 0.0"),
        (lambda: WarmupCosine(-1.0, 10), "peak must be positive and finite, got -1.0"),
        (lambda: WarmupCosine(1.0, 10, end=2.0), r"end must lie in \[0, 1\], got 2.0"),
        (lambda: WarmupCosine(1.0, 0), "num_steps must be at least 1, got 0"),
        (lambda: WarmupCosine(1.0, 10, -1), "warmup_steps must be at least 0, got -1"),
        (
            lambda: WarmupCosine(1.0, 10, 10),
            "warmup_steps must be less than .*, got 10",
        ),
        (lambda: Linear(0.0, float("inf"), 10), "end must be finite, got inf"),
        (lambda: Linear(0.0, 1.0, 0), "num_steps must be at least 1, got 0"),
    ],
)
def test_schedules_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (AdamW, {"learning_rate": -1.0}),
        (AdamW, {"learning_rate": float("nan")}),
        (AdamW, {"b1": 2.0}),
        (AdamW, {"b2": 1.0}),
        (AdamW, {"eps": -1e-8}),
        (SGD, {"momentum": 1.0}),
        (SGD, {"weight_decay": -1.0}),
        (SGD, {"learning_rate": float("inf")}),
        (SGD, {"clip_norm": 0.0}),
        (Group, {"pattern": "bias", "scale": -1.0}),
    ],
)
def test_optimizers_without_meaning_are_refused(kind, change):
    name, value = list(change.items())[-1]
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: {name} must .*, got {value}"
    ):
        kind(**change)


@pytest.mark.parametrize("warmup", [0, 10])
def test_warmup_cosine_ends_where_it_says(warmup):
    schedule = WarmupCosine(peak=2.0, num_steps=110, warmup_steps=warmup, end=0.5)
    values = [float(schedule(step)) for step in range(120)]
    assert values[warmup] == max(values) == 2.0
    np.testing.assert_allclose(values[110:], 0.5, rtol=1e-6)
    middle = values[(110 + warmup) // 2]
    np.testing.assert_allclose(middle, (2.0 + 0.5) / 2, rtol=1e-6)
    if warmup:
        np.testing.assert_allclose(
            values[:10], np.arange(10) * 0.2, rtol=1e-5, atol=1e-7
        )
