"""Feature maps: golden values, what each loss is blind to, dead maps, other sizes."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses import feature_oracles as oracles

RNG = np.random.default_rng(0)
STUDENT = jnp.asarray(RNG.normal(size=(2, 3, 4, 2)), jnp.float32)
TEACHER = jnp.asarray(RNG.normal(size=(2, 3, 4, 3)), jnp.float32)


def test_attention_transfer_is_a_sum_over_positions():
    """1/3; the mean over the four positions, which libraries take, is 1/12."""
    # Squares summed over channels: maps 1, 1, 2, 0 and 1, 2, 1, 0 with cosine 5/6.
    student = jnp.sqrt(jnp.array([[[0.5, 0.5], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]]))
    teacher = jnp.sqrt(jnp.array([[[1.0], [2.0]], [[1.0], [0.0]]]))
    value = losses.attention_transfer(student[None], teacher[None])
    np.testing.assert_allclose(value, [0.333333], rtol=2e-6)
    np.testing.assert_allclose(value / 4, [0.083333], rtol=5e-6)


def test_attention_transfer_takes_other_powers():
    loss = jax.jit(losses.attention_transfer)
    for power in (1.0, 3.0):  # traced: one compilation
        expected = oracles.attention_transfer(STUDENT, TEACHER, power)
        np.testing.assert_allclose(
            loss(STUDENT, TEACHER, power=power), expected, rtol=1e-5
        )
    with pytest.raises(ValueError, match=r"power must lie in \[1, inf\], got 0.5"):
        losses.attention_transfer(STUDENT, TEACHER, power=0.5)


def test_neuron_selectivity_is_the_same_in_both_of_its_forms():
    """12 positions and few channels: pairs of channels. Repeated channels: moments."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def both(student, ways):
        values, pull = jax.vjp(forms, student)
        return values, pull(ways)[0]

    def forms(student):
        pairs = losses.neuron_selectivity(student, TEACHER)
        # Four copies of every channel change no mean, and make 12 of 3.
        many = jnp.concatenate([TEACHER] * 4, axis=-1)
        moments = losses.neuron_selectivity(student, many)
        return jnp.stack([pairs, moments])

    ways = jnp.asarray(np.eye(2)[:, :, None] * [1.0, 2.0], jnp.float32)
    (values, _), slopes = both(STUDENT, ways)
    expected = oracles.neuron_selectivity(STUDENT, TEACHER)
    np.testing.assert_allclose(values, [expected, expected], rtol=1e-5)
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-4, atol=1e-6)


def test_maps_of_zeros_give_finite_gradients():
    """After a ReLU whole channels are dead, and early in training whole maps."""

    @jax.jit
    def slopes(student, teacher):
        losses_of = (losses.attention_transfer, losses.neuron_selectivity)
        return [
            jax.value_and_grad(lambda z, loss=loss: loss(z, teacher).sum())(student)
            for loss in losses_of
        ]

    for student in (STUDENT.at[..., 0].set(0), STUDENT.at[0].set(0), 0 * STUDENT):
        for value, gradient in slopes(student, TEACHER):
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))
    for value, gradient in slopes(0 * STUDENT, TEACHER):
        assert value > 0
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_flow_of_solution_takes_a_teacher_of_another_resolution():
    """G is a mean over positions: an enlarged image has the same one."""
    early, late = STUDENT, TEACHER
    larger = tuple(jnp.repeat(x, 2, axis=1) for x in (early, late))
    value = losses.flow_of_solution((early, late), larger)
    np.testing.assert_allclose(value, np.zeros(2), atol=1e-12)


def test_flow_of_solution_says_what_does_not_fit():
    unchecked = inspect.unwrap(losses.flow_of_solution)
    pair = (STUDENT, TEACHER)
    for bad in (STUDENT, (STUDENT,), (STUDENT, TEACHER, TEACHER)):
        with pytest.raises(TypeError, match="student must be a pair of feature maps"):
            unchecked(bad, pair)
    with pytest.raises(ValueError, match=r"student\[1\] must .*avg_pool"):
        unchecked((STUDENT, TEACHER[:, :2]), pair)
    with pytest.raises(ValueError, match=r"teacher\[0\] must .*\(channels\) differ"):
        unchecked(pair, (TEACHER, TEACHER))


def test_activation_boundary_sees_the_teachers_sign_only():
    loss = jax.jit(losses.activation_boundary)
    value = loss(TEACHER, 2 * TEACHER, margin=0.5)
    np.testing.assert_array_equal(value, loss(TEACHER, 1e-3 * TEACHER, margin=0.5))
    expected = oracles.activation_boundary(TEACHER, TEACHER, 0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # On the right side by the margin, nothing is left to learn.
    assert not loss(jnp.sign(TEACHER), TEACHER).any()
    dead = jnp.zeros((1, 4))  # 0 is "does not fire", in the teacher
    np.testing.assert_array_equal(losses.activation_boundary(dead - 1, dead), [0.0])
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="margin must be positive and finite"):
            losses.activation_boundary(TEACHER, TEACHER, margin=bad)


MAPS = [
    losses.attention_transfer,
    losses.neuron_selectivity,
    losses.activation_boundary,
    lambda s, t, where=None: losses.flow_of_solution((s, -s), (t, t), where=where),
]


@pytest.mark.parametrize("loss", MAPS)
def test_the_mask_is_over_images_where_all_axes_are_equal(loss):
    """A mask that broadcast from the right would take out the second channel."""
    student, teacher = STUDENT[:, :2, :2], TEACHER[:, :2, :2, :2]
    whole = loss(student, teacher)
    values = loss(student, teacher, where=jnp.array([True, False]))
    np.testing.assert_allclose(values, whole * jnp.array([1.0, 0.0]), rtol=1e-6)
    assert whole[1] != 0


@pytest.mark.parametrize("loss", MAPS[:3])
def test_maps_of_other_sizes_are_not_pooled_in_silence(loss):
    with pytest.raises(ValueError, match=loss.__name__):
        loss(STUDENT, STUDENT[:, ::2])
    with pytest.raises(ValueError, match=r"flax\.nnx\.avg_pool"):
        losses.attention_transfer(STUDENT, TEACHER[:, :, ::2])
