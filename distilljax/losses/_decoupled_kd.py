"""Decoupled distillation: the target class apart from the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from distilljax._checks import check_between, check_labels, check_temperature
from distilljax.losses import _numerics as numerics
from distilljax.losses._heads import accepts_heads
from distilljax.typing import Scalar


@accepts_heads
def decoupled_kd(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "..."],
    *,
    labels: Integer[Array, "..."],
    target_weight: Scalar = 1.0,
    non_target_weight: Scalar = 8.0,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Weighted KL of the target, and of what is not the target, at each position.

    decoupled_kd = target_weight KL(b_p || b_q) + non_target_weight KL(p' || q')
    p = softmax(teacher / T), q = softmax(student / T), y the label
    b_p = (p_y, 1 - p_y); p' = p over the classes other than y, divided by 1 - p_y

    `forward_kl` is the same with weights 1 and 1 - p_y: the surer the teacher is, the
    less it says about the other classes. This loss gives them a weight of their own.
    Its gradient is target_weight (q_y - p_y) / T at the label, and at another class i
    (-target_weight (q_y - p_y) q'_i + non_target_weight (q'_i - p'_i)) / T.
    There is no factor T^2 in it; the authors have one, and raise the weight of the
    whole from 0 over the first 20 epochs, because large weights diverge early.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape; gets none.
      labels: Class indices [*batch], integers in [0, classes).
      target_weight: At least 0; may be traced. The authors' alpha.
      non_target_weight: At least 0; may be traced. The authors' beta, 2 to 8.
      temperature: T > 0, divides both; may be traced. The authors use 4.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits and the label. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is), in nats. +inf where the student rules
      out a class that the teacher does not; nan where a label is out of range.

    Numerics: Computed in float32 whatever the inputs. 1 - p_y is the log-sum-exp of the
    other classes, so that it keeps its digits where p_y rounds to 1. Without other
    classes (all at -inf, in the teacher or in the student) there is no second term.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> student = jnp.log(jnp.array([0.5, 0.125, 0.375]))   # agrees on the target
      >>> value = decoupled_kd(
      ...     student, teacher, labels=jnp.array(0), non_target_weight=1.0
      ... )
      >>> round(float(value), 4)                              # .5 log 2 + .5 log(2/3)
      0.1438

    Reference: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR
    2022, arXiv 2203.08679, equation 7.
    """
    z, v, mask = numerics.prepare("decoupled_kd", student, teacher, where)
    check_labels("decoupled_kd", labels, z.shape[:-1])
    check_temperature("decoupled_kd", temperature)
    weights = {"target_weight": target_weight, "non_target_weight": non_target_weight}
    for name, weight in weights.items():
        check_between("decoupled_kd", name, weight, 0, float("inf"))
    temperature = numerics.positive_as(z.dtype, temperature)
    index, valid = numerics.index_in(jnp.asarray(labels), z.shape[-1])
    z_binary, z_others = _split(z / temperature, index[..., None])
    v_binary, v_others = _split(v / temperature, index[..., None])
    target = numerics.kl(v_binary, z_binary)
    # One side without other classes: its conditional distribution is 0 / 0.
    other = ~numerics.is_zero(v_binary[..., 1]) & ~numerics.is_zero(z_binary[..., 1])
    others = numerics.kl(v_others, z_others)
    others = jnp.where(other, others, jnp.zeros_like(others))
    values = (
        numerics.between_as(z.dtype, target_weight, 0) * target
        + numerics.between_as(z.dtype, non_target_weight, 0) * others
    )
    values *= numerics.poison(valid, values.dtype)
    return numerics.zero_masked(values, mask)


def _split(
    logits: Float[Array, "*b c"], index: Integer[Array, "*b 1"]
) -> tuple[Float[Array, "*b 2"], Float[Array, "*b c"]]:
    """Log-probabilities of (target, others), and of each other given the others."""
    rest = numerics.without(logits, index)
    total = numerics.log_sum_exp(rest)[..., None]
    at_target = jnp.take_along_axis(logits, index, axis=-1)
    binary = jax.nn.log_softmax(jnp.concatenate([at_target, total], axis=-1))
    total = jnp.where(numerics.is_zero(total), jnp.zeros_like(total), total)
    return binary, rest - total
