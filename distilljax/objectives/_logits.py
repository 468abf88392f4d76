"""What the model says: its distribution, or the labels alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float

from distilljax import losses
from distilljax._checks import check_finite, check_temperature, fail
from distilljax._functional import Batch
from distilljax.losses._heads import first_classes
from distilljax.terms import Outputs, Teacher, Term, diagnostics
from distilljax.typing import Mean

Schedule = Callable[[Any], Any]
Divergence = Callable[..., Float[Array, "*batch"]]


def value_at(value: float | Schedule, batch: Batch) -> Any:
    """A number, or what a schedule gives at ``batch["step"]``.

    Example:
      >>> value_at(2.0, {}), value_at(lambda step: 0.5 * step, {"step": 8})
      (2.0, 4.0)
    """
    return value(batch["step"]) if callable(value) else value


def logits_of(function: str, outputs: Teacher, whose: str) -> Any:
    """The logits, or an error that says where they should come from."""
    if isinstance(outputs, Mapping):
        fail(
            function,
            whose,
            "be one model",
            f"several, {', '.join(outputs)}",
            "Say how they are combined: MultiTeacher(objective, combine=...).",
        )
    if outputs is None or outputs.logits is None:
        fail(
            function,
            whose,
            "have logits",
            "none",
            "Give the step (teacher= of make_distill_step or of the config) a model "
            "whose forward returns logits, or put Outputs under batch['teacher'].",
        )
    return outputs.logits


def labels_of(function: str, batch: Batch) -> Array:
    """The labels, or an error that says how to do without."""
    if "labels" not in batch:
        fail(
            function,
            "batch",
            "have 'labels'",
            f"the keys {sorted(batch)}",
            "Set ce_weight=0 to learn from the teacher alone.",
        )
    return batch["labels"]


def check_num_classes(function: str, num_classes: int | None) -> None:
    """Raise unless it is None or a number of classes."""
    if num_classes is not None and num_classes < 1:
        remedy = "It is the size of the vocabulary without what pads it."
        fail(function, "num_classes", "be at least 1", num_classes, remedy)


def real_classes(function: str, logits: Any, num_classes: int | None) -> Any:
    """The logits of the first `num_classes` classes, of which there must be as many."""
    shape = getattr(logits, "shape", None)  # a sparse signal has none
    if num_classes is not None and shape is not None and shape[-1] < num_classes:
        fail(
            function,
            "num_classes",
            "be at most the number of classes of both models",
            f"{num_classes} for logits of shape {shape}",
            "It is the size of the vocabulary that both know.",
        )
    return first_classes(logits, num_classes)


@dataclass(frozen=True)
class LogitKD:
    """The teacher's distribution, and the labels: Hinton's distillation.

    loss = kd_weight * T^2 * divergence(student / T, teacher / T)
           + ce_weight * cross_entropy(student, labels)

    The factor T^2 keeps the gradient of the soft term at the size of the hard one when
    the temperature changes. The mask is ``batch["loss_mask"]``, if there is one. Where
    the student's logits are a `losses.LinearHead`, both terms come out of one fused
    pass, as one term that has them as its parts.

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
    2015, arXiv 1503.02531, section 2.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = Outputs(jnp.array([[2.0, 1.0, 0.0, -1.0]]))
      >>> student = Outputs(jnp.array([[0.5, 1.0, 0.0, 0.0]]))
      >>> terms = LogitKD(temperature=2.0, ce_weight=0.0)(student, logits, {})
      >>> round(float(terms["kd"].weight * terms["kd"].mean().value), 6)
      0.396319
    """

    temperature: float | Schedule = 1.0
    """Softens both distributions; 1 is the models' own."""
    kd_weight: float | Schedule = 1.0
    """Weight of the teacher's term, before T^2."""
    ce_weight: float | Schedule = 0.0
    """Weight of the cross-entropy with the labels, at temperature 1; 0 needs none."""
    divergence: Divergence = losses.forward_kl
    """Any divergence of `distilljax.losses` that takes a temperature."""
    num_classes: int | None = None
    """Classes that are no padding, where the two vocabularies are padded, perhaps to
    different sizes; None: all count, and the sizes must agree."""

    def __post_init__(self):
        check_num_classes("LogitKD", self.num_classes)
        if not callable(self.temperature):
            check_temperature("LogitKD", self.temperature)
        for name in ("kd_weight", "ce_weight"):
            if not callable(weight := getattr(self, name)):
                check_finite("LogitKD", name, weight)
        accepted = inspect.signature(self.divergence).parameters.values()
        if not any(
            p.name == "temperature" or p.kind is p.VAR_KEYWORD for p in accepted
        ):
            fail(
                "LogitKD",
                "divergence",
                "take a temperature",
                getattr(self.divergence, "__name__", self.divergence),
                "Use a divergence between distributions, such as losses.forward_kl, or "
                "write an objective of your own: a function that returns Terms.",
            )

    def __call__(
        self, student: Outputs, teacher: Teacher, batch: Batch
    ) -> dict[str, Term]:
        """The terms ``kd`` and, where it has a weight, ``ce``."""
        where = batch.get("loss_mask")
        temperature = value_at(self.temperature, batch)
        z = logits_of("LogitKD", student, "student")
        v = logits_of("LogitKD", teacher, "teacher")
        if isinstance(z, losses.LinearHead):
            return {"logit_kd": self._fused(z, v, temperature, batch)}
        z, v = (real_classes("LogitKD", x, self.num_classes) for x in (z, v))
        soft = self.divergence(z, v, temperature=temperature, where=where)
        kd_weight = value_at(self.kd_weight, batch) * temperature**2
        terms = {"kd": Term(soft, where, kd_weight, self._parts(z, v, batch))}
        if callable(self.ce_weight) or self.ce_weight != 0:
            hard = losses.cross_entropy(z, labels_of("LogitKD", batch), where=where)
            terms["ce"] = Term(hard, where, value_at(self.ce_weight, batch))
        return terms

    def _parts(self, z: Any, v: Any, batch: Batch) -> dict[str, Mean]:
        """What the step would log of all classes, of those that are no padding."""
        if self.num_classes is None:
            return {}
        return diagnostics(Outputs(z), Outputs(v), batch)

    def _fused(
        self, student: losses.LinearHead, teacher: Any, temperature: Any, batch: Batch
    ) -> Term:
        labels = batch.get("labels")
        if callable(self.ce_weight) or self.ce_weight != 0:
            labels = labels_of("LogitKD", batch)
        elif labels is not None and labels.shape != student.shape[:-1]:
            labels = None  # of something else than the positions
        total, parts = losses.fused_divergence(
            student,
            teacher,
            divergence=self.divergence,
            labels=labels,
            temperature=temperature,
            kd_weight=value_at(self.kd_weight, batch) * temperature**2,
            ce_weight=value_at(self.ce_weight, batch),
            where=batch.get("loss_mask"),
            num_classes=self.num_classes,
        )
        return Term(total, parts=parts)


@dataclass(frozen=True)
class CrossEntropy:
    """The labels alone: how a teacher is trained, and the baseline without a teacher.

    loss = cross_entropy(student, labels)

    Reference: the negative log-likelihood; label smoothing after Szegedy et al.,
    "Rethinking the Inception Architecture", CVPR 2016, section 7.

    Example:
      >>> import jax.numpy as jnp
      >>> student = Outputs(jnp.array([[0.0, 0.0]]))
      >>> terms = CrossEntropy()(student, None, {"labels": jnp.array([1])})
      >>> round(float(terms["ce"].mean().value), 4)      # log 2
      0.6931
    """

    uses_teacher: ClassVar[bool] = False

    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
    num_classes: int | None = None
    """Classes that are no padding, where the vocabulary is padded; None: all are."""

    def __post_init__(self):
        check_num_classes("CrossEntropy", self.num_classes)

    def __call__(
        self, student: Outputs, teacher: Teacher, batch: Batch
    ) -> dict[str, Term]:
        """The term ``ce``."""
        del teacher
        where = batch.get("loss_mask")
        z = logits_of("CrossEntropy", student, "student")
        labels = labels_of("CrossEntropy", batch)
        if isinstance(z, losses.LinearHead):
            total, parts = losses.fused_divergence(
                z,
                labels=labels,
                ce_weight=1.0,
                label_smoothing=self.label_smoothing,
                where=where,
                num_classes=self.num_classes,
            )
            return {"ce": Term(total, parts={k: parts[k] for k in parts if k != "ce"})}
        z = real_classes("CrossEntropy", z, self.num_classes)
        values = losses.cross_entropy(
            z, labels, label_smoothing=self.label_smoothing, where=where
        )
        parts = {} if self.num_classes is None else diagnostics(Outputs(z), None, batch)
        return {"ce": Term(values, where, parts=parts)}


__all__ = [
    "CrossEntropy",
    "Divergence",
    "LogitKD",
    "Schedule",
    "labels_of",
    "logits_of",
    "value_at",
]
