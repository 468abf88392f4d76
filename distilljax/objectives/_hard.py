"""The teacher's decision in place of its distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax

from distilljax._checks import check_between
from distilljax._functional import Batch
from distilljax._schedules import Rule, check_numbers, check_weight
from distilljax.objectives._features import feature_of
from distilljax.objectives._logits import Schedule, hard_term, value_at
from distilljax.objectives._signals import labels_of, likeliest_class, logits_of
from distilljax.terms import Outputs, Term


@dataclass(frozen=True)
class HardDistillation:
    """The teacher's most probable class as a label: DeiT's distillation.

    objective = kd_weight * cross_entropy(distillation logits, argmax teacher)
              + ce_weight * cross_entropy(logits, labels)

    For students with a distillation token: a second head learns from the teacher, the
    first from the labels, and at inference the mean of the two softmaxes is what the
    model says. Without a second head the class head learns from both. It needs no
    temperature, and a label that the augmentation cropped away is corrected by the
    teacher that sees the same crop.

    Reference: Touvron et al., "Training data-efficient image transformers &
    distillation through attention", ICML 2021, arXiv 2012.12877, equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> student = Outputs(jnp.array([[0.0, 0.0]]), {"token": jnp.array([[1.0, 0.0]])})
      >>> teacher = Outputs(jnp.array([[3.0, 1.0]]))
      >>> objective = HardDistillation(distillation_logits="token")
      >>> terms = objective(student, teacher, {"labels": jnp.array([1])})
      >>> [round(float(term.mean().value), 4) for term in terms.values()]
      [0.3133, 0.6931]
    """

    rules: ClassVar[Mapping[str, Rule]] = {
        "kd_weight": check_weight,
        "ce_weight": check_weight,
    }

    distillation_logits: str | None = None
    """Feature with the logits of the distillation token: the path of its head, or a
    name that the forward gives; None: the student's logits."""
    kd_weight: float | Schedule = 0.5
    """Weight of the cross-entropy with the teacher's class."""
    ce_weight: float | Schedule = 0.5
    """Weight of the cross-entropy with the labels; 0 needs none."""
    label_smoothing: float = 0.0
    """Share of the target of the labels that is spread evenly over all classes; the
    teacher's class stays as it is."""

    def __post_init__(self):
        check_numbers(self)
        check_between("HardDistillation", "label_smoothing", self.label_smoothing, 0, 1)

    @property
    def student_features(self) -> tuple[str, ...]:
        """What the step is to capture of the student."""
        return () if self.distillation_logits is None else (self.distillation_logits,)

    def __call__(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Term]:
        """The terms `kd` and, where it has a weight, `ce`."""
        name, where = "HardDistillation", batch.get("loss_mask")
        v = logits_of(name, teacher, "teacher")
        if self.distillation_logits is None:
            z = logits_of(name, student, "student")
        else:
            z = feature_of(name, student, self.distillation_logits, "student")
        decided = hard_term(z, likeliest_class(name, jax.lax.stop_gradient(v)), where)
        weight = value_at(self.kd_weight, batch)
        # both may be of one head, whose parts have one name each: the step logs them
        terms = {"kd": replace(decided, weight=weight, parts={})}
        if callable(self.ce_weight) or self.ce_weight != 0:
            hard = hard_term(
                logits_of(name, student, "student"),
                labels_of(name, batch),
                where,
                label_smoothing=self.label_smoothing,
            )
            weight = value_at(self.ce_weight, batch)
            terms["ce"] = replace(hard, weight=weight, parts={})
        return terms


__all__ = ["HardDistillation"]
