"""Cross-entropies: with integer labels, and with a teacher's distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from distilljax._checks import (
    check_between,
    check_labels,
    check_logits,
    check_where,
    is_static,
)
from distilljax.losses import _numerics as numerics
from distilljax.losses._categories import categories, sampled
from distilljax.losses._heads import accepts_heads
from distilljax.losses._sparse import SampledLogits, Teacher
from distilljax.typing import Scalar


@accepts_heads
def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "..."],
    *,
    label_smoothing: Scalar = 0.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy with integer labels at each position, in nats.

    cross_entropy = -(1 - eps) log q[label] - eps mean over classes of log q
    q = softmax(logits), eps = label_smoothing

    Its gradient is q - (1 - eps) onehot(label) - eps / classes. The labels belong to
    the positions of the logits as they are: for next-token prediction shift both the
    labels and the mask before the call.

    Args:
      logits: [*batch, classes] of any floating dtype; gets the gradient.
      labels: Class indices [*batch], integers in [0, classes).
      label_smoothing: Share eps in [0, 1] of the target that is spread evenly over the
        classes; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits and the label. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). nan, in the gradient too, where a
      label is out of range: it is neither wrapped nor clamped, and -100 or -1 for "no
      label" belongs into the mask.

    Numerics: Computed in float32 whatever the inputs. Smoothing spreads over the
    classes that are not at -inf.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
      >>> values = cross_entropy(logits, jnp.array([0, 1]))
      >>> [round(float(value), 4) for value in values]    # log 4, log 2
      [1.3863, 0.6931]

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception
    Architecture for Computer Vision", CVPR 2016, arXiv 1512.00567, section 7.
    """
    check_logits("cross_entropy", logits=logits)
    positions = jnp.shape(logits)[:-1]
    check_labels("cross_entropy", labels, positions)
    check_where("cross_entropy", where, positions)
    check_between("cross_entropy", "label_smoothing", label_smoothing, 0, 1)

    mask = numerics.as_mask(where)
    logits = jnp.asarray(logits).astype(numerics.compute_dtype(logits))
    log_q = jax.nn.log_softmax(numerics.zero_masked(logits, mask, trailing=1))

    index, valid = numerics.index_in(jnp.asarray(labels), logits.shape[-1])
    hard = jnp.take_along_axis(log_q, index[..., None], axis=-1)[..., 0]
    values = -hard
    if not (is_static(label_smoothing) and float(label_smoothing) == 0):
        eps = numerics.between_as(log_q.dtype, label_smoothing, 0, 1)
        live = ~numerics.is_zero(log_q)
        spread = jnp.where(live, log_q, jnp.zeros((), log_q.dtype)).sum(axis=-1)
        soft = spread / jnp.maximum(live.sum(axis=-1), 1).astype(log_q.dtype)
        values = -(1 - eps) * hard - eps * soft
    values *= numerics.poison(valid, values.dtype)
    return numerics.zero_masked(values, mask)


@accepts_heads
def soft_cross_entropy(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy of the student q under the teacher p at each position, in nats.

    soft_cross_entropy = -sum over classes of p log q
    p = softmax(teacher / T), q = softmax(student / T)

    Equal to `forward_kl` plus the teacher's entropy, with the same gradient, namely
    (q - p) / T: it is not 0 at q = p, so prefer the KL where the number is looked at.
    With the same logits twice it is their entropy. With `SampledLogits` its mean, and
    that of its gradient, are those of the dense teacher.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape, or `SparseLogits` or `SampledLogits` of it;
        gets no gradient.
      temperature: T > 0, divides both; may be traced. 1 for a sample.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). +inf where the student gives
      probability 0 (a logit of -inf) to a class that the teacher does not.

    Numerics: Computed in float32 whatever the inputs. A class at -inf on both sides
    counts 0.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([0.25, 0.25, 0.25, 0.25]))
      >>> round(float(soft_cross_entropy(logits, logits)), 4)       # entropy, log 4
      1.3863

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
    NeurIPS Deep Learning Workshop 2014, arXiv 1503.02531, equation 2.
    """
    function = "soft_cross_entropy"
    if isinstance(teacher, SampledLogits):
        log_q, log_p, mask = sampled(function, student, teacher, temperature, where)
    else:
        log_q, log_p, mask = categories(function, student, teacher, temperature, where)
    values = -jnp.sum(jnp.exp(log_p) * numerics.floored(log_q), axis=-1)
    values += numerics.infinite_if_missing(log_p, log_q)
    return numerics.zero_masked(values, mask)
