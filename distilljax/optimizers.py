"""Optimizers and schedules as parts of a config: dataclasses that build optax.

A schedule is itself the function of the step, so that it can stand wherever a number
can: as a learning rate, as a weight or as a temperature of an objective.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from distilljax._checks import (
    check_below,
    check_between,
    check_count,
    check_finite,
    check_positive,
    fail,
)
from distilljax.typing import path_of

MomentDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up to `peak`, then half a cosine down to `end` at `num_steps`.

    Example:
      >>> schedule = WarmupCosine(peak=1.0, num_steps=10, warmup_steps=2)
      >>> [round(float(schedule(step)), 3) for step in (0, 1, 2, 6, 10)]
      [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    peak: float
    """Highest value."""
    num_steps: int
    """Step at which `end` is reached."""
    warmup_steps: int = 0
    """Steps from 0 up to `peak`."""
    end: float = 0.0
    """Last value, kept afterwards."""

    def __post_init__(self):
        check_positive("WarmupCosine", "peak", self.peak, "It is the largest value.")
        check_between("WarmupCosine", "end", self.end, 0, self.peak)
        check_count("WarmupCosine", "num_steps", self.num_steps)
        check_count("WarmupCosine", "warmup_steps", self.warmup_steps, low=0)
        if self.warmup_steps >= self.num_steps:
            fail(
                "WarmupCosine",
                "warmup_steps",
                f"be less than num_steps, {self.num_steps}",
                self.warmup_steps,
                "num_steps counts the warm-up as well.",
            )

    def __call__(self, step: Any) -> Any:
        """The value at a step."""
        if self.warmup_steps == 0:
            return optax.cosine_decay_schedule(
                self.peak, self.num_steps, alpha=self.end / self.peak
            )(step)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.peak, self.warmup_steps, self.num_steps, self.end
        )(step)


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end` over `num_steps`, then constant.

    Example:
      >>> [float(Linear(1.0, 3.0, num_steps=4)(step)) for step in (0, 2, 4, 9)]
      [1.0, 2.0, 3.0, 3.0]
    """

    start: float
    """Value at step 0."""
    end: float
    """Value from `num_steps` on."""
    num_steps: int
    """Length of the line, in steps."""

    def __post_init__(self):
        for name in ("start", "end"):
            check_finite("Linear", name, getattr(self, name))
        check_count("Linear", "num_steps", self.num_steps)

    def __call__(self, step: Any) -> Any:
        """The value at a step."""
        return optax.linear_schedule(self.start, self.end, self.num_steps)(step)


def decays(params: Any) -> Any:
    """Which parameters weight decay applies to: matrices and kernels, not vectors.

    Biases and the scales of normalisation layers have one axis: pulling those to zero
    does not regularise, it biases.

    Example:
      >>> decays({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
      {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda x: x.ndim > 1, params)


@dataclass(frozen=True)
class Group:
    """Parameters whose path matches a pattern learn at a rate of their own.

    Example:
      >>> tx = AdamW(learning_rate=0.1, groups=(Group("head/", scale=0.0),))()
      >>> params = {"head": {"bias": jnp.ones(1)}, "body": {"bias": jnp.ones(1)}}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> round(float(updates["body"]["bias"][0]), 4), bool(updates["head"]["bias"][0])
      (-0.1, False)
    """

    pattern: str
    """Regular expression, searched in the path, such as ``projection/``."""
    scale: float
    """Factor on the learning rate; 0 freezes the group."""

    def __post_init__(self):
        check_below("Group", "scale", self.scale, 0, math.inf)


def _scale_groups(groups: tuple[Group, ...]) -> optax.GradientTransformation:
    """Multiply each update by the scale of the first group that its path matches."""

    def update(updates, state, params=None):
        del params

        def scale(path, u):
            name = path_of(path)
            factors = (g.scale for g in groups if re.search(g.pattern, name))
            return u * next(factors, 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    def init(params):
        names = [path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        for group in groups:
            if not any(re.search(group.pattern, name) for name in names):
                fail(
                    "AdamW",
                    "groups",
                    "match some parameter",
                    repr(group.pattern),
                    f"The student's parameters are {names}.",
                )
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def _check_common(function: str, optimizer: AdamW | SGD) -> None:
    """What all optimizers have: a rate, a decay, and perhaps a norm to clip to."""
    if not callable(optimizer.learning_rate):
        check_below(function, "learning_rate", optimizer.learning_rate, 0, math.inf)
    check_below(function, "weight_decay", optimizer.weight_decay, 0, math.inf)
    if optimizer.clip_norm is not None:
        remedy = "None does not clip."
        check_positive(function, "clip_norm", optimizer.clip_norm, remedy)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay; Loshchilov and Hutter 2017, arXiv 1711.05101.

    Example:
      >>> tx = AdamW(learning_rate=WarmupCosine(1e-3, 100), weight_decay=0.1)()
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(zeros, tx.init(params), params)
      >>> round(float(updates["kernel"][0, 0]), 9), float(updates["bias"][0])
      (-0.0001, -0.0)
    """

    learning_rate: Any = 1e-3
    """Number or schedule."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of kernels, per unit of learning rate; never of vectors."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; None does not clip."""
    moment_dtype: MomentDtype = "float32"
    """Type of the first moment; bfloat16 saves a quarter of the optimizer's memory."""
    groups: tuple[Group, ...] = field(default=())
    """Learning rates of their own, by path; the first match counts."""

    def __post_init__(self):
        for name in ("b1", "b2"):
            check_below("AdamW", name, getattr(self, name), 0, 1)
        check_below("AdamW", "eps", self.eps, 0, math.inf)
        _check_common("AdamW", self)

    def __call__(self) -> optax.GradientTransformation:
        """The optax transformation."""
        parts = []
        if self.clip_norm is not None:
            parts.append(optax.clip_by_global_norm(self.clip_norm))
        parts.append(
            optax.scale_by_adam(
                self.b1, self.b2, self.eps, mu_dtype=jnp.dtype(self.moment_dtype)
            )
        )
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=decays))
        if self.groups:
            parts.append(_scale_groups(self.groups))
        parts.append(optax.scale_by_learning_rate(self.learning_rate))
        return optax.chain(*parts)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum.

    Example:
      >>> tx = SGD(learning_rate=0.5, momentum=0.0)()
      >>> updates, _ = tx.update({"w": jnp.ones(1)}, tx.init({"w": jnp.ones(1)}))
      >>> float(updates["w"][0])
      -0.5
    """

    learning_rate: Any = 0.1
    """Number or schedule."""
    momentum: float = 0.9
    """Decay of the running gradient; 0 keeps none."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    weight_decay: float = 0.0
    """L2 decay of kernels, added to the gradient; never of vectors."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; None does not clip."""

    def __post_init__(self):
        check_below("SGD", "momentum", self.momentum, 0, 1)
        _check_common("SGD", self)

    def __call__(self) -> optax.GradientTransformation:
        """The optax transformation."""
        parts = []
        if self.clip_norm is not None:
            parts.append(optax.clip_by_global_norm(self.clip_norm))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=decays))
        if self.momentum:
            parts.append(optax.trace(self.momentum, self.nesterov))
        parts.append(optax.scale_by_learning_rate(self.learning_rate))
        return optax.chain(*parts)


__all__ = ["SGD", "AdamW", "Group", "Linear", "WarmupCosine", "decays"]
