"""Attention: a worked row, padding of queries and keys, and the memory of relations."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from distilljax import losses
from distilljax.losses import _attention
from tests.losses import oracles

RNG = np.random.default_rng(0)
TOY = jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])  # inner products 1, 0, 1


def test_the_row_of_the_first_token():
    """R = [.401112 .197776 .401112]; a scale of 1 / width of all heads gives others.

    Against a student that looks everywhere, KL = log 3 + sum of R log R.
    """
    row = np.array([0.401112, 0.197776, 0.401112])
    values = losses.attention_relation(0 * TOY, TOY, num_relation_heads=1)
    expected = np.log(3) + (row * np.log(row)).sum()
    np.testing.assert_allclose(values[0, 0], expected, rtol=1e-5)
    # Twice the width, but the same two parts: the mean over heads, not the sum.
    twice = jnp.concatenate([TOY, TOY], axis=-1)
    both = losses.attention_relation(0 * TOY, twice, num_relation_heads=2)
    np.testing.assert_allclose(both, values, rtol=1e-6)


def test_padding_is_in_no_softmax():
    """Only the block of true tokens is related, whatever the padding holds."""
    student = jnp.asarray(RNG.normal(size=TOY.shape), jnp.float32)
    loss = functools.partial(losses.attention_relation, num_relation_heads=2)
    padded = [jnp.pad(x, ((0, 0), (0, 2), (0, 0))) for x in (student, TOY)]
    where = jnp.array([[True, True, True, False, False]])
    values = loss(padded[0].at[:, 4].set(jnp.inf), padded[1], where=where)
    np.testing.assert_allclose(values[:, :3], loss(student, TOY), rtol=1e-6)
    np.testing.assert_array_equal(values[:, 3:], np.zeros((1, 2)))


def test_heads_one_by_one_or_together_are_one_loss(monkeypatch):
    """Also where the number at once does not divide the heads, and inside shards.

    A loop that carries a sum started from a constant fails under `jax.shard_map`.
    """
    student, teacher = (
        jnp.asarray(RNG.normal(size=(8, 4, width)), jnp.float32) for width in (6, 12)
    )
    loss = functools.partial(losses.attention_relation, num_relation_heads=3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=split, out_specs=split)

    def results(loss):
        def total(student):
            values = loss(student, teacher)
            return jnp.sum(values**2), values

        return jax.jit(jax.grad(total, has_aux=True))(student)

    together = results(loss)
    monkeypatch.setattr(_attention, "_ENTRIES_AT_ONCE", 2 * 8 * 4 * 4)
    by_two = results(loss)
    monkeypatch.setattr(_attention, "_ENTRIES_AT_ONCE", 1)
    for other in (by_two, results(loss), results(sharded)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            other,
            together,
        )


def test_the_backward_pass_does_not_hold_all_heads():
    """Temporary memory in units of the relations of all 16 heads, read from XLA."""
    x = jax.ShapeDtypeStruct((1, 1024, 64), jnp.float32)

    def total(student, teacher):
        return losses.attention_relation(student, teacher, num_relation_heads=16).sum()

    def unrolled(student, teacher):
        x, y = (z.reshape(1, 1024, 16, 4) for z in (student, teacher))
        x, y = (jnp.einsum("bqhd,bkhd->bhqk", z, z) / 2 for z in (x, y))
        return losses.forward_kl(x, y).mean(axis=1).sum()

    def share(loss):
        compiled = jax.jit(jax.grad(loss)).lower(x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (16 * 1024**2 * 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attention, "_ENTRIES_AT_ONCE", 1024**2)
        assert share(total) < 0.6
    assert share(unrolled) > 1.5


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"width of student, 2, got 3\. Use 2, or"):
        losses.attention_relation(TOY, TOY, num_relation_heads=3)
    wider = jnp.concatenate([TOY] * 3, axis=-1)
    with pytest.raises(ValueError, match=r"width of teacher, 2, got 6\. Use 2, or"):
        losses.attention_relation(wider, TOY, num_relation_heads=6)
    with pytest.raises(ValueError, match="got 0"):
        losses.attention_relation(TOY, TOY, num_relation_heads=0)


SCORES = jnp.asarray(RNG.normal(size=(2, 3, 4, 4)), jnp.float32)
OTHERS = jnp.asarray(RNG.normal(size=(2, 3, 4, 4)), jnp.float32)


def test_attention_maps_are_distributions_over_keys():
    """Each row is a softmax: a constant for each query, or weights for scores."""
    value = losses.attention_map_kl(SCORES, OTHERS)
    shift = jnp.asarray(RNG.normal(size=(2, 3, 4, 1)), jnp.float32)
    shifted = losses.attention_map_kl(SCORES + shift, jax.nn.log_softmax(OTHERS))
    np.testing.assert_allclose(shifted, value, rtol=1e-5, atol=1e-7)
    other_axis = losses.attention_map_kl(SCORES + shift.swapaxes(2, 3), OTHERS)
    assert np.abs(other_axis - value).max() > 0.1


def test_a_causal_mask_and_padding_together():
    """Future keys at -inf on both sides, padded keys by the mask, no nan in between."""
    causal = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), 0.0, -jnp.inf)[None, None]
    where = jnp.array([[False, True, True, True], [True, True, False, False]])

    @jax.jit
    @jax.value_and_grad
    def loss(student):
        values = losses.attention_map_kl(student, OTHERS + causal, where=where)
        return values.sum()

    value, gradient = loss(SCORES + causal)
    by_hand = sum(
        oracles.forward_kl(SCORES[b, h, q, keys], OTHERS[b, h, q, keys]) / 3
        for b, q, keys in (
            (0, 2, np.s_[1:3]), (0, 3, np.s_[1:4]), (1, 1, np.s_[:2])
        )
        for h in range(3)
    )  # fmt: skip
    np.testing.assert_allclose(value, by_hand, rtol=1e-5)
    counted = where[:, None, :, None] & where[:, None, None, :] & (causal == 0)
    assert np.all(np.isfinite(gradient))
    assert not np.asarray(gradient)[~np.broadcast_to(counted, gradient.shape)].any()


def test_other_shapes_of_maps_are_refused():
    loss = inspect.unwrap(losses.attention_map_kl)
    with pytest.raises(ValueError, match="as many queries as keys, got 2 and 4"):
        loss(SCORES[:, :, :2], OTHERS[:, :, :2])
    with pytest.raises(ValueError, match="leading axes differ"):
        loss(SCORES, OTHERS[:, :1])
    with pytest.raises(ValueError, match=r"where must .* \(2, 4\), got \(2, 3, 4\)"):
        loss(SCORES, OTHERS, where=jnp.ones((2, 3, 4), bool))
