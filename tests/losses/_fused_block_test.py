"""What a block of logits gives: likeliest classes, KL and entropy of hard cases.

What is protected: the first of equal classes, wherever its group of 256 begins; rows of
nan; classes that only one of the two rules out; a KL near zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from distilljax.losses import LinearHead, fused_divergence
from distilljax.losses._fused_block import Softmax
from distilljax.planning import open_topology
from tests.losses.contract import UNOPTIMIZED


@pytest.mark.parametrize("classes", [1024, 96, 37])
def test_the_likeliest_class_is_the_first_of_equals(classes):
    """With groups of 256, of 32, and without any."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (64, classes)).astype(np.float32)
    logits[3, :5] = -np.inf
    logits[4, classes - 1] = 9
    logits[5], logits[6, 1] = 0.0, np.nan
    found = np.asarray(Softmax(jnp.asarray(logits)).top())
    expected = np.argmax(logits, axis=-1)
    expected[6] = -1
    np.testing.assert_array_equal(found, expected)


def test_kl_is_that_of_the_loss():
    """Near zero too; +inf where only the second is zero, and 0 log 0 = 0."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=(4, 64)).astype(np.float32)
    z = v + np.float32(1e-3) * rng.normal(size=v.shape).astype(np.float32)
    v[1, 5] = z[1, 5] = v[2, 6] = z[3, 7] = -np.inf
    found = Softmax(jnp.asarray(v)).kl_to(Softmax(jnp.asarray(z)))
    with np.errstate(all="ignore"):
        p, q = (np.exp(np.float64(x)) for x in (v, z))
        p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
        exact = np.where(p > 0, p * np.log(p / q), 0).sum(-1)
    assert np.isinf(found[3])
    np.testing.assert_allclose(found[:3], exact[:3], rtol=1e-4)


def test_entropy_counts_impossible_classes_as_zero():
    logits = jnp.log(jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    found = Softmax(logits).entropy()
    np.testing.assert_allclose(found, [np.log(2), 0], atol=1e-6)


def tied_step(tied, rows=512, classes=4096, width=32):
    """Value and gradient over a student's and a teacher's embedding."""

    def loss(hidden, embedding, teacher_embedding):
        total, _ = fused_divergence(
            LinearHead(hidden, embedding.T, tied=tied),
            LinearHead(hidden, teacher_embedding.T, tied=tied),
        )
        return total.value

    rng = np.random.default_rng(0)
    shapes = [(rows, width), (classes, width), (classes, width)]
    args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step, args


def test_a_tied_kernel_is_read_where_it_lies():
    """Equal results, and no copy of either kernel."""
    found, sizes = [], []
    for tied in (True, False):
        step, args = tied_step(tied)
        compiled = step.lower(*args).compile()
        found.append(compiled(*args))
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert sizes[1] - sizes[0] >= 4096 * 32 * 4


def test_the_gradient_of_a_tied_kernel_is_summed_as_the_kernel_lies():
    """On a TPU in bfloat16 a sum that lies the other way is copied twice at the end.

    Three times the kernel in float32 it then takes; here at most twice, and a block.
    """
    place = jax.sharding.SingleDeviceSharding(open_topology("v5p:2x2x1").devices[0])
    classes, width, chunk = 32000, 1024, 256
    step, _ = tied_step(True)
    shapes = [(rows, width) for rows in (8 * chunk, classes, classes)]
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in shapes]
    held = step.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert held <= 4 * classes * (2 * width + chunk)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_is_no_other_loss(tied):
    step, (hidden, own, other) = tied_step(tied, rows=300, classes=256)
    value, _ = jax.jit(step, compiler_options=UNOPTIMIZED)(hidden, own, other)
    expected = losses.forward_kl(hidden @ own.T, hidden @ other.T)
    np.testing.assert_allclose(value, jnp.mean(expected), rtol=1e-5)
