"""Contrastive distillation: pick your own teacher out of a crowd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_features, check_temperature, check_where, fail
from distilljax.losses import _features as features
from distilljax.losses import _numerics as numerics
from distilljax.losses import _shards as shards
from distilljax.typing import Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryQueue:
    """The teacher's features of past batches, as negatives for `contrastive`.

    An immutable value that a loop carries from step to step, like an optimizer's state:
    `init` makes it, and `update` returns the next one. Its arrays never change shape.

    Attributes:
      features: [size, width], float32: directions, of length 1; 0 in empty slots.
      count: How many slots are filled, int32.
      pointer: The slot that is written next, the oldest one once all are filled, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> queue = MemoryQueue.init(size=4, width=2)
      >>> queue = queue.update(jnp.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]))
      >>> queue = queue.update(jnp.array([[0.0, 5.0], [-1.0, 0.0]]))   # once round
      >>> queue.features.round(1).tolist()
      [[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
      >>> int(queue.count), int(queue.pointer)
      (4, 1)
    """

    # Any, because transformations rebuild this node around whatever they carry: shapes
    # (jax.eval_shape), shardings, placeholders. The shape checker would refuse those.
    features: Any
    count: Any
    pointer: Any

    @staticmethod
    def init(*, size: int, width: int) -> MemoryQueue:
        """An empty queue for ``size`` features of the teacher's (projected) width."""
        for argument, value in (("size", size), ("width", width)):
            if value < 1:
                fail("MemoryQueue.init", argument, "be at least 1", value, "Try 16384.")
        zero = jnp.zeros((), jnp.int32)
        return MemoryQueue(jnp.zeros((size, width), jnp.float32), zero, zero)

    def update(
        self,
        teacher: Float[Array, "*batch width"],
        *,
        where: Shaped[Array, "..."] | None = None,
        axis_name: shards.AxisName | None = None,
    ) -> MemoryQueue:
        """The queue with a batch of features written over the oldest ones.

        Call it *after* the loss of that batch: before, each anchor would find its own
        teacher among its negatives.

        Args:
          teacher: Features [*batch, width]; their directions are stored, detached.
          where: Mask [*batch]; rows where it is false are not stored.
          axis_name: As in `contrastive`: the rows of all shards are stored, in the
            order of the batch, and every shard returns the same queue. Outside
            `jax.shard_map`, where the batch is whole, it is not needed.
        """
        name = "MemoryQueue.update"
        check_features(name, features.ANY, teacher=teacher)
        check_where(name, where, jnp.shape(teacher)[:-1])
        mask = numerics.as_mask(where)
        rows = features.settled(teacher, mask, self.features.dtype)
        rows = features.direction(features.rows_of(jax.lax.stop_gradient(rows)))
        rows = shards.gather(rows, axis_name)
        size, width = self.features.shape
        if rows.shape[1] != width or len(rows) > size:
            fail(
                name,
                "teacher",
                f"have at most {size} rows of the queue's width, {width}",
                f"{len(rows)} rows of width {rows.shape[1]}",
                "Make a larger queue, or store every other row.",
            )
        if mask is None:
            rank, stored = jnp.arange(len(rows)), jnp.asarray(len(rows))
            slots = (self.pointer + rank) % size
        else:
            mask = shards.gather(mask.reshape(-1), axis_name)
            rank, stored = jnp.cumsum(mask) - 1, jnp.sum(mask)
            slots = jnp.where(mask, (self.pointer + rank) % size, size)
        return MemoryQueue(
            self.features.at[slots].set(rows, mode="drop"),
            jnp.minimum(self.count + stored, size).astype(jnp.int32),
            ((self.pointer + stored) % size).astype(jnp.int32),
        )


def contrastive(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 0.07,
    queue: MemoryQueue | None = None,
    where: Shaped[Array, "..."] | None = None,
    axis_name: shards.AxisName | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy of finding one's own teacher among all teachers, in nats.

    contrastive[i] = -log(exp(c[i, i] / T) / sum over j of exp(c[i, j] / T))
    c[i, j] = cos(student of i, teacher of j)

    for all j in the batch, and all slots of the queue. It asks that an example can be
    told from the others, not that its vectors agree: the loss of the teacher itself is
    above 0. The mutual information that it bounds is at most log(number of rivals), so
    it wants a large batch, gathered over shards, or a queue.

    Args:
      student: Features [*batch, width], usually a learned projection to 64 to 256
        dimensions; the axes of the batch are one list of examples. Gets the gradient.
      teacher: Features of the same shape; gets none, nor does a projection on its side.
      temperature: T > 0; may be traced. Low ones look at the nearest rivals only.
      queue: Teachers of past batches, as further negatives. None: this batch alone.
        Size it well below the data set: an example that returns is its own rival.
      where: Mask [*batch], such as [batch] or [batch, time]; an example where it is
        false is nobody's rival, and its value and gradient are exactly 0.
      axis_name: Axis, or axes, of the mesh over which the batch is split, inside
        `jax.shard_map`: the teachers of all shards are rivals, and each shard returns
        the values of its own anchors. The queue is the same on all of them.

    Returns:
      [*batch], float32 (float64 if an input is), one value for each anchor.

    Numerics: Computed as softplus of the log-sum-exp over the rivals less the anchor's
    own logit, which keeps its digits when the loss is small. A vector of zeros has the
    cosine 0 with all.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> teacher = jnp.array([[2.0, 0.0], [0.0, 3.0]])
      >>> values = contrastive(student, teacher, temperature=1.0)
      >>> [round(float(value), 4) for value in values]    # log(1 + 1/e), log(1 + e)
      [0.3133, 1.3133]

    Reference: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR
    2020, arXiv 1910.10699, section 3, with the InfoNCE estimator of van den Oord, Li,
    Vinyals 2018, arXiv 1807.03748. The paper's own loss is noise-contrastive: a binary
    decision for each of 16384 negatives from a memory of all examples of the data set,
    with a constant estimated from the first batch, and both sides as anchors.
    """
    name = "contrastive"
    lead = jnp.ndim(student) - 1
    s, t, mask = features.prepare(
        name, "batch ... width", student, teacher, where, lead=lead
    )
    check_temperature(name, temperature)
    if queue is not None and queue.features.shape[-1] != s.shape[-1]:
        fail(
            name,
            "queue",
            f"hold features of the width of student, {s.shape[-1]}",
            queue.features.shape[-1],
            "Make it with MemoryQueue.init(size=..., width=...) of that width.",
        )
    s, t = (features.direction(features.rows_of(x)) for x in (s, t))
    own = jnp.sum(s * t, axis=-1)
    rivals, present = _rivals(t, mask, queue, axis_name)
    cosines = jnp.matmul(s, rivals.T, precision=features.PRECISE)
    temperature = numerics.positive_as(s.dtype, temperature)
    # Far below any logit, and finite, so that an anchor without rivals has gradient 0.
    absent = jnp.finfo(s.dtype).min / 2
    crowd = jax.nn.logsumexp(jnp.where(present, cosines / temperature, absent), axis=-1)
    values = jax.nn.softplus(crowd - own / temperature)
    return numerics.zero_masked(values.reshape(student.shape[:-1]), mask)


def _rivals(
    teacher: Float[Array, "n d"],
    mask: Array | None,
    queue: MemoryQueue | None,
    axis_name: shards.AxisName | None,
) -> tuple[Float[Array, "m d"], Shaped[Array, "n m"]]:
    """All teachers, and for each anchor which of them are there and not its own."""
    count = len(teacher)
    everyone = shards.gather(teacher, axis_name)
    own = jnp.arange(count, dtype=jnp.int32) + shards.first_row(count, axis_name)
    present = jnp.arange(len(everyone), dtype=jnp.int32)[None, :] != own[:, None]
    if mask is not None:
        present &= shards.gather(mask.reshape(-1), axis_name)[None, :]
    if queue is None:
        return everyone, present
    past = jax.lax.stop_gradient(queue.features).astype(teacher.dtype)
    filled = jnp.arange(len(past)) < queue.count
    filled = jnp.broadcast_to(filled[None, :], (count, len(past)))
    return jnp.concatenate([everyone, past]), jnp.concatenate([present, filled], axis=1)
