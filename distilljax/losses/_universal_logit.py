"""Distance of sorted probabilities, for models of different vocabularies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_temperature, check_unequal_logits, check_where
from distilljax.losses import _numerics as numerics
from distilljax.losses._heads import accepts_heads
from distilljax.typing import Scalar


@accepts_heads
def universal_logit(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """L1 distance of the sorted probabilities at each position, in [0, 2].

    universal_logit = sum over ranks of |p_(i) - q_(i)|
    p_(1) >= p_(2) >= ... are the sorted softmax(teacher / T), q likewise of the
    student, and the shorter one continues with zeros

    The Wasserstein distance of the two when any class may stand for any other at the
    same cost: all that can be compared without knowing which classes belong together.
    It teaches how sure to be, and not of what: a student with the right probabilities
    on the wrong classes has loss 0. So always add the cross-entropy, and match by name
    the classes that both vocabularies have. Its gradient is q (g - sum of q g) / T
    with g = sign(q_(i) - p_(i)) at the class of rank i.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits with the same leading axes and any number of classes; gets none.
      temperature: T > 0, divides both; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is).

    Numerics: Computed in float32 whatever the inputs. Where p_(i) and q_(i) agree to
    rounding the gradient is 0. A class at -inf has probability 0, like one that is
    not there.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([0.1, 0.7, 0.2]))
      >>> student = jnp.log(jnp.array([0.5, 0.5]))
      >>> round(float(universal_logit(student, teacher)), 4)        # .2 + .3 + .1
      0.6

    Reference: Boizard, El Haddad, Hudelot, Colombo, "Towards Cross-Tokenizer
    Distillation: the Universal Logit Distillation Loss for LLMs", TMLR 2025, arXiv
    2402.12030, section 3.
    """
    function = "universal_logit"
    check_unequal_logits(function, student, teacher)
    check_where(function, where, jnp.shape(student)[:-1])
    check_temperature(function, temperature)
    dtype = numerics.compute_dtype(student, teacher)
    mask = numerics.as_mask(where)
    classes = max(jnp.shape(student)[-1], jnp.shape(teacher)[-1])
    temperature = numerics.positive_as(dtype, temperature)

    def sorted_log_probs(logits: Array) -> Float[Array, "*b c"]:
        logits = numerics.zero_masked(jnp.asarray(logits).astype(dtype), mask, 1)
        # Not descending=True: it would rank equal classes from the last to the first.
        log_a = -jnp.sort(-jax.nn.log_softmax(logits / temperature), stable=True)
        missing = [(0, 0)] * (log_a.ndim - 1) + [(0, classes - log_a.shape[-1])]
        return jnp.pad(log_a, missing, constant_values=-jnp.inf)

    log_q = sorted_log_probs(student)
    log_p = jax.lax.stop_gradient(sorted_log_probs(teacher))
    values = jnp.sum(numerics.absolute_gap(log_p, log_q), axis=-1)
    return numerics.zero_masked(values, mask)
