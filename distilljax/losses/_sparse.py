"""Teachers that are known at a few classes only: the likeliest ones, or a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distilljax._checks import check_count, check_logits, check_temperature, fail
from distilljax.losses import _numerics as numerics

# The fields are Any, as those of `distilljax.typing.Mean`: transformations rebuild the
# nodes around shapes and shardings too. Losses check them where they are used.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseLogits:
    """A teacher's likeliest classes at each position, and the mass of all others.

    A divergence compares the k classes one by one, and the others as one class, the
    tail bucket. That bounds the divergence from below, is exact at the k classes, and
    leaves the shape of the student's tail to the student.

    Attributes:
      ids: Class indices [*batch, k], integers, each class at most once per position.
      log_probs: Their log-probabilities at temperature 1 [*batch, k]. An unused slot is
        at -inf, and its id means nothing.
      log_tail: [*batch, len(temperatures)]: for each temperature T of the grid the log
        of the sum of p^(1/T) over the classes that are not in ``ids``. It cannot be had
        from the tail's mass: at T = 2 a thousand rare classes weigh more than one.
      temperatures: The grid, known when compiled.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
      >>> sparse = SparseLogits.top_k(logits, 2, temperatures=(1.0, 2.0))
      >>> sparse.ids.tolist()
      [0, 1]
      >>> [round(float(x), 4) for x in jnp.exp(sparse.log_tail)]    # 2 sqrt(1/8)
      [0.25, 0.7071]
    """

    ids: Any
    log_probs: Any
    log_tail: Any
    temperatures: tuple[float, ...] = field(default=(1.0,), metadata={"static": True})

    def __post_init__(self):
        grid = _grid("SparseLogits", self.temperatures)
        object.__setattr__(self, "temperatures", grid)

    @classmethod
    def top_k(
        cls,
        logits: Float[Array, "*batch classes"],
        k: int,
        temperatures: Sequence[float] = (1.0,),
    ) -> SparseLogits:
        """The k likeliest classes of dense logits, without gradient.

        Args:
          logits: The teacher's [*batch, classes], of any floating dtype.
          k: How many to keep, from 1 to the number of classes.
          temperatures: The grid: losses take these temperatures and no others.

        Returns:
          ids int32, the rest float32 (float64 if the logits are), likeliest first.
        """
        check_logits("SparseLogits.top_k", logits=logits)
        temperatures = _grid("SparseLogits.top_k", temperatures)
        check_count("SparseLogits.top_k", "k", k)
        classes = jnp.shape(logits)[-1]
        if not 1 <= k <= classes:
            fail(
                "SparseLogits.top_k",
                "k",
                f"lie in [1, {classes}], the number of classes",
                k,
                "Use dense logits where nothing is left out.",
            )
        dtype = numerics.compute_dtype(logits)
        logits = jax.lax.stop_gradient(jnp.asarray(logits).astype(dtype))
        log_p = jax.nn.log_softmax(logits)
        log_probs, ids = jax.lax.top_k(log_p, k)
        rest = numerics.without(log_p, ids)
        tails = [numerics.log_sum_exp(rest / t) for t in temperatures]
        return cls(ids, log_probs, jnp.stack(tails, axis=-1), temperatures)

    def renormalize(self) -> SparseLogits:
        """The same classes as if they were all: the tail's mass goes to them, by size.

        A biased target, for comparison with work that used it: a student that learns
        it is too sure of the likeliest classes by the factor that the tail is missing,
        and rules the others out. Divergences that ask the teacher about what the
        student believes, as `reverse_kl` does, are then infinite.

        Returns:
          The same ids and grid, log-probabilities that sum to 1, and an empty tail.
        """
        total = numerics.log_sum_exp(self.log_probs)
        empty = jnp.full_like(self.log_tail, -jnp.inf)
        log_probs = self.log_probs - total[..., None]
        return SparseLogits(self.ids, log_probs, empty, self.temperatures)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledLogits:
    """A sample of classes from the teacher at each position: unbiased, with noise.

    The target of class i is the sum of the weights of the draws that are i; its
    expectation is the teacher's probability, so the expected gradient of `forward_kl`
    is that of the dense teacher, for all classes. About 50 draws are enough for
    language models.

    Attributes:
      ids: Drawn classes [*batch, n], integers; a class may be there several times.
      log_weights: Logs of their weights [*batch, n]: -log n for n plain draws, and
        log(p / proposal) - log n for draws from a proposal. An unused slot is at -inf,
        and its id means nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> certain = jnp.array([0.0, -jnp.inf, -jnp.inf])
      >>> sample = SampledLogits.draw(jax.random.key(0), certain, 4)
      >>> sample.ids.tolist(), [round(float(w), 2) for w in sample.log_weights]
      ([0, 0, 0, 0], [-1.39, -1.39, -1.39, -1.39])
      >>> [round(float(w), 2) for w in sample.merge().log_weights]
      [0.0, -inf, -inf, -inf]

    Reference: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge
    Distillation in LLMs", ACL 2025, arXiv 2503.16870.
    """

    ids: Any
    log_weights: Any

    @classmethod
    def draw(
        cls,
        key: Array,
        logits: Float[Array, "*batch classes"],
        num_samples: int,
        proposal_temperature: float = 1.0,
    ) -> SampledLogits:
        """Independent draws from dense logits, with replacement, without gradient.

        Args:
          key: A key of `jax.random`.
          logits: The teacher's [*batch, classes], of any floating dtype.
          num_samples: How many draws n at each position, at least 1.
          proposal_temperature: Draw from softmax(logits / this) and correct by the
            weights; above 1 the rare classes are seen more often.

        Returns:
          ids int32 [*batch, n]; weights float32 (float64 if the logits are).
        """
        check_logits("SampledLogits.draw", logits=logits)
        check_temperature("SampledLogits.draw", proposal_temperature)
        if num_samples < 1:
            fail(
                "SampledLogits.draw",
                "num_samples",
                "be at least 1",
                num_samples,
                "About 50 draws come close to the dense teacher.",
            )
        shape = (*jnp.shape(logits)[:-1], num_samples)
        points = jax.random.uniform(key, shape, numerics.compute_dtype(logits))
        return cls.at(points, logits, proposal_temperature)

    @classmethod
    def at(
        cls,
        points: Float[Array, "*batch n"],
        logits: Float[Array, "*batch classes"],
        proposal_temperature: float = 1.0,
    ) -> SampledLogits:
        """The draws that `draw` makes of given uniform numbers.

        For numbers that belong to a position and not to the batch that it is in.

        Args:
          points: Independent and uniform in [0, 1).
          logits: As those of `draw`.
          proposal_temperature: As that of `draw`.
        """
        check_logits("SampledLogits.at", logits=logits)
        check_temperature("SampledLogits.at", proposal_temperature)
        dtype = numerics.compute_dtype(logits)
        logits = jax.lax.stop_gradient(jnp.asarray(logits).astype(dtype))
        log_p = jax.nn.log_softmax(logits)
        proposal = jax.nn.log_softmax(logits / float(proposal_temperature))
        # By the inverse of the distribution function: Gumbel noise would be an array
        # [*batch, n, classes]. A class of probability 0 has no width and is not hit.
        bounds = jnp.cumsum(jnp.exp(proposal), axis=-1)
        flat = bounds.reshape(-1, bounds.shape[-1])
        num_samples = points.shape[-1]
        total = flat[:, -1:]
        below = jnp.nextafter(total, jnp.zeros_like(total))
        points = jnp.asarray(points).astype(dtype).reshape(-1, num_samples)
        points = jnp.minimum(points * total, below)
        ids = jax.vmap(lambda a, v: jnp.searchsorted(a, v, side="right"))(flat, points)
        ids = ids.astype(jnp.int32).reshape(*bounds.shape[:-1], num_samples)
        importance = jnp.take_along_axis(log_p - proposal, ids, axis=-1)
        return cls(ids, importance - math.log(num_samples))

    def merge(self) -> SampledLogits:
        """The same target with each class once: its weights added, in the first slot.

        Returns:
          The same ids; the slots of later copies are unused, at -inf.
        """
        same = self.ids[..., :, None] == self.ids[..., None, :]
        weights = jnp.broadcast_to(self.log_weights[..., None, :], same.shape)
        nothing = jnp.full_like(weights, -jnp.inf)
        used = ~numerics.is_zero(self.log_weights)
        same = same & used[..., None, :]
        merged = numerics.log_sum_exp(jnp.where(same, weights, nothing))
        first = ~jnp.any(jnp.tril(same, -1), axis=-1) & used
        return SampledLogits(self.ids, jnp.where(first, merged, nothing[..., 0]))


def _grid(function: str, temperatures: Any) -> tuple[float, ...]:
    """Temperatures as numbers, if they are a grid."""
    numbers = isinstance(temperatures, Sequence) and not isinstance(temperatures, str)
    grid = tuple(float(t) for t in temperatures) if numbers else ()
    if not grid or not all(0 < temperature < math.inf for temperature in grid):
        fail(
            function,
            "temperatures",
            "be a tuple of positive, finite numbers, at least one",
            temperatures,
            "Use (1.0,) for the teacher's own distribution.",
        )
    return grid


Teacher: TypeAlias = Float[Array, "..."] | SparseLogits | SampledLogits
"""What a divergence takes as its teacher: dense logits, or a sparse form of them."""
