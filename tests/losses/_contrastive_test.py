"""Contrastive distillation: who is a rival, and the queue that carries them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from distilljax import losses
from distilljax.losses import MemoryQueue
from tests.losses import feature_oracles as oracles
from tests.losses.oracles import central_differences

RNG = np.random.default_rng(0)
STUDENT = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
TEACHER = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
PAST = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)


@jax.jit
def loss(student, teacher, queue=None, where=None):
    def total(student):
        values = losses.contrastive(
            student, teacher, temperature=0.5, queue=queue, where=where
        )
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values, gradient


@jax.jit
def update(queue, rows, where=None):
    return queue.update(rows, where=where)


def test_the_slots_of_the_queue_are_rivals_once_they_are_filled():
    """An empty slot is a zero vector, whose cosine 0 would be a rival of its own."""
    queue = update(MemoryQueue.init(size=5, width=3), PAST)
    values, gradient = loss(STUDENT, TEACHER, queue)
    args = {"temperature": 0.5, "queue": queue}
    student, teacher = np.float64(STUDENT), np.float64(TEACHER)
    expected = oracles.contrastive(student, teacher, **args)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    slope = central_differences(
        lambda z: oracles.contrastive(z, teacher, **args), student
    )
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
    alone, _ = loss(STUDENT, TEACHER)
    assert np.all(values > alone)
    empty, _ = loss(STUDENT, TEACHER, MemoryQueue.init(size=5, width=3))
    np.testing.assert_allclose(empty, alone, rtol=1e-6)


def test_the_queue_gets_no_gradient():
    def total(features):
        queue = MemoryQueue(features, jnp.int32(3), jnp.int32(0))
        return losses.contrastive(STUDENT, TEACHER, queue=queue).sum()

    assert not jax.jit(jax.grad(total))(PAST).any()


def test_the_queue_forgets_the_oldest_first():
    """As a list of the last five that counts, whatever the masks leave of a batch."""
    queue, told = MemoryQueue.init(size=5, width=3), []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows, where = rng.normal(size=(4, 3)), rng.random(4) < 0.6
        told = [*told, *rows[where]][-5:]
        rows = np.where(where[:, None], rows, np.nan)
        queue = update(queue, jnp.asarray(rows, jnp.float32), jnp.asarray(where))
        count, start = int(queue.count), int(queue.pointer) if len(told) == 5 else 0
        assert count == len(told)
        ordered = np.roll(queue.features, -start, axis=0)[:count]
        expected = [row / np.linalg.norm(row) for row in told]
        np.testing.assert_allclose(ordered, expected, rtol=1e-5)
    assert update._cache_size() <= 2  # no shape ever changes: with and without a mask


def test_the_queue_is_the_same_on_every_shard():
    """Stored in the order of the batch, as on one device, masks and all."""
    rows = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
    where = jnp.asarray(RNG.random(8) < 0.6)
    queue = update(MemoryQueue.init(size=9, width=3), PAST)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def both(queue, student, teacher, where):
        values = losses.contrastive(
            student, teacher, queue=queue, where=where, axis_name="data"
        )
        later = queue.update(teacher, where=where, axis_name="data")
        return values, jax.tree.map(lambda leaf: leaf[None], later)

    sharded = jax.shard_map(
        both, mesh=mesh, in_specs=(whole, split, split, split), out_specs=split
    )
    values, queues = jax.jit(sharded)(queue, rows + 1, rows, where)
    alone = losses.contrastive(rows + 1, rows, queue=queue, where=where)
    np.testing.assert_allclose(values, alone, rtol=1e-5, atol=1e-6)
    expected = update(queue, rows, where)
    for shard in range(8):
        jax.tree.map(
            lambda leaf, wanted, shard=shard: np.testing.assert_allclose(
                leaf[shard], wanted, rtol=1e-6
            ),
            queues,
            expected,
        )


def test_tokens_that_do_not_count_are_nobodys_rivals():
    student, teacher = (jnp.stack([x, x[::-1] + 1]) for x in (STUDENT, TEACHER))
    where = jnp.asarray([[True, True, False, True], [True, False, False, False]])
    values, gradient = loss(student, teacher.at[0, 2].set(jnp.nan), None, where)
    kept = np.asarray(where)
    alone, slope = loss(student[kept], teacher[kept])
    np.testing.assert_allclose(values[kept], alone, rtol=1e-6)
    np.testing.assert_allclose(gradient[kept], slope, rtol=1e-5, atol=1e-7)
    assert not values[~kept].any()
    assert not gradient[~kept].any()


def test_without_rivals_there_is_nothing_to_tell_apart():
    values, gradient = loss(STUDENT[:1], TEACHER[:1])
    np.testing.assert_array_equal(values, [0.0])
    np.testing.assert_array_equal(gradient, np.zeros((1, 3)))


def test_zeros_give_finite_gradients_and_small_losses_keep_their_digits():
    values, gradient = loss(0 * STUDENT, TEACHER)
    np.testing.assert_allclose(values, np.full(4, np.log(4)), rtol=1e-6)
    assert not gradient.any()
    far = jnp.array([[1.0, 0.0], [-1.0, 0.0]])  # log(1 + exp(-2 / .07)), not 0
    values = losses.contrastive(far, far)
    np.testing.assert_allclose(values, np.exp(-2 / 0.07), rtol=1e-4)


def test_queues_that_do_not_fit_are_refused():
    queue = MemoryQueue.init(size=3, width=3)
    with pytest.raises(ValueError, match=r"have at most 3 rows .* got 4 rows"):
        queue.update(TEACHER)
    with pytest.raises(ValueError, match="of the queue's width, 3, got 2 rows of wid"):
        queue.update(TEACHER[:2, :2])
    with pytest.raises(ValueError, match="queue must hold features of the width of st"):
        losses.contrastive(STUDENT[:, :2], TEACHER[:, :2], queue=queue)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        MemoryQueue.init(size=0, width=3)
