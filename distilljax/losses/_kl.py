"""The two Kullback-Leibler divergences between a teacher p and a student q."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax.losses import _numerics as numerics
from distilljax.losses._categories import categories, sampled
from distilljax.losses._heads import accepts_heads
from distilljax.losses._sparse import SampledLogits, Teacher
from distilljax.typing import Scalar

# In every loss `teacher` and `where` are annotated with "...": their shapes are checked
# by hand, because the message should say what to do about a mismatch.


@accepts_heads
def forward_kl(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """KL(p || q) of teacher p against student q at each position, in nats.

    forward_kl = sum over classes of p log(p / q)
    p = softmax(teacher / T), q = softmax(student / T)

    Its gradient is (q - p) / T: that of the cross-entropy with soft targets, less the
    teacher's entropy, so that it is 0 when the student has learnt everything. It covers
    every mode of the teacher. There is no factor T^2 in it.

    With `SampledLogits` it is the divergence sum of t log(t / q) - t + q of the sampled
    target t, 0 at q = t. The entropy of a sample is less than that of its teacher, so
    the value is too large, on average by a constant that the student cannot change;
    its gradient, q sum(t) - t, has the dense one as its mean.

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

    Numerics: Computed in float32 whatever the inputs, as a sum of non-negative terms,
    so a KL of 1e-5 at T = 20 keeps four digits. A class at -inf on both sides counts 0.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([0.5, 0.5]))
      >>> student = jnp.log(jnp.array([0.25, 0.75]))
      >>> round(float(forward_kl(student, teacher)), 4)   # .5 log 2 + .5 log(2/3)
      0.1438

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
    NeurIPS Deep Learning Workshop 2014, arXiv 1503.02531, section 2.
    """
    if isinstance(teacher, SampledLogits):
        # Once for each class, or the sample's entropy would count copies apart.
        log_q, log_t, mask = sampled(
            "forward_kl", student, teacher.merge(), temperature, where
        )
        t = jnp.exp(log_t)
        values = 1 + jnp.sum(t * numerics.log_ratio(log_t, log_q) - t, axis=-1)
        values += numerics.infinite_if_missing(log_t, log_q)
        return numerics.zero_masked(values, mask)
    log_q, log_p, mask = categories("forward_kl", student, teacher, temperature, where)
    return numerics.zero_masked(numerics.kl(log_p, log_q), mask)


@accepts_heads
def reverse_kl(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """KL(q || p) of student q against teacher p at each position, in nats.

    reverse_kl = sum over classes of q log(q / p)
    p = softmax(teacher / T), q = softmax(student / T)

    Its gradient is q (log(q / p) - reverse_kl) / T. It seeks the teacher's modes: what
    the student does not believe in at all gets no gradient, so a class that is dead in
    the student stays dead. Common for language models with small students.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape, or `SparseLogits` of it; gets none.
      temperature: T > 0, divides both; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). +inf where the teacher gives
      probability 0 (a logit of -inf) to a class that the student does not.

    Numerics: As `forward_kl`. Slice off a teacher's padded classes on both sides.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([0.25, 0.75]))
      >>> student = jnp.log(jnp.array([0.5, 0.5]))
      >>> round(float(reverse_kl(student, teacher)), 4)   # .5 log 2 + .5 log(2/3)
      0.1438

    Reference: Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language
    Models", ICLR 2024, arXiv 2306.08543, equation 1.
    """
    log_q, log_p, mask = categories("reverse_kl", student, teacher, temperature, where)
    return numerics.zero_masked(numerics.kl(log_q, log_p), mask)
