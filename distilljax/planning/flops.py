"""How many operations a step takes: those of its models, and those that it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax
from flax import nnx

from distilljax._functional import module_infer, split_module
from distilljax.evaluation.flops import count_flops
from distilljax.losses import LinearHead
from distilljax.planning.abstract import AbstractRun
from distilljax.terms import as_outputs


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of one step, over all devices."""

    teacher: int
    """Of its forward pass with logits: 2 per parameter and token, and attention."""
    student: int
    """Of its forward and backward pass: three times its forward pass."""
    executed: int
    """Of the step as it is traced: with what is computed again (remat, the logits of
    the fused loss)."""

    @property
    def model(self) -> int:
        """What MFU counts: the teacher once, the student thrice, nothing twice."""
        return self.teacher + self.student

    def to_json(self) -> dict[str, int]:
        """All of it."""
        return asdict(self) | {"model": self.model}


def step_flops(run: AbstractRun) -> Flops:
    """The operations of a step, counted from what is traced.

    The teacher of a run that streams it is counted too, though it is in another
    program.
    """
    batch = _without_shardings(run.batch)
    student = 3 * _forward_flops(run, batch)
    teacher = 0
    if (frozen := run.teacher) is not None:
        teacher = count_flops(
            lambda state, batch: _logits(frozen.apply(state, batch)),
            _without_shardings(frozen.state),
            batch,
        )
    step: Any = run.training.step.pure
    state, theirs = run.training.like, run.training.step.teacher_state
    with jax.set_mesh(run.mesh):
        executed = count_flops(step, state, theirs, run.step_batch)
    return Flops(teacher, student, executed)


def _forward_flops(run: AbstractRun, batch: Any) -> int:
    """Of the student's forward pass, its logits included."""
    infer, params, rest = _student(run)
    return count_flops(lambda p, r, b: _logits(infer(p, r, b)), params, rest, batch)


def has_head(run: AbstractRun) -> bool:
    """Whether the student's logits are a `LinearHead`, and not an array."""
    infer, params, rest = _student(run)
    batch = _without_shardings(run.batch)
    made = jax.eval_shape(lambda *args: as_outputs(infer(*args)), params, rest, batch)
    return isinstance(made.logits, LinearHead)


def _student(run: AbstractRun) -> tuple[Any, Any, Any]:
    """The student's forward pass, and the shapes of what it is called with."""
    graphdef, params, rest = split_module(
        run.student.abstract, run.student.trainable, training=False
    )
    infer = module_infer(graphdef, run.student.forward)
    return infer, _without_shardings(params), _without_shardings(rest)


def _logits(outputs: Any) -> Any:
    """All outputs as arrays, with the product that a head stands for."""
    if isinstance(outputs, dict):
        return {name: _logits(one) for name, one in outputs.items()}
    found = as_outputs(outputs)
    if isinstance(found.logits, LinearHead):
        return found.logits.logits(), found.features
    return found.logits, found.features


def _without_shardings(tree: Any) -> Any:
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
