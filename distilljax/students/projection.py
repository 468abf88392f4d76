"""Learned maps from the student's features to the teacher's width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distilljax._checks import check_count, fail

Params = dict[str, Array]


@dataclass(frozen=True)
class Projection:
    """A linear map of each position by itself, from one width to another.

    projection = hidden @ kernel + bias

    It is part of an objective, and trained with the student: its parameters lie beside
    the student's in `DistillState.params`, under `objective`, and are in no evaluation
    and in no export of the student. The kernel starts with variance 1 / student_width,
    so that the scale of the features is kept.

    Example:
      >>> projection = Projection(student_width=2, teacher_width=3)
      >>> params = projection.init(jax.random.key(0))
      >>> {name: x.shape for name, x in params.items()}
      {'kernel': (2, 3), 'bias': (3,)}
      >>> projection(params, jnp.zeros((5, 7, 2))).shape
      (5, 7, 3)
    """

    student_width: int
    """Size of the last axis of the student's features."""
    teacher_width: int
    """Size of the last axis of the teacher's features."""
    use_bias: bool = True
    """Whether a constant is added."""

    def __post_init__(self):
        for name in ("student_width", "teacher_width"):
            check_count("Projection", name, getattr(self, name))

    def init(self, rng: Array) -> Params:
        """Fresh parameters."""
        make = jax.nn.initializers.lecun_normal()
        kernel = make(rng, (self.student_width, self.teacher_width), jnp.float32)
        if not self.use_bias:
            return {"kernel": kernel}
        return {"kernel": kernel, "bias": jnp.zeros(self.teacher_width)}

    def __call__(
        self, params: Mapping[str, Array], hidden: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Features of the teacher's width, float32, the leading axes as they were."""
        if jnp.shape(hidden)[-1:] != (self.student_width,):
            fail(
                "Projection",
                "student_width",
                f"be the width of the student's features, {jnp.shape(hidden)}",
                self.student_width,
                "Set it to the size of their last axis.",
            )
        kernel = params["kernel"].astype(hidden.dtype)  # as in the student's own layers
        projected = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return projected + params["bias"] if self.use_bias else projected


__all__ = ["Projection"]
