"""A teacher that begins as the student and moves away from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distilljax import losses
from distilljax._checks import check_between, check_logits, fail
from distilljax._functional import Batch
from distilljax._schedules import (
    Rule,
    check_numbers,
    check_share,
    check_softness,
    check_weight,
)
from distilljax.objectives._logits import Schedule, value_at
from distilljax.objectives._signals import (
    Divergence,
    by_position,
    check_tempered,
    logits_of,
    options_of,
)
from distilljax.terms import Outputs, Term

_TINY = 1e-15  # of the authors' code


@dataclass(frozen=True)
class TAID:
    """A mixture of the student itself and the teacher, with ever more of the latter.

    objective = weight * T^2 * divergence(student / T, mixture / T)
    mixture = (1 - t) * student + t * teacher, in logits and without gradient

    For a student much smaller than its teacher: a goal that is always near. t grows at
    least along a line from `start` to `end`, and faster while the loss falls:

    change = (previous loss - loss) / previous loss
    m <- momentum * m + (1 - momentum) * change
    t <- min(end, max(line(step), t + rate * sigmoid(m) * (1 - t)))

    t and m are the objective's state. Mixing probabilities instead of logits would only
    scale the gradient of the forward KL by t.

    Reference: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for
    Efficient Knowledge Transfer in Language Models", ICLR 2025, arXiv 2501.16937,
    equations 3 and 5 and algorithm 1.

    Example:
      >>> student = Outputs(jnp.array([[0.5, 1.0, 0.0, 0.0]]))
      >>> teacher = Outputs(jnp.array([[2.0, 1.0, 0.0, -1.0]]))
      >>> terms = TAID(interpolation=0.4)(student, teacher, {})
      >>> round(float(terms["taid"].mean().value), 6)
      0.058177
      >>> round(float(TAID(num_steps=100).init_state()["t"]), 3)
      0.4
    """

    rules: ClassVar[Mapping[str, Rule]] = {
        "interpolation": check_share,
        "temperature": check_softness,
        "weight": check_weight,
    }

    num_steps: int | None = None
    """Length of the line, usually the whole run; not needed with `interpolation`."""
    start: float = 0.4
    """First share of the teacher."""
    end: float = 1.0
    """Last share of the teacher."""
    rate: float = 5e-4
    """How much faster than the line it may be, per step."""
    momentum: float = 0.99
    """Decay of the average of the relative change of the loss."""
    interpolation: float | Schedule | None = None
    """Share of the teacher as a number or a schedule, instead of all of the above."""
    temperature: float | Schedule = 1.0
    """Softens both distributions."""
    weight: float | Schedule = 1.0
    """Weight of the term, before T^2."""
    divergence: Divergence = losses.forward_kl
    """Any divergence of `distilljax.losses` that takes a temperature."""

    def __post_init__(self):
        check_numbers(self)
        if self.interpolation is None and (self.num_steps or 0) < 1:
            fail(
                "TAID",
                "num_steps",
                "be at least 1 without interpolation",
                self.num_steps,
                "Pass the number of steps of the run, or interpolation=a schedule.",
            )
        for name in ("start", "end", "momentum"):
            check_between("TAID", name, getattr(self, name), 0.0, 1.0)
        if self.start > self.end:
            fail(
                "TAID",
                "start",
                f"be at most end, {self.end}",
                self.start,
                "The share of the teacher only grows.",
            )
        check_weight("TAID", "rate", self.rate)
        options = options_of("TAID", self.divergence, ("temperature",))
        remedy = "Use a divergence between distributions, such as losses.forward_kl."
        check_tempered("TAID", self.divergence, options, remedy)

    def init_state(self) -> dict[str, Array] | None:
        """The share of the teacher, and what it grows by; None with `interpolation`."""
        if self.interpolation is not None:
            return None
        return {
            "t": jnp.float32(self.start),
            "momentum": jnp.float32(0.0),
            "loss": jnp.float32(jnp.inf),  # none yet
        }

    def __call__(
        self,
        student: Outputs,
        teacher: Any,
        batch: Batch,
        *,
        state: Mapping[str, Array] | None = None,
    ) -> Any:
        """The term `taid`; with a state also what `next_state` needs."""
        where = batch.get("loss_mask")
        z = logits_of("TAID", student, "student")
        v = logits_of("TAID", teacher, "teacher")
        share = self.start if self.interpolation is None else self.interpolation
        t = value_at(share, batch) if state is None else state["t"]
        temperature = value_at(self.temperature, batch)

        def to_mixture(z: Array, v: Any, *, where: Array | None) -> Array:
            check_logits("TAID", student=z, teacher=v)
            goal = _mixture(jax.lax.stop_gradient(z), v, t)
            return self.divergence(z, goal, temperature=temperature, where=where)

        values = by_position("TAID", to_mixture)(z, v, where=where)
        weight = value_at(self.weight, batch) * temperature**2
        terms = {"taid": Term(values, where, weight)}
        if state is None:
            return terms
        return terms, {"loss": terms["taid"].mean(), "step": batch["step"]}

    def next_state(
        self, state: Mapping[str, Array], seen: Mapping[str, Any]
    ) -> dict[str, Array]:
        """The share after the update, from the loss over all microbatches."""
        total = jax.tree.map(lambda x: jnp.sum(x, axis=0), seen["loss"])
        loss, before = total.value, state["loss"]
        known = jnp.isfinite(before)
        change = (before - loss) / (before + _TINY)
        m = self.momentum * state["momentum"] + (1 - self.momentum) * change
        m = jnp.where(known, m, state["momentum"])
        faster = self.rate * jax.nn.sigmoid(m) * (1 - state["t"])
        done = jnp.minimum(seen["step"][0] / (self.num_steps or 1), 1.0)
        line = self.start + (self.end - self.start) * done
        t = jnp.minimum(self.end, jnp.maximum(line, state["t"] + faster))
        moved = {"t": jnp.where(known, t, state["t"]), "momentum": m, "loss": loss}
        # a batch in which nothing counts says nothing
        return jax.tree.map(lambda a, b: jnp.where(total.count > 0, a, b), moved, state)


def _mixture(z: Array, v: Array, t: Any) -> Array:
    """(1 - t) z + t v; a class at -inf stays there, and is no 0 * inf at the ends."""
    z, v = (jnp.asarray(x, jnp.float32) for x in (z, v))
    gone_z, gone_v = jnp.isneginf(z), jnp.isneginf(v)
    mixed = (1 - t) * jnp.where(gone_z, 0, z) + t * jnp.where(gone_v, 0, v)
    gone = (gone_z & (t < 1)) | (gone_v & (t > 0))
    return jnp.where(gone, -jnp.inf, mixed)


__all__ = ["TAID"]
