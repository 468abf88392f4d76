"""Relational knowledge distillation: distances between points, and angles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from distilljax.losses import _numerics as numerics
from distilljax.losses import _points as points
from distilljax.losses import _shards as shards
from distilljax.losses._shards import AxisName


def rkd_distance(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """How much the distances between the points of a batch differ, relative ones.

    rkd_distance = mean over pairs (i, j) of huber(s_ij / mean s - t_ij / mean t)
    s_ij = |student_i - student_j|, t_ij = |teacher_i - teacher_j|
    huber(x) = x^2 / 2 up to 1, abs(x) - 1/2 beyond; means of non-zero distances

    Both clouds are measured in their own mean distance, and the gradient goes through
    that of the student: shifting, turning or scaling it changes nothing. For embeddings
    and penultimate features, of any two widths, without a projection.

    Args:
      student: Features [batch, width], or [batch, time, width], where every token is a
        point; any floating dtype; gets the gradient.
      teacher: Features of the same leading axes, of any width; gets none.
      where: Mask, [batch] or [batch, time]; a pair counts if both ends do, and a masked
        point gets gradient exactly 0, whatever stands there. None counts every point.
      axis_name: Axis of the mesh over which the batch is split, inside `jax.shard_map`:
        the points of all shards meet. None: those of this call.

    Returns:
      A scalar, float32 (float64 if an input is): the mean over all ordered pairs, a
      point with itself (which is 0) included, as in the authors' code, for which the
      usual weight of 25 was chosen. 0 for fewer than two points.

    Numerics: Distances are formed from differences, not from inner products, so that
    near points far from the origin keep their digits. Points that coincide have
    distance 0, stay out of the mean distance, and give no gradient to each other.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[0.0], [1.0], [3.0]])      # distances 1, 2, 3; mean 2
      >>> teacher = jnp.array([[0.0], [2.0], [4.0]])      # 2, 2, 4; mean 8/3
      >>> round(float(rkd_distance(student, teacher)), 6) # 2/9 (1/32 + 1/32), 3rd is 0
      0.013889

    Reference: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv
    1904.05068, equations 5 to 8.
    """
    cloud = points.points_of("rkd_distance", student, teacher, where, axis_name)
    others = cloud.others()
    gaps = _relative_distances(cloud.student, others)
    gaps -= _relative_distances(cloud.teacher, others)
    return cloud.mean_over_pairs(points.huber(gaps))


def _relative_distances(
    x: Float[Array, "n k"], pairs: Bool[Array, "n n"]
) -> Float[Array, "n n"]:
    """Distances between the points, in units of their mean."""
    distances = numerics.zero_masked(points.distances(x), pairs)
    count = jnp.maximum(jnp.sum(distances > 0, dtype=jnp.int32), 1)
    mean = jnp.sum(distances) / count.astype(x.dtype)
    return distances / jnp.where(mean > 0, mean, jnp.ones((), x.dtype))


def rkd_angle(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """How much the angles of all triangles in a batch differ, as cosines.

    rkd_angle = mean over triples (i, j, k) of huber(cos s_ijk - cos t_ijk)
    cos s_ijk = <u, w>, u and w the directions from student_j to student_i and student_k
    huber(x) = x^2 / 2 up to 1, abs(x) - 1/2 beyond

    Angles say more about the form of a cloud than distances, and do not change when
    it is shifted, turned or scaled. It takes time in proportion to batch^3 x width: for
    a thousand points or more, pass a part of them.

    Args:
      student: Features [batch, width], or [batch, time, width], where every token is a
        point; any floating dtype; gets the gradient.
      teacher: Features of the same leading axes, of any width; gets none.
      where: Mask, [batch] or [batch, time]; a triple counts if all three points do, and
        a masked point gets gradient exactly 0. None counts every point.
      axis_name: Axis of the mesh over which the batch is split, inside `jax.shard_map`:
        the points of all shards meet, and each shard computes the angles at its own.
        None: the points of this call.

    Returns:
      A scalar, float32 (float64 if an input is): the mean over all ordered triples,
      those that repeat a point (which are 0) included, as in the authors' code, for
      which the usual weight of 50 was chosen. 0 for fewer than three points.

    Numerics: Memory grows with batch^2 and not with batch^3: the angles are computed
    for a few corners at a time, and the gradient with them. They are formed from
    directions, and not from distances, so that those of near points keep their digits.
    At a corner that coincides with one of the other points the cosine is 0, without a
    gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[0.0], [1.0], [3.0]])      # 180 degrees at the second
      >>> teacher = jnp.array([[0.0], [3.0], [1.0]])      # and here at the third
      >>> round(float(rkd_angle(student, teacher)), 6)    # 2 corners x 2 x 1.5 / 27
      0.222222

    Reference: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv
    1904.05068, equations 9 to 11.
    """
    cloud = points.points_of("rkd_angle", student, teacher, where, axis_name)
    own = len(cloud.mask) // (1 if axis_name is None else jax.lax.axis_size(axis_name))
    corners = shards.first_row(own, axis_name) + jnp.arange(own, dtype=jnp.int32)
    total = _sum_at(cloud.student, cloud.teacher, cloud.others(), corners)
    # Gathered, and not added up by psum, to keep the convention of `_shards`.
    return jnp.sum(shards.gather(total[None], axis_name)) / cloud.num_valid() ** 3


@jax.custom_jvp
def _sum_at(
    student: Float[Array, "n k"],
    teacher: Float[Array, "n l"],
    others: Bool[Array, "n n"],
    corners: Int[Array, "m"],
) -> Float[Array, ""]:
    """Sum of the losses of all angles at these corners."""

    def at_corner(corner: Int[Array, ""]) -> Float[Array, ""]:
        gaps, _, _ = _gaps_at(student, teacher, others, corner)
        return jnp.sum(points.huber(gaps))

    return points.sum_over_anchors(at_corner, corners, _numbers(student, teacher))


@_sum_at.defjvp
def _sum_at_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """With its gradient, which is formed beside it while the cosines are there.

    Else the way back computes them all again, and twice as many products. The teacher
    is fixed, so its tangent is zero.
    """
    student, teacher, others, corners = primals

    def at_corner(corner: Int[Array, ""]) -> tuple[Array, Array]:
        gaps, directions, lengths = _gaps_at(student, teacher, others, corner)
        # each cosine is there twice, for (i, k) and for (k, i)
        slopes = 2 * jnp.clip(gaps, -1, 1)
        pull = jnp.matmul(slopes, directions, precision=jax.lax.Precision.HIGHEST)
        pull -= jnp.sum(pull * directions, axis=-1, keepdims=True) * directions
        pull = jnp.where(lengths > 0, pull / jnp.where(lengths > 0, lengths, 1), 0)
        is_corner = jnp.arange(len(pull), dtype=jnp.int32) == corner
        at_itself = -jnp.sum(pull, axis=0, keepdims=True)
        moved = jnp.where(is_corner[:, None], at_itself, pull)
        return jnp.sum(points.huber(gaps)), moved

    numbers = _numbers(student, teacher)
    value, gradient = points.sum_over_anchors(at_corner, corners, numbers)
    return value, jnp.sum(gradient * tangents[0])


def _gaps_at(
    student: Float[Array, "n k"],
    teacher: Float[Array, "n l"],
    others: Bool[Array, "n n"],
    corner: Int[Array, ""],
) -> tuple[Float[Array, "n n"], Float[Array, "n k"], Float[Array, "n 1"]]:
    """Differences of the cosines at a corner; 0 where two of the points are the same.

    And the directions in which the student's points are seen from there, and how far.
    """
    steps, theirs = (x - x[corner][None] for x in (student, teacher))
    directions = points.unit(steps)
    gaps = points.inner(directions) - points.inner(points.unit(theirs))
    seen = others[corner]
    gaps = numerics.zero_masked(gaps, others & seen[:, None] & seen[None, :])
    return gaps, directions, points.length(steps)[:, None]


def _numbers(student: Array, teacher: Array) -> int:
    """How many numbers the angles at one corner take."""
    count, width = len(student), student.shape[1] + teacher.shape[1]
    return count * max(count, width)
