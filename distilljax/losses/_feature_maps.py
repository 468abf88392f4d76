"""Losses between feature maps of images, one value for each example.

Each reduces an image's features to what student and teacher can be compared in: where
they look (`attention_transfer`), which patterns of positions their channels select
(`neuron_selectivity`), how one layer turns into the next (`flow_of_solution`), or which
neurons fire (`activation_boundary`). Maps of unequal height or width are refused: how
to pool them is a decision, and not ours.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import (
    check_between,
    check_features,
    check_positive,
    check_where,
    fail,
)
from distilljax.losses import _features as features
from distilljax.losses import _numerics as numerics
from distilljax.typing import Scalar


def attention_transfer(
    student: Float[Array, "batch height width channels"],
    teacher: Float[Array, "..."],
    *,
    power: Scalar = 2.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Squared distance between the spatial attention maps of each image.

    attention_transfer = sum over positions of (Q_s / |Q_s| - Q_t / |Q_t|)^2
    Q = sum over channels of |features|^power, one number for each position

    It says where to look and leaves open what to see there: the numbers of channels may
    differ, and the order and the scale of the channels do not matter.

    Args:
      student: Features [batch, height, width, channels]; gets the gradient.
      teacher: Features of the same batch, height and width; gets none.
      power: How much the strongest channels count, >= 1; may be traced.
      where: Mask [batch]; where it is false the value and the gradient are exactly 0,
        whatever the features. None counts every image.

    Returns:
      [batch], float32 (float64 if an input is), in [0, 2]. A map of zeros is left as it
      is: against another it has the value 1, and no gradient.

    Numerics: The paper adds distances that are not squared, with weight beta / 2; its
    code, and the libraries after it, take the *mean* over positions of this square,
    with weight 1000. That is this sum with weight 1000 / (height width).

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[[1.0], [1.0]], [[2.0], [0.0]]])[None]  # 1 channel
      >>> teacher = jnp.array([[[1.0], [2.0]], [[1.0], [0.0]]])[None]
      >>> value = attention_transfer(student, teacher, power=1)   # 2 - 2 * 5 / 6
      >>> round(float(value[0]), 6)
      0.333333

    Reference: Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the
    Performance of Convolutional Neural Networks via Attention Transfer", ICLR 2017,
    arXiv 1612.03928, section 3.1.
    """
    check_between("attention_transfer", "power", power, 1, jnp.inf)
    s, t, mask = features.prepare(
        "attention_transfer",
        features.IMAGE,
        student,
        teacher,
        where,
        lead=1,
        any_width=True,
    )
    power = numerics.between_as(s.dtype, power, 1)
    s, t = (
        features.direction(jnp.sum(jnp.abs(x) ** power, axis=-1).reshape(len(x), -1))
        for x in (s, t)
    )
    return numerics.zero_masked(jnp.sum((s - t) ** 2, axis=-1), mask)


def neuron_selectivity(
    student: Float[Array, "batch height width channels"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Squared maximum mean discrepancy between the channels of each image.

    neuron_selectivity = mean k(s, s') + mean k(t, t') - 2 mean k(s, t)

    over all pairs of channels, with the kernel k(a, b) = <a, b>^2, where the map of a
    channel over the positions is first divided by its length. It matches the patterns
    that the channels select as a set: their order, their scale and their number are
    free. Where every channel of one side is dead, that side counts as empty.

    Args:
      student: Features [batch, height, width, channels]; gets the gradient.
      teacher: Features of the same batch, height and width; gets none.
      where: Mask [batch]; where it is false the value and the gradient are exactly 0,
        whatever the features. None counts every image.

    Returns:
      [batch], float32 (float64 if an input is), in [0, 2], with the term of the teacher
      alone, which has no gradient: so 0 means that the sets agree.

    Numerics: With no more positions than channels, as |M_s - M_t|^2, where M is the
    mean over channels of the outer product of a map with itself: nothing cancels.
    Otherwise as the sum over pairs of channels, which needs channels^2 instead of
    positions^2 numbers for each image, and may be below 0 by a rounding error (1e-7).

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[[3.0], [0.0]]])[None]     # one channel sees the left
      >>> teacher = jnp.array([[[0.0, 2.0], [1.0, 0.0]]])[None]  # two see one side each
      >>> neuron_selectivity(student, teacher)            # 1 + 1 / 2 - 2 * 1 / 2
      Array([0.5], dtype=float32)

    Reference: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron
    Selectivity Transfer", 2017, arXiv 1707.01219, section 4 (polynomial kernel).
    """
    s, t, mask = features.prepare(
        "neuron_selectivity",
        features.IMAGE,
        student,
        teacher,
        where,
        lead=1,
        any_width=True,
    )
    # [batch, channels, positions], each channel of length 1.
    s, t = (
        features.direction(x.reshape(len(x), -1, x.shape[-1]).swapaxes(1, 2))
        for x in (s, t)
    )
    if s.shape[2] <= max(s.shape[1], t.shape[1]):
        moments = [_products("bcp,bcq->bpq", x, x) / x.shape[1] for x in (s, t)]
        values = jnp.sum((moments[0] - moments[1]) ** 2, axis=(1, 2))
    else:
        kernels = (
            jnp.mean(_products("bcp,bdp->bcd", a, b) ** 2, axis=(1, 2))
            for a, b in ((s, s), (t, t), (s, t))
        )
        own, other, cross = kernels
        values = own + other - 2 * cross
    return numerics.zero_masked(values, mask)


def flow_of_solution(
    student: tuple[
        Float[Array, "batch height width early"],
        Float[Array, "batch height width late"],
    ],
    teacher: tuple[Float[Array, "..."], Float[Array, "..."]],
    *,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Mean squared difference between the flow matrices of each image.

    flow_of_solution = mean over i and j of (G_s[i, j] - G_t[i, j])^2
    G[i, j] = mean over positions of early[.., i] late[.., j]

    The features enter and leave a stage of the network, an early and a late layer; G
    says how the one turns into the other, whatever the position. It is usually a first
    phase of training, which gives the student its start.

    Args:
      student: The early and the late map, [batch, height, width, channels] each, with
        the same height and width; both get the gradient.
      teacher: Two maps with the same numbers of channels; they get none. Their height
        and width may be others than the student's.
      where: Mask [batch]; where it is false the value and the gradient are exactly 0,
        whatever the features. None counts every image.

    Returns:
      [batch], float32 (float64 if an input is), in the features' units to the fourth.

    Numerics: A mean over the entries of G, where the paper sums them: its number is
    this one times the product of the two numbers of channels.

    Example:
      >>> import jax.numpy as jnp
      >>> early, late = jnp.ones((1, 2, 2, 1)), 3 * jnp.ones((1, 2, 2, 1))
      >>> flow_of_solution((early, late), (early, early))         # (3 - 1)^2
      Array([4.], dtype=float32)

    Reference: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast
    Optimization, Network Minimization and Transfer Learning", CVPR 2017, section 3.
    """
    _check_flows(student, teacher)
    check_where("flow_of_solution", where, jnp.shape(student[0])[:1])
    mask = numerics.as_mask(where)
    dtype = numerics.compute_dtype(*student, *teacher)
    g_s, g_t = (
        _flow(*(features.settled(x, mask, dtype) for x in maps))
        for maps in (student, teacher)
    )
    values = jnp.mean((g_s - jax.lax.stop_gradient(g_t)) ** 2, axis=(1, 2))
    return numerics.zero_masked(values, mask)


def activation_boundary(
    student: Float[Array, "batch *neurons"],
    teacher: Float[Array, "..."],
    *,
    margin: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Mean squared hinge on the side of zero that each neuron is on.

    activation_boundary = mean over neurons of
        max(0, margin - s)^2 where t > 0,  max(0, margin + s)^2 where t <= 0

    for pre-activations s and t. Only the sign of the teacher counts: which neurons
    fire, that is, the boundaries between its regions. It gives a student its start,
    before training with another loss.

    Args:
      student: Features *before* the ReLU, [batch, height, width, channels] or any other
        axes after the batch; gets the gradient.
      teacher: Features before the ReLU, of the same shape; gets none. After a ReLU the
        sign is lost in part: 0 then stands for everything below.
      margin: By how much the student should be on the right side, > 0; may be traced.
      where: Mask [batch]; where it is false the value and the gradient are exactly 0,
        whatever the features. None counts every example.

    Returns:
      [batch], float32 (float64 if an input is), in squared units of the features. The
      teacher itself has a loss above 0 wherever it is within the margin.

    Numerics: A mean over the neurons, where the paper takes the sum: its number is this
    one times the number of neurons. A neuron exactly at the margin has gradient 0.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([[3.0, 0.5, 0.0]]), jnp.array([[9.0, 0.1, -2.0]])
      >>> round(float(activation_boundary(student, teacher)[0]), 6)  # (0 + 1/4 + 1) / 3
      0.416667

    Reference: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation
    Boundaries Formed by Hidden Neurons", AAAI 2019, arXiv 1811.03233, section 3.
    """
    remedy = "Use 1, or the size of the teacher's pre-activations."
    check_positive("activation_boundary", "margin", margin, remedy)
    s, t, mask = features.prepare(
        "activation_boundary", "batch ... neurons", student, teacher, where, lead=1
    )
    side = jnp.where(t > 0, jnp.ones((), s.dtype), -jnp.ones((), s.dtype))
    gaps = jnp.maximum(numerics.positive_as(s.dtype, margin) - side * s, 0)
    values = jnp.mean(gaps**2, axis=tuple(range(1, s.ndim)))
    return numerics.zero_masked(values, mask)


def _products(
    equation: str, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "..."]:
    return jnp.einsum(equation, a, b, precision=features.PRECISE)


def _flow(
    early: Float[Array, "b h w m"], late: Float[Array, "b h w n"]
) -> Float[Array, "b m n"]:
    positions = early.shape[1] * early.shape[2]
    return _products("bhwm,bhwn->bmn", early, late) / positions


def _check_flows(student: Any, teacher: Any) -> None:
    """Two maps a side, of one size within a side, of equal channels between them."""
    name = "flow_of_solution"
    for side, maps in (("student", student), ("teacher", teacher)):
        if not isinstance(maps, tuple | list) or len(maps) != 2:
            fail(
                name,
                side,
                "be a pair of feature maps",
                type(maps).__name__,
                "Pass the input and the output of a stage: (early, late).",
                TypeError,
            )
        named = {f"{side}[{i}]": maps[i] for i in (0, 1)}
        check_features(name, features.IMAGE, any_width=True, **named)
    for i in (0, 1):
        ours, theirs = jnp.shape(student[i]), jnp.shape(teacher[i])
        if ours[0] != theirs[0]:
            remedy = "The leading axes differ: check that both saw the same batch."
        elif ours[-1] != theirs[-1]:
            remedy = (
                f"The last axes (channels) differ: {ours[-1]} and {theirs[-1]}. Choose "
                "layers of one width, or map the student's with a learned projection."
            )
        else:
            continue
        rule = f"have the batch and the channels of student[{i}], {ours}"
        fail(name, f"teacher[{i}]", rule, theirs, remedy)
