"""Objectives over features: what layers return, and not what the model says."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distilljax import losses
from distilljax._checks import check_positive, fail
from distilljax._functional import Batch
from distilljax._schedules import Rule, check_numbers, check_weight
from distilljax.objectives._logits import Schedule, value_at
from distilljax.students.projection import Projection
from distilljax.terms import Outputs, Term

# (student, teacher, where=mask) -> values
FeatureLoss = Callable[..., Float[Array, "..."]]


def feature_of(function: str, outputs: Any, name: str, whose: str) -> Any:
    """A feature by its name; `logits` are one too."""
    if not isinstance(outputs, Outputs):
        fail(
            function,
            f"the {whose}",
            "have features",
            "several teachers" if isinstance(outputs, Mapping) else "no outputs",
            "Give the step a teacher; of several, choose one with MultiTeacher("
            "objective, combine=Only(name)).",
        )
    known = dict(outputs.features)
    if outputs.logits is not None:
        known = {"logits": outputs.logits, **known}
    if name not in known:
        fail(
            function,
            f"the {whose}'s features",
            f"have {name!r}",
            sorted(known),
            "make_distill_step captures the paths that its objective names; for "
            "outputs of your own, return Outputs(logits, features={...}) with it.",
        )
    return known[name]


def array_of(function: str, outputs: Any, name: str, whose: str) -> Array:
    """A feature by its name, which is an array and no head or sparse signal."""
    feature = feature_of(function, outputs, name, whose)
    if dataclasses.is_dataclass(feature):
        fail(
            function,
            f"the {whose}'s feature {name!r}",
            "be an array",
            type(feature).__name__,
            "LogitKD compares logits that are never whole, position by position; to "
            "have them whole, of a small model, return Outputs(head, "
            "features={'logits': head.logits()}).",
            TypeError,
        )
    return feature


def names_of(names: Any) -> tuple[str, ...]:
    """The names that are to be captured: all but the logits."""
    return tuple(name for name in dict.fromkeys(names) if name != "logits")


def mask_for(
    function: str, batch: Batch, shape: tuple[int, ...]
) -> Bool[Array, "..."] | None:
    """`batch["loss_mask"]` in this shape, that of a result or of rows of features.

    An image counts in all its places; an example counts if one of its positions does.
    """
    mask = batch.get("loss_mask")
    if mask is None:
        return None
    shared = min(len(shape), mask.ndim)
    if mask.shape[:shared] != shape[:shared]:
        fail(
            function,
            "batch['loss_mask']",
            f"begin as the features do, {shape}",
            mask.shape,
            "One value belongs to each example, or to each position of it. The layers "
            "of a scan, stacked along the first axis, are named one by one: "
            "{'blocks/0': 'blocks/0'}.",
        )
    mask = jnp.asarray(mask) != 0
    if mask.ndim > len(shape):
        mask = jnp.any(mask, axis=tuple(range(len(shape), mask.ndim)))
    mask = jnp.expand_dims(mask, tuple(range(mask.ndim, len(shape))))
    return jnp.broadcast_to(mask, shape)


def term_of(
    function: str, loss: FeatureLoss, s: Array, v: Array, batch: Batch, weight: Any
) -> Term:
    """The term of one pair: per position or example, or one value of a whole batch."""
    result = jax.eval_shape(loss, s, v).shape
    coupled = result == ()
    where = mask_for(function, batch, s.shape[:-1] if coupled else result)
    values = loss(s, v, where=where)
    return Term(values, None if coupled else where, weight)


def check_layers(function: str, layers: Mapping[str, str]) -> None:
    """At least one pair of names."""
    if not isinstance(layers, Mapping) or not layers:
        fail(
            function,
            "layers",
            "map features of the student to those of the teacher",
            repr(layers),
            "Pass {'blocks/3': 'blocks/11'}; evenly_spaced(num_student, num_teacher) "
            "says which belong together.",
        )


@dataclass(frozen=True)
class LayerPairs:
    """Pairs of layers: {path in the student: path in the teacher}."""

    rules: ClassVar[Mapping[str, Rule]] = {"weight": check_weight}

    layers: Mapping[str, str]
    """Features of the student and those of the teacher that they learn from, by the
    paths of their modules, such as {"blocks/3": "blocks/11"}; "logits" are one too."""

    def __post_init__(self):
        check_layers(type(self).__name__, self.layers)
        check_numbers(self)

    @property
    def student_features(self) -> tuple[str, ...]:
        """What the step is to capture of the student."""
        return names_of(self.layers)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """What the step is to capture of the teacher."""
        return names_of(self.layers.values())

    def _pair(
        self, student: Outputs, teacher: Any, names: tuple[str, str]
    ) -> tuple[Array, Array]:
        function = type(self).__name__
        return (
            array_of(function, student, names[0], "student"),
            array_of(function, teacher, names[1], "teacher"),
        )


@dataclass(frozen=True)
class FeatureKD(LayerPairs):
    """Hidden states that are like the teacher's, layer by layer.

    objective = weight * mean over pairs (s, t) of loss(projection(s), t)

    Use it beside `LogitKD` when the student has a layer for a layer of the teacher:
    early in training hidden states say more than the logits do. Features of different
    widths need a `projection`, which is learned with the student and discarded.

    Losses: `hidden_mse`, `hidden_cosine`, `activation_boundary`; of images also
    `attention_transfer` and `neuron_selectivity`, which need no projection; and
    `variational_information`, with `variance`. Bind other arguments in a function.

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
    arXiv 1412.6550, equation 3; Jiao et al., "TinyBERT", Findings of EMNLP 2020,
    arXiv 1909.10351, equation 9.

    Example:
      >>> student = Outputs(features={"hidden": jnp.array([[1.0, 2.0]])})
      >>> teacher = Outputs(features={"hidden": jnp.array([[1.0, 4.0]])})
      >>> terms = FeatureKD({"hidden": "hidden"})(student, teacher, {})
      >>> float(terms["hidden"].mean().value)          # (0 + 4) / 2
      2.0
    """

    loss: FeatureLoss = losses.hidden_mse
    """`(student, teacher, where=mask) -> values`; of `distilljax.losses`, or yours."""
    weight: float | Schedule = 1.0
    """Weight of the mean over the pairs."""
    projection: Projection | Mapping[str, Projection] | None = None
    """Learned map of the student's features, one set of parameters for each pair: one
    spec for all pairs, or one by the student's path; None compares them as they are."""
    variance: float | None = None
    """For losses with `raw_scale`: initial variance of the teacher's channels, learned;
    needs a projection, which knows their number."""

    def __post_init__(self):
        super().__post_init__()
        known = self.projection if isinstance(self.projection, Mapping) else self.layers
        if unknown := sorted(known.keys() - self.layers.keys()):
            fail(
                "FeatureKD",
                "projection",
                f"name features of layers, {', '.join(self.layers)}",
                unknown[0],
                "Its keys are the paths in the student.",
            )
        self._check_variance()

    def _check_variance(self) -> None:
        """It is there for losses that learn it, and for no others."""
        accepted = inspect.signature(self.loss).parameters
        learned = accepted.get("raw_scale")
        rest = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        if self.variance is None:
            if learned is not None and learned.default is learned.empty:
                fail(
                    "FeatureKD",
                    "variance",
                    "be given for a loss with raw_scale",
                    None,
                    "5.0 is a common start.",
                )
            return
        check_positive("FeatureKD", "variance", self.variance, "5.0 is a common start.")
        if learned is None and not rest:
            fail(
                "FeatureKD",
                "variance",
                "be None for a loss without raw_scale",
                self.variance,
                "losses.variational_information learns it.",
            )
        if any(self._projection(name) is None for name in self.layers):
            fail(
                "FeatureKD",
                "variance",
                "be None without a projection for each pair",
                self.variance,
                "Pass projection=Projection(student_width, teacher_width).",
            )

    def _projection(self, name: str) -> Projection | None:
        if isinstance(self.projection, Mapping):
            return self.projection.get(name)
        return self.projection

    def init_params(self, rng: Array) -> dict[str, Any]:
        """Parameters of the projections, by the path in the student."""
        params = {}
        keys = jax.random.split(rng, len(self.layers))
        for key, name in zip(keys, self.layers, strict=True):
            projection = self._projection(name)
            if projection is None:
                continue
            params[name] = {"projection": projection.init(key)}
            if self.variance is not None:
                raw = jnp.log(jnp.expm1(jnp.float32(self.variance)))
                params[name]["raw_scale"] = jnp.full(projection.teacher_width, raw)
        return params

    def __call__(
        self,
        student: Outputs,
        teacher: Any,
        batch: Batch,
        *,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Term]:
        """One term for each pair, named by the path in the student."""
        weight = value_at(self.weight, batch) / len(self.layers)
        terms = {}
        for names in self.layers.items():
            s, v = self._pair(student, teacher, names)
            loss, own = self.loss, (params or {}).get(names[0], {})
            projection = self._projection(names[0])
            if projection is not None:
                # nan times a gradient of 0 would reach the kernel
                mask = mask_for("FeatureKD", batch, s.shape[:-1])
                s = s if mask is None else jnp.where(mask[..., None], s, 0)
                s = projection(own["projection"], s)
            if "raw_scale" in own:
                loss = _bound(loss, own["raw_scale"])
            terms[names[0]] = term_of("FeatureKD", loss, s, v, batch, weight)
        return terms


def _bound(loss: FeatureLoss, raw_scale: Array) -> FeatureLoss:
    def with_scale(s: Array, v: Array, *, where: Array | None = None) -> Array:
        return loss(s, v, raw_scale=raw_scale, where=where)

    return with_scale
