"""What training changes, and what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from distilljax._functional import PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DistillState:
    """All that training changes, as pytrees of arrays: save this, resume exactly.

    Attributes:
      params: What is trained: the student's parameters; or, for an objective that has
        parameters of its own, `{"student": ..., "objective": ...}`.
      rest: The student's other arrays: frozen parameters, batch statistics, random
        streams.
      opt_state: State of the optimizer.
      step: Number of updates made, int32 scalar.
      rng: Key data, uint32, of the random stream of pytree models (an NNX module has
        its own).
      ema: Exponential moving average of `params`, or None.
      objective_state: State of the objective, such as a queue; None if it has none.
    """

    # Any: in a pytree of shapes or shardings, these are not arrays
    params: PyTree
    rest: PyTree
    opt_state: PyTree
    step: Any
    rng: Any
    ema: PyTree = None
    objective_state: PyTree = None
