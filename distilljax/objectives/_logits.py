"""What the model says: its distribution, or the labels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Array

from distilljax import losses
from distilljax._checks import check_between, check_count, check_logits
from distilljax._functional import Batch
from distilljax._schedules import Rule, check_numbers, check_softness, check_weight
from distilljax.objectives._signals import (
    Divergence,
    by_position,
    check_num_classes,
    check_tempered,
    labels_of,
    logits_of,
    options_of,
    real_classes,
)
from distilljax.terms import Outputs, Teacher, Term, diagnostics
from distilljax.typing import Mean

Schedule = Callable[[Any], Any]


def value_at(value: float | Schedule, batch: Batch) -> Any:
    """A number, or what a schedule gives at ``batch["step"]``.

    Example:
      >>> value_at(2.0, {}), value_at(lambda step: 0.5 * step, {"step": 8})
      (2.0, 4.0)
    """
    return value(batch["step"]) if callable(value) else value


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

    rules: ClassVar[Mapping[str, Rule]] = {
        "temperature": check_softness,
        "kd_weight": check_weight,
        "ce_weight": check_weight,
    }

    temperature: float | Schedule = 1.0
    """Softens both distributions; 1 is the models' own."""
    kd_weight: float | Schedule = 1.0
    """Weight of the teacher's term, before T^2."""
    ce_weight: float | Schedule = 0.0
    """Weight of the cross-entropy with the labels, at temperature 1; 0 needs none."""
    divergence: Divergence = losses.forward_kl
    """Any position-wise loss of logits in `distilljax.losses`: it gets the temperature,
    and the labels where it takes them; one without a temperature is for T = 1."""
    num_classes: int | None = None
    """Classes that are no padding, where the two vocabularies are padded, perhaps to
    different sizes; None: all count, and the sizes must agree."""
    standardize: bool = False
    """Compare the logits of both by `losses.standardize_logits`: the student need not
    reach the teacher's scale. The cross-entropy, which then sets it, is of its own."""
    chunk_tokens: int | None = None
    """Positions whose logits are made at a time, where these are of a `LinearHead`, on
    each device; None chooses. See `losses.fused_divergence`."""

    def __post_init__(self):
        check_num_classes("LogitKD", self.num_classes)
        if self.chunk_tokens is not None:
            check_count("LogitKD", "chunk_tokens", self.chunk_tokens)
        check_numbers(self)
        options = self._options()
        if callable(self.temperature) or self.temperature != 1:
            check_tempered(
                "LogitKD",
                self.divergence,
                options,
                "Leave temperature at 1 for it, or use a divergence between "
                "distributions, such as losses.forward_kl.",
            )

    def _options(self) -> frozenset[str]:
        return options_of("LogitKD", self.divergence, ("temperature", "labels"))

    def __call__(
        self, student: Outputs, teacher: Teacher, batch: Batch
    ) -> dict[str, Term]:
        """The terms ``kd`` and, where it has a weight, ``ce``."""
        where = batch.get("loss_mask")
        temperature = value_at(self.temperature, batch)
        z = logits_of("LogitKD", student, "student")
        v = logits_of("LogitKD", teacher, "teacher")
        own = {}
        if "labels" in self._options():
            remedy = "The divergence needs them, whatever ce_weight is."
            own["labels"] = labels_of("LogitKD", batch, remedy)
        if isinstance(z, losses.LinearHead) and not (own and self.standardize):
            return {"logit_kd": self._fused(z, v, temperature, batch)}
        z, v = (real_classes("LogitKD", x, self.num_classes) for x in (z, v))
        divergence = by_position("LogitKD", self._divergence())
        soft = divergence(z, v, temperature=temperature, where=where, **own)
        kd_weight = value_at(self.kd_weight, batch) * temperature**2
        terms = {"kd": Term(soft, where, kd_weight, self._parts(z, v, batch))}
        if callable(self.ce_weight) or self.ce_weight != 0:
            hard = hard_term(z, labels_of("LogitKD", batch), where)
            ce_weight = value_at(self.ce_weight, batch)
            terms["ce"] = replace(hard, weight=ce_weight, parts={})
        return terms

    def _divergence(self) -> Divergence:
        """The divergence as a function of logits as they are, and of a temperature."""
        takes_temperature = "temperature" in self._options()
        if takes_temperature and not self.standardize:
            return self.divergence

        def compared(
            z: Any, v: Any, *, temperature: Any, where: Any, **own: Any
        ) -> Array:
            if self.standardize:
                check_logits("LogitKD", student=z, teacher=v)
                z, v = (losses.standardize_logits(x, where=where) for x in (z, v))
            if takes_temperature:
                own["temperature"] = temperature
            return self.divergence(z, v, where=where, **own)

        return compared

    def _parts(self, z: Any, v: Any, batch: Batch) -> dict[str, Mean]:
        """What the step would log of all classes, of those that are no padding."""
        if self.num_classes is None:
            return {}
        return diagnostics(Outputs(z), Outputs(v), batch)

    def _fused(
        self, student: losses.LinearHead, teacher: Any, temperature: Any, batch: Batch
    ) -> Term:
        labels = batch.get("labels")
        asked = "labels" in self._options() or callable(self.ce_weight)
        if asked or self.ce_weight != 0:
            labels = labels_of("LogitKD", batch)
        elif labels is not None and labels.shape != student.shape[:-1]:
            labels = None  # of something else than the positions
        total, parts = losses.fused_divergence(
            student,
            teacher,
            divergence=self._divergence(),
            labels=labels,
            temperature=temperature,
            kd_weight=value_at(self.kd_weight, batch) * temperature**2,
            ce_weight=value_at(self.ce_weight, batch),
            where=batch.get("loss_mask"),
            num_classes=self.num_classes,
            chunk_tokens=self.chunk_tokens,
        )
        return Term(total, parts=parts)


def hard_term(
    z: Any,
    labels: Array,
    where: Any,
    *,
    label_smoothing: float = 0.0,
    num_classes: int | None = None,
) -> Term:
    """The cross-entropy with labels; over a head in one pass, whose parts it has."""
    if not isinstance(z, losses.LinearHead):
        values = losses.cross_entropy(
            z, labels, label_smoothing=label_smoothing, where=where
        )
        return Term(values, where)
    total, parts = losses.fused_divergence(
        z,
        labels=labels,
        ce_weight=1.0,
        label_smoothing=label_smoothing,
        where=where,
        num_classes=num_classes,
    )
    return Term(total, parts={k: parts[k] for k in parts if k != "ce"})


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
        check_between("CrossEntropy", "label_smoothing", self.label_smoothing, 0, 1)

    def __call__(
        self, student: Outputs, teacher: Teacher, batch: Batch
    ) -> dict[str, Term]:
        """The term ``ce``."""
        del teacher
        z = logits_of("CrossEntropy", student, "student")
        remedy = "Give the source labels, or learn from a teacher."
        labels = labels_of("CrossEntropy", batch, remedy)
        is_head = isinstance(z, losses.LinearHead)
        if not is_head:
            z = real_classes("CrossEntropy", z, self.num_classes)
        term = hard_term(
            z,
            labels,
            batch.get("loss_mask"),
            label_smoothing=self.label_smoothing,
            num_classes=self.num_classes,
        )
        if self.num_classes is not None and not is_head:
            term = replace(term, parts=diagnostics(Outputs(z), None, batch))
        return {"ce": term}


__all__ = ["CrossEntropy", "LogitKD", "Schedule", "hard_term", "value_at"]
