"""What all losses over a cloud of points share: degenerate clouds, and invariances."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from distilljax.losses import _points as points
from tests.losses.contract import UNOPTIMIZED

RELATIONS = {
    "rkd_distance": losses.rkd_distance,
    "rkd_angle": losses.rkd_angle,
    "similarity_preserving": losses.similarity_preserving,
    "probabilistic_transfer": losses.probabilistic_transfer,
    "correlation_congruence": losses.correlation_congruence,
    "embedding_relation": losses.embedding_relation,
    "nearest": lambda student, teacher, where: losses.embedding_relation(
        student, teacher, temperature=0.1, where=where
    ),
}
RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(6, 3)).astype(np.float32)
TEACHER = RNG.normal(size=(6, 2)).astype(np.float32)
ALL = np.ones(6, bool)


@functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
def measure(student, teacher, where):
    """Value and gradient of every loss, in one compilation."""
    return {
        name: jax.value_and_grad(loss)(student, teacher, where=where)
        for name, loss in RELATIONS.items()
    }


@pytest.mark.parametrize("count", [0, 1])
def test_less_than_a_pair_says_nothing(count):
    """A mean over no pairs is 0 / 0, and the one point is similar to itself alone."""
    where = np.arange(6) < count
    for name, (value, gradient) in measure(STUDENT, TEACHER, where).items():
        np.testing.assert_allclose(value, 0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(gradient, 0, atol=1e-12, err_msg=name)


DEGENERATE = {
    "two points coincide": STUDENT[[0, 0, 2, 3, 4, 5]],
    "all points coincide": STUDENT[[0] * 6],
    "a point at the origin": STUDENT * (np.arange(6) != 2)[:, None],
    "all points at the origin": STUDENT * 0,
    "opposite points": np.concatenate([STUDENT[:3], -STUDENT[:3]]),
    "nearly coincident points": STUDENT[:1] + STUDENT * 1e-7,
}


@pytest.mark.parametrize("form", DEGENERATE)
def test_degenerate_clouds_have_finite_gradients(form):
    """The root at 0, the direction of nothing, the log of no similarity."""
    for name, (value, gradient) in measure(DEGENERATE[form], TEACHER, ALL).items():
        assert np.isfinite(value), name
        assert np.all(np.isfinite(gradient)), name


def test_plain_norms_would_fail_the_test_above():
    """Else that test would protect nothing."""
    apart = DEGENERATE["two points coincide"]

    def plain(x):
        return jnp.sum(jnp.linalg.norm(x[:, None] - x[None], axis=-1))

    assert np.isnan(jax.grad(plain)(jnp.asarray(apart))).any()


def rotation():
    return np.linalg.qr(RNG.normal(size=(3, 3)))[0].astype(np.float32)


# What the student may do to its whole cloud without any of these losses changing.
INVARIANT = {
    "turned": (lambda x: x @ rotation(), set(RELATIONS)),
    "scaled": (lambda x: 100 * x, set(RELATIONS)),
    "shifted": (lambda x: x + 1, {"rkd_distance", "rkd_angle"}),
    "scaled point by point": (
        lambda x: x * np.arange(1, 7, dtype=np.float32)[:, None],
        set(RELATIONS) - {"rkd_distance", "rkd_angle", "similarity_preserving"},
    ),
}


@pytest.mark.parametrize("move", INVARIANT)
def test_clouds_may_be(move):
    change, blind = INVARIANT[move]
    before = measure(STUDENT, TEACHER, ALL)
    after = measure(change(STUDENT), TEACHER, ALL)
    for name, (value, _) in after.items():
        if name in blind:
            np.testing.assert_allclose(value, before[name][0], rtol=1e-4, err_msg=name)
        else:
            assert abs(value / before[name][0] - 1) > 1e-2, name


def test_the_order_of_the_batch_does_not_matter():
    """It does for a released "correlation congruence", of each row with the next."""
    order = np.array([3, 1, 5, 0, 4, 2])
    before = measure(STUDENT, TEACHER, ALL)
    after = measure(STUDENT[order], TEACHER[order], ALL)
    for name, (value, gradient) in after.items():
        np.testing.assert_allclose(value, before[name][0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            gradient, before[name][1][order], rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_a_few_anchors_at_a_time_are_all_anchors(monkeypatch):
    """In pieces of four and a rest, value and gradient are those of one piece."""

    def both():
        def total(x):
            def row(at):
                return jnp.sum(jnp.sin(x - at[None]) ** 2)

            values = points.over_anchors(row, x, x.size)
            return jnp.sum(values * jnp.arange(6.0)), values

        gradient = jax.jit(jax.grad(total, has_aux=True), compiler_options=UNOPTIMIZED)
        return gradient(STUDENT)

    slope, whole = both()
    monkeypatch.setattr(points, "_NUMBERS_AT_ONCE", 4 * STUDENT.size)
    gradient, pieces = both()
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "rule"),
    [
        ((6,), (6,), r"have the axes \[batch, ..., width\]"),
        ((2, 3, 4, 5), (2, 3, 4, 5), r"the shape \[batch, width\] or \[batch, time"),
        ((0, 5), (0, 5), "no axis empty"),
        ((2, 3, 5), (6, 5), "have the shape of student"),
        ((2, 3, 5), (2, 4, 5), "have the shape of student"),
    ],
)
def test_features_of_no_cloud_are_refused(student, teacher, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        losses.rkd_distance(jnp.ones(student), jnp.ones(teacher))
    assert str(caught.value).startswith("rkd_distance: ")
