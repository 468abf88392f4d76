"""Losses that compare the similarities between the points of a batch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_positive, check_temperature, fail
from distilljax.losses import _numerics as numerics
from distilljax.losses import _points as points
from distilljax.losses._shards import AxisName
from distilljax.typing import Scalar


def similarity_preserving(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """How much the examples that fire together differ between the two models.

    similarity_preserving = mean over pairs (i, j) of (S_ij - T_ij)^2
    S = the inner products of the student's examples, each row divided by its length;
    T = the same of the teacher

    The rows are normalised and not the examples: an example of large activations is
    similar to everything, in student and teacher alike. Scaling or turning the student
    changes nothing, shifting it does. Made for feature maps after a ReLU.

    Args:
      student: Features [batch, width]; or [batch, time, width], where every token is a
        point; or images [batch, height, width, channels], where every example is one,
        flattened. Any floating dtype; gets the gradient.
      teacher: Features of the same batch (and time), of any width, or image size and
        channels; gets none.
      where: Mask, [batch] or [batch, time]; a pair counts if both ends do, and a masked
        point gets gradient exactly 0, whatever stands there. None counts every point.
      axis_name: Axis of the mesh over which the batch is split, inside `jax.shard_map`:
        the points of all shards meet. None: those of this call.

    Returns:
      A scalar in [0, 4 / points], float32 (float64 if an input is): the mean over all
      ordered pairs, a point with itself included, for which the usual weight of 3000
      was chosen. 0 for fewer than two points.

    Numerics: Computed in float32 whatever the inputs, on matrix units too. A point at
    the origin is similar to nothing: its row is zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])   # S = [[1, 0], [0, 1]]
      >>> teacher = jnp.array([[2.0], [2.0]])             # T = all 1 / sqrt(2)
      >>> round(float(similarity_preserving(student, teacher)), 4)  # 1/2 (.293^2 + 1/2)
      0.2929

    Reference: Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019,
    arXiv 1907.09682, equations 1 to 4.
    """
    student, teacher = (
        x.reshape(x.shape[0], -1) if x.ndim == 4 else x for x in (student, teacher)
    )
    cloud = points.points_of(
        "similarity_preserving", student, teacher, where, axis_name
    )
    ours = points.unit(points.inner(cloud.student))
    theirs = points.unit(points.inner(cloud.teacher))
    return cloud.mean_over_pairs((ours - theirs) ** 2)


def probabilistic_transfer(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
    include_self: bool = True,
) -> Float[Array, ""]:
    """KL between the neighbourhoods of a point, averaged over the points, in nats.

    probabilistic_transfer = mean over anchors i of sum over j of p_ij log(p_ij / q_ij)
    p_ij = k(teacher_i, teacher_j) / sum over l of k(teacher_i, teacher_l),
    q_ij the same of the student; k(x, y) = (cos(x, y) + 1) / 2

    A distribution says who is near an anchor relative to the others. The kernel is
    flat, without a bandwidth to choose, so values are small, around 0.01, and weights
    are large. Scaling single points and turning the cloud change nothing.

    Args:
      student: Features [batch, width], or [batch, time, width], where every token is a
        point; any floating dtype; gets the gradient.
      teacher: Features of the same leading axes, of any width; gets none.
      where: Mask, [batch] or [batch, time]; a pair counts if both ends do, and a masked
        point gets gradient exactly 0, whatever stands there. None counts every point.
      axis_name: Axis of the mesh over which the batch is split, inside `jax.shard_map`:
        the points of all shards meet. None: those of this call.
      include_self: Each anchor is a neighbour of its own, with k = 1: so do the authors
        compute it. False leaves j = i out, as the equation in the paper does.

    Returns:
      A scalar, float32 (float64 if an input is): the *mean over anchors* of a KL. The
      authors' code also divides by the number of neighbours, hence its weight of 30000:
      here that is 30000 / batch. 0 for fewer than two points.

    Numerics: A sum of non-negative terms, accurate near 0. A kernel below 1e-7, of two
    opposite points, counts as 1e-7: the KL stays finite. A point at the origin has
    cosine 0 with everything, and gets no gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])   # kernel 1/2: rows (2/3, 1/3)
      >>> teacher = jnp.array([[1.0], [3.0]])             # kernel 1: rows (1/2, 1/2)
      >>> round(float(probabilistic_transfer(student, teacher)), 4)   # log(9/8) / 2
      0.0589

    Reference: Passalis, Tefas, "Learning Deep Representations with Probabilistic
    Knowledge Transfer", ECCV 2018, arXiv 1803.10837, section 3.
    """
    cloud = points.points_of(
        "probabilistic_transfer", student, teacher, where, axis_name
    )

    def log_kernel(x: Float[Array, "n k"]) -> Float[Array, "n n"]:
        return jnp.log(jnp.maximum((points.cosines(x) + 1) / 2, 1e-7))

    pairs = cloud.pairs() if include_self else cloud.others()
    return points.rows_kl(log_kernel(cloud.student), log_kernel(cloud.teacher), pairs)


def correlation_congruence(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    gamma: Scalar = 0.4,
    order: int = 2,
    where: Shaped[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Mean squared difference of Gaussian similarities between the points of a batch.

    correlation_congruence = mean over pairs (i, j) of (k(s_i, s_j) - k(t_i, t_j))^2
    k(x, y) = sum over p from 0 to order of exp(-2 gamma) (2 gamma)^p / p! <x, y>^p

    The kernel is the Taylor polynomial of exp(-gamma |x - y|^2) for points of length 1,
    to which the features are scaled here. It weighs the near pairs more than a cosine
    does. Some libraries give this name to another quantity, a product of differences of
    neighbouring rows, which depends on the order of the batch.

    Args:
      student: Features [batch, width], or [batch, time, width], where every token is a
        point; any floating dtype; gets the gradient.
      teacher: Features of the same leading axes, of any width; gets none.
      gamma: Sharpness of the kernel, > 0; may be traced.
      order: Degree of the polynomial, at least 1; 1 compares cosines, shrunk.
      where: Mask, [batch] or [batch, time]; a pair counts if both ends do, and a masked
        point gets gradient exactly 0, whatever stands there. None counts every point.
      axis_name: Axis of the mesh over which the batch is split, inside `jax.shard_map`:
        the points of all shards meet. None: those of this call.

    Returns:
      A scalar, float32 (float64 if an input is): the mean over all ordered pairs, a
      point with itself (which is 0) included. 0 for fewer than two points.

    Numerics: Computed in float32 whatever the inputs, on matrix units too. A point at
    the origin has cosine 0 with everything, and gets no gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[1.0, 0.0], [0.0, 2.0]])   # cosine 0: k = e^-1
      >>> teacher = jnp.array([[3.0], [4.0]])             # cosine 1: k = e^-1 (1 + 1)
      >>> value = correlation_congruence(student, teacher, gamma=0.5, order=1)
      >>> round(float(value), 4)                          # 2 of 4 pairs, e^-2 each
      0.0677

    Reference: Peng, Jin, Liu, Zhou, Wu, Liu, Zhang, Liu, "Correlation Congruence for
    Knowledge Distillation", ICCV 2019, arXiv 1904.01802, section 3.3.
    """
    cloud = points.points_of(
        "correlation_congruence", student, teacher, where, axis_name
    )
    check_positive("correlation_congruence", "gamma", gamma, "0.4 is the paper's.")
    if order < 1:
        fail("correlation_congruence", "order", "be at least 1", order, "2 is usual.")
    sharpness = 2 * numerics.positive_as(cloud.student.dtype, gamma)

    def kernel(x: Float[Array, "n k"]) -> Float[Array, "n n"]:
        cosines = points.cosines(x)
        total = jnp.ones_like(cosines)
        for power in range(order, 0, -1):  # Horner: 1 + a c (1 + a c / 2 (1 + ...))
            total = 1 + sharpness * cosines * total / power
        return jnp.exp(-sharpness) * total

    return cloud.mean_over_pairs((kernel(cloud.student) - kernel(cloud.teacher)) ** 2)


def embedding_relation(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar | None = None,
    where: Shaped[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """How much the cosines between the embeddings of a batch differ.

    embedding_relation = mean over pairs (i, j) of (cos(s_i, s_j) - cos(t_i, t_j))^2
    with a temperature T: mean over anchors i of sum over j of p_ij log(p_ij / q_ij),
    p_i = softmax over j != i of cos(t_i, t_j) / T, q_i the same of the student

    What a sentence or image embedding is used for is its cosine with others, so this
    teaches exactly that, at any width. The squared form treats all pairs alike; with a
    temperature (0.05, say) the KL looks at the nearest neighbours, in the manner of the
    contrastive losses that such models are trained with. There is no factor T^2 in it.

    Args:
      student: Embeddings [batch, width], or [batch, time, width], where every token is
        a point; any floating dtype; gets the gradient.
      teacher: Embeddings of the same leading axes, of any width; gets none.
      temperature: T > 0, divides the cosines of both and asks for the KL; may be
        traced. None asks for the squared error.
      where: Mask, [batch] or [batch, time]; a pair counts if both ends do, and a masked
        point gets gradient exactly 0, whatever stands there. None counts every point.
      axis_name: Axis of the mesh over which the batch is split, inside `jax.shard_map`:
        the points of all shards meet. None: those of this call.

    Returns:
      A scalar, float32 (float64 if an input is). Squared: the mean over all ordered
      pairs, a point with itself (which is 0) included. KL: in nats, the mean over
      anchors, without the anchor among its own neighbours. 0 for fewer than two points
      (the KL: than three).

    Numerics: Computed in float32 whatever the inputs, on matrix units too. A point at
    the origin has cosine 0 with everything, and gets no gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])   # cosine 0
      >>> teacher = jnp.array([[3.0], [4.0]])             # cosine 1
      >>> float(embedding_relation(student, teacher))     # 2 of 4 pairs, 1 each
      0.5

    Reference: Yang et al., "CLIP-KD: An Empirical Study of CLIP Model Distillation",
    CVPR 2024, arXiv 2307.12732, section 3 (the KL); Reimers, Gurevych, "Sentence-BERT:
    Sentence Embeddings using Siamese BERT-Networks", EMNLP 2019, arXiv 1908.10084,
    section 3 (the squared error of cosines).
    """
    cloud = points.points_of("embedding_relation", student, teacher, where, axis_name)
    ours, theirs = points.cosines(cloud.student), points.cosines(cloud.teacher)
    if temperature is None:
        return cloud.mean_over_pairs((ours - theirs) ** 2)
    check_temperature("embedding_relation", temperature)
    softness = numerics.positive_as(ours.dtype, temperature)
    return points.rows_kl(ours / softness, theirs / softness, cloud.others())
