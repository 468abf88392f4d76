"""Objectives over relations: between examples, between tokens, to a crowd of others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distilljax import losses
from distilljax._checks import check_count, fail
from distilljax._functional import Batch
from distilljax._schedules import Rule, check_numbers, check_softness, check_weight
from distilljax.objectives._features import (
    FeatureLoss,
    LayerPairs,
    array_of,
    mask_for,
    names_of,
    term_of,
)
from distilljax.objectives._logits import Schedule, value_at
from distilljax.students.projection import Projection
from distilljax.terms import Outputs, Term


@dataclass(frozen=True)
class RelationKD(LayerPairs):
    """How the examples of a batch lie to each other, as the teacher sees them.

    objective = weight * mean over pairs (s, t) of loss(s, t)

    Use it where the student's features have another width and another meaning than the
    teacher's, and where what counts is who is near whom: embeddings, retrieval, a last
    hidden layer. No projection is needed. A pair of examples counts if both do.

    Losses: `rkd_distance`, `rkd_angle`, `similarity_preserving`,
    `probabilistic_transfer`, `correlation_congruence`, `embedding_relation`,
    `linear_cka`; of the channels of an image `interchannel_correlation`; of the logits
    `dist`. They look at one microbatch at a time, so accumulation changes them. Their
    values are of very different sizes, and so are their usual weights.

    Reference: Park et al., "Relational Knowledge Distillation", CVPR 2019,
    arXiv 1904.05068, equation 4.

    Example:
      >>> student = Outputs(features={"out": jnp.array([[0.0], [1.0], [3.0]])})
      >>> teacher = Outputs(features={"out": jnp.array([[0.0], [2.0], [4.0]])})
      >>> objective = RelationKD({"out": "out"}, weight=25.0)
      >>> terms = objective(student, teacher, {})
      >>> round(float(terms["out"].mean().value), 6)    # 2/9 (1/32 + 1/32)
      0.013889
    """

    loss: FeatureLoss = losses.rkd_distance
    """`(student, teacher, where=mask) -> value of the batch`, or one per example. The
    default knows the whole form of the cloud but for its size, needs no temperature,
    and is usually given the weight 25."""
    weight: float | Schedule = 1.0
    """Weight of the mean over the pairs of layers."""
    flatten: bool = False
    """Make one point of each example, of all its values: for feature maps of images.
    Else every position is a point of its own. `interchannel_correlation` takes maps as
    they are."""

    def __call__(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Term]:
        """One term for each pair of layers, named by the path in the student."""
        weight = value_at(self.weight, batch) / len(self.layers)
        terms = {}
        for names in self.layers.items():
            # zeros in padding: an example that counts may have some
            s, v = (_unpadded(x, batch) for x in self._pair(student, teacher, names))
            if self.flatten:
                s, v = (jnp.reshape(x, (x.shape[0], -1)) for x in (s, v))
            with _flatten_in_errors(s):
                term = term_of("RelationKD", self.loss, s, v, batch, weight)
            terms[names[0]] = term
        return terms


@contextlib.contextmanager
def _flatten_in_errors(features: Array) -> Iterator[None]:
    """Add to what a loss says of images how they become points."""
    try:
        yield
    except ValueError as error:
        if features.ndim > 3:
            error.add_note("(RelationKD(..., flatten=True) makes a point of an image.)")
        raise


def _unpadded(x: Array, batch: Batch) -> Array:
    """Features with zeros where the mask is false."""
    mask = mask_for("RelationKD", batch, x.shape[:-1])
    return x if mask is None else jnp.where(mask[..., None], x, 0)


@dataclass(frozen=True)
class AttentionKD(LayerPairs):
    """Where each token looks, as the teacher does.

    objective = weight * mean over pairs (s, t) of loss(s, t)

    For transformers. With the default loss, MiniLM v2, the pairs are the outputs of the
    query, key and value projections of *one* layer on each side: the student's last and
    the teacher's last or one a little below. Widths and numbers of heads may differ.
    `attention_map_kl` compares the maps themselves, which need as many heads, and are
    features that the attention sows or the forward returns.

    Reference: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation
    for Compressing Pretrained Transformers", Findings of ACL 2021, arXiv 2012.15828,
    equations 3 to 6.

    Example:
      >>> student = Outputs(features={"query": jnp.zeros((1, 2, 4))})
      >>> teacher = Outputs(features={"query": jnp.array([[[1.0, 0.0], [0.0, 1.0]]])})
      >>> objective = AttentionKD({"query": "query"}, num_relation_heads=1)
      >>> terms = objective(student, teacher, {})
      >>> round(float(terms["query"].values[0, 0]), 4)  # log 2 + .67 log .67 + ...
      0.0588
    """

    loss: FeatureLoss = losses.attention_relation
    """`attention_relation`; or `(student, teacher, where=mask) -> [batch, time]`."""
    weight: float | Schedule = 1.0
    """Weight of the mean over the pairs."""
    num_relation_heads: int | None = None
    """Heads into which queries, keys and values are cut; None: the loss has none."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_relation_heads is not None:
            check_count("AttentionKD", "num_relation_heads", self.num_relation_heads)
        elif self.loss is losses.attention_relation:
            fail(
                "AttentionKD",
                "num_relation_heads",
                "be given for attention_relation",
                None,
                "It divides the widths of both models; 48 is common for base models.",
            )

    def __call__(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Term]:
        """One term for each pair, named by the path in the student."""
        weight = value_at(self.weight, batch) / len(self.layers)

        def loss(s: Array, v: Array, *, where: Array | None = None) -> Array:
            if self.num_relation_heads is None:
                return self.loss(s, v, where=where)
            s, v = (_heads_side_by_side(x) for x in (s, v))
            heads = self.num_relation_heads
            return self.loss(s, v, num_relation_heads=heads, where=where)

        terms = {}
        for names in self.layers.items():
            s, v = self._pair(student, teacher, names)
            terms[names[0]] = term_of("AttentionKD", loss, s, v, batch, weight)
        return terms


def _heads_side_by_side(x: Array) -> Array:
    """[batch, time, heads, width of one], as NNX has it, as [batch, time, width]."""
    return jnp.reshape(x, (*x.shape[:2], -1))


@dataclass(frozen=True)
class ContrastiveKD:
    """Each example finds its own teacher among those of others.

    objective = weight * contrastive(student_head(s), teacher_head(t), queue)

    Use it to learn representations: it keeps what tells examples apart, and lets go of
    the rest. Both sides are projected, the student's by a learned map and the teacher's
    by a fixed random one, to the width of the queue: teachers of past batches, which
    are further negatives and the state of this objective.

    Reference: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR
    2020, arXiv 1910.10699, section 3.

    Example:
      >>> objective = ContrastiveKD("out", "out", 3, 5, width=2, queue_size=8)
      >>> params = objective.init_params(jax.random.key(0))
      >>> state = objective.init_state()
      >>> student = Outputs(features={"out": jnp.ones((4, 3))})
      >>> teacher = Outputs(features={"out": jnp.eye(4, 5)})
      >>> terms, seen = objective(student, teacher, {}, params=params, state=state)
      >>> seen = jax.tree.map(lambda x: x[None], seen)         # of one microbatch
      >>> int(objective.next_state(state, seen)["queue"].count)
      4
    """

    rules: ClassVar[Mapping[str, Rule]] = {
        "temperature": check_softness,
        "weight": check_weight,
    }

    student_layer: str
    """Path of the student's feature, [batch, width]."""
    teacher_layer: str
    """Path of the teacher's feature, [batch, width]."""
    student_width: int
    """Width of the student's feature."""
    teacher_width: int
    """Width of the teacher's feature."""
    width: int = 128
    """Width in which they are compared."""
    queue_size: int = 16384
    """Teachers of past batches that are kept; well below the size of the data set."""
    temperature: float | Schedule = 0.07
    """Low ones look at the nearest rivals only."""
    weight: float | Schedule = 1.0
    """Weight of the term."""

    def __post_init__(self):
        check_numbers(self)
        for name in ("student_width", "teacher_width", "width", "queue_size"):
            check_count("ContrastiveKD", name, getattr(self, name))

    @property
    def student_features(self) -> tuple[str, ...]:
        """What the step is to capture of the student."""
        return names_of([self.student_layer])

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """What the step is to capture of the teacher."""
        return names_of([self.teacher_layer])

    def init_params(self, rng: Array) -> dict[str, Any]:
        """The student's projection."""
        head = Projection(self.student_width, self.width)
        return {"projection": head.init(rng)}

    def init_state(self) -> dict[str, Any]:
        """An empty queue, and the teacher's projection, which stays as it is."""
        head = Projection(self.teacher_width, self.width, use_bias=False)
        return {
            "queue": losses.MemoryQueue.init(size=self.queue_size, width=self.width),
            "teacher": head.init(jax.random.key(0)),
        }

    def __call__(
        self,
        student: Outputs,
        teacher: Any,
        batch: Batch,
        *,
        params: Mapping[str, Any],
        state: Mapping[str, Any],
    ) -> tuple[dict[str, Term], dict[str, Array]]:
        """The term `contrastive`; and the teachers of this batch, for the queue."""
        s = array_of("ContrastiveKD", student, self.student_layer, "student")
        v = array_of("ContrastiveKD", teacher, self.teacher_layer, "teacher")
        where = mask_for("ContrastiveKD", batch, s.shape[:-1])
        if where is not None:
            s, v = (jnp.where(where[..., None], x, 0) for x in (s, v))
        s = Projection(self.student_width, self.width)(params["projection"], s)
        head = Projection(self.teacher_width, self.width, use_bias=False)
        v = head(state["teacher"], v)
        values = losses.contrastive(
            s,
            v,
            temperature=value_at(self.temperature, batch),
            queue=state["queue"],
            where=where,
        )
        weight = value_at(self.weight, batch)
        counts = jnp.ones(v.shape[:-1], bool) if where is None else where
        terms = {"contrastive": Term(values, where, weight)}
        return terms, {"rows": v, "where": counts}

    def next_state(
        self, state: Mapping[str, Any], seen: Mapping[str, Array]
    ) -> dict[str, Any]:
        """The queue with the teachers of all microbatches."""
        queue = state["queue"].update(seen["rows"], where=seen["where"])
        return {**state, "queue": queue}


__all__ = ["AttentionKD", "ContrastiveKD", "RelationKD"]
