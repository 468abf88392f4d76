"""The distillation step. If you read one file of distilljax, read this one.

    objective(student, teacher, batch) -> {name: Term}

is what a user writes: per-position values, the mask under which they count, a weight.
The step runs both models, reduces every term by its own global count, differentiates
once, and updates the student. Where the teacher's outputs come from, it does not know.

`_loss` is the loss; `_gradients` adds gradient accumulation; `_update` is one step.
What an objective may have besides its call is said in `_objective.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from distilljax import _objective
from distilljax._capture import Student, bind_student, teacher_with_features
from distilljax._functional import (
    Batch,
    Forward,
    PyTree,
    cast_batch,
    cast_floating,
    default_forward,
    freeze,
    key_of,
    split_batch,
    split_module,
)
from distilljax._in_place import InPlaceStep
from distilljax._objective import Objective
from distilljax.state import DistillState
from distilljax.terms import (
    DIAGNOSTICS,
    Outputs,
    Term,
    as_outputs,
    as_teacher,
    complete_teacher,
    diagnostics,
    reduce_terms,
    refuse_reserved_keys,
    refuse_reserved_names,
    shard_outputs,
)
from distilljax.typing import Mean, Metrics


@dataclass(frozen=True)
class DistillStep:
    """One compiled step of distillation. Made by `make_distill_step`.

    `step.pure(state, teacher_state, batch) -> (state, metrics)` is the compiled step
    over pytrees; `step(student, optimizer, batch) -> metrics` is the same for an NNX
    module and an `nnx.Optimizer`, which it updates in place.
    """

    objective: Objective
    student_forward: Forward
    teacher_apply: Callable[[PyTree, Batch], Any] | None
    teacher_state: PyTree
    student: nnx.Module | None
    tx: optax.GradientTransformation | None
    trainable: Any
    accumulate: int
    compute_dtype: Any
    ema_decay: float | None
    state_shardings: PyTree
    batch_axes: Any
    diagnostics: bool

    def _loss(
        self,
        params: PyTree,
        rest: PyTree,
        batch: Batch,
        rng: Array,
        counts: Mapping[str, Array] | None,
        *,
        model: Student,
        state: DistillState,
        teacher_state: PyTree,
    ) -> tuple[Array, tuple[PyTree, dict[str, Mean], dict[str, Array], PyTree]]:
        """The loss of one (micro)batch; `counts` are the denominators, if known."""
        refuse_reserved_keys(batch, self.teacher_apply)
        seen = cast_batch(batch, self.compute_dtype)
        own = params["objective"] if self.has_params else None
        weights = cast_floating(self.student_of(params), self.compute_dtype)
        outputs, rest = model.apply(weights, rest, seen, rng)
        student = as_outputs(outputs)
        teacher = as_teacher(batch.get("teacher"))
        if self.teacher_apply is not None:
            teacher = as_teacher(self.teacher_apply(teacher_state, seen))
        teacher = jax.lax.stop_gradient(shard_outputs(teacher, self.batch_axes))
        view = {**batch, "step": state.step}
        if _objective.uses_average(self.objective):
            weights = cast_floating(self.student_of(state.ema), self.compute_dtype)
            average = as_outputs(model.infer(weights, state.rest, seen))
            average = shard_outputs(average, self.batch_axes)
            view["average"] = jax.lax.stop_gradient(average)
        terms, noted = _objective.evaluate(
            self.objective, student, teacher, view, own, state.objective_state
        )
        loss, metrics = reduce_terms(terms, counts)
        counts = {name: mean.count for name, mean in metrics.items()}
        always = jax.lax.stop_gradient(diagnostics(student, teacher, batch, terms))
        refuse_reserved_names(terms, always)
        # what is not returned is not compiled either
        unread = set() if self.diagnostics else DIAGNOSTICS - terms.keys()
        metrics = {k: x for k, x in (metrics | always).items() if k not in unread}
        return loss, (rest, metrics, counts, jax.lax.stop_gradient(noted))

    def _gradients(
        self, model: Student, state: DistillState, teacher_state: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree, Array, dict[str, Mean], PyTree]:
        """The gradient over the whole batch, in `accumulate` microbatches."""
        key = jax.random.fold_in(key_of(state.rng), state.step)
        rngs = jax.random.split(key, self.accumulate)
        given = {"model": model, "state": state, "teacher_state": teacher_state}
        loss = partial(self._loss, **given)
        gradient = jax.value_and_grad(loss, has_aux=True)
        if self.accumulate == 1:
            args = (state.params, state.rest, batch, rngs[0], None)
            (total, (rest, metrics, _, noted)), grads = gradient(*args)
            return grads, rest, total, metrics, jax.tree.map(lambda x: x[None], noted)

        parts = split_batch(batch, self.accumulate)

        # First pass: only the denominators. They come from the masks, so the compiler
        # drops the models from this pass (a mask that does depend on them stays exact).
        def count(part, rng):
            return loss(state.params, state.rest, part, rng, None)[1][2]

        counts = jax.lax.map(lambda xs: count(*xs), (parts, rngs))
        counts = jax.tree.map(lambda x: jnp.sum(x, axis=0), counts)

        # Second pass: each microbatch divided by the count of the whole batch.
        def accumulate(carry, xs):
            grads, rest = carry
            (total, aux), new = gradient(state.params, rest, *xs, counts)
            rest, metrics, _, noted = aux
            return (jax.tree.map(jnp.add, grads, new), rest), (total, metrics, noted)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (grads, rest), (total, metrics, noted) = jax.lax.scan(
            accumulate, (zeros, state.rest), (parts, rngs)
        )
        total, metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), (total, metrics))
        return grads, rest, total, metrics, noted

    def _update(
        self,
        model: Student,
        tx: optax.GradientTransformation,
        state: DistillState,
        teacher_state: PyTree,
        batch: Batch,
    ) -> tuple[DistillState, Metrics]:
        found = self._gradients(model, state, teacher_state, batch)
        grads, rest, loss, metrics, noted = found
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if self.ema_decay is not None:
            ema = optax.incremental_update(params, ema, 1.0 - self.ema_decay)
        metrics["loss"] = Mean(loss, jnp.ones(()))
        metrics["grad_norm"] = Mean(optax.tree.norm(grads), jnp.ones(()))
        own = _objective.next_state(self.objective, state.objective_state, noted)
        new = DistillState(params, rest, opt_state, state.step + 1, state.rng, ema, own)
        return new, Metrics.of(metrics)

    def init(
        self,
        student: nnx.Module | PyTree,
        *,
        rest: PyTree = None,
        rng: Array | None = None,
    ) -> DistillState:
        """The state before the first step. Pure: may run under `jax.jit`, on a mesh.

        The arrays are copies: the first step overwrites them, and the student given
        here stays as it is.

        Args:
          student: The module, or the trainable pytree of a model that is not one.
          rest: Other arrays of a pytree model; see `make_distill_step`.
          rng: Key of the random stream of a pytree model, and of the parameters of the
            objective, if it has any; key(0) if None.
        """
        if isinstance(student, nnx.Module):
            self._require(self.student, "student")
            _, params, rest = split_module(student, self.trainable, training=True)
        else:
            params = student
        params, rest = jax.tree.map(jnp.copy, (params, rest))
        key = jax.random.key(0) if rng is None else rng
        if self.has_params:
            own = _objective.init_params(self.objective, key)
            params = {"student": params, "objective": own}
        return DistillState(
            params=params,
            rest=rest,
            opt_state=self._require(self.tx, "tx").init(params),
            step=jnp.zeros((), jnp.int32),
            rng=jax.random.key_data(key),
            # a copy: parameters and average are both donated to the next step
            ema=None if self.ema_decay is None else jax.tree.map(jnp.copy, params),
            objective_state=_objective.init_state(self.objective),
        )

    @cached_property
    def has_params(self) -> bool:
        """True if the objective has parameters of its own to train."""
        return _objective.has_params(self.objective)

    def student_of(self, params: PyTree) -> PyTree:
        """The student's own part of `state.params` or `state.ema`."""
        return params["student"] if self.has_params else params

    def _bind(self, graphdef: nnx.GraphDef | None) -> Student:
        """The student's pure functions; of a pytree, if there is no graph."""
        forward = self.student_forward
        return bind_student(graphdef, self.trainable, forward, self.objective)

    @cached_property
    def pure(self) -> Callable[..., tuple[DistillState, Metrics]]:
        """`state, metrics = step.pure(state, teacher_state, batch)`, compiled.

        `state` is donated: its buffers become those of the new state.
        """
        graphdef = None
        if self.student is not None:
            graphdef, _, _ = split_module(self.student, self.trainable, training=True)
        tx = self._require(self.tx, "tx")
        update = partial(self._update, self._bind(graphdef), tx)
        # The state keeps its shardings, so the second step is the same program.
        shardings = (self.state_shardings, None)
        return jax.jit(update, donate_argnums=0, out_shardings=shardings)

    def __call__(
        self, student: nnx.Module, optimizer: nnx.Optimizer, batch: Batch
    ) -> Metrics:
        """Update the student and the optimizer in place; return the metrics."""
        return self._in_place(student, optimizer, batch)

    @cached_property
    def _in_place(self) -> InPlaceStep:
        return InPlaceStep(
            lambda graphdef, *args: self._update(self._bind(graphdef), *args),
            self.objective,
            self.trainable,
            self.teacher_state,
            keeps_ema=self.ema_decay is not None,
        )

    @property
    def ema(self) -> PyTree:
        """A copy of the moving average, for a student updated in place; None before."""
        return jax.tree.map(jnp.copy, self._in_place.ema)

    def load_ema(self, ema: PyTree) -> None:
        """Go on from a saved `ema`, for a student that is updated in place."""
        self._in_place.ema = jax.tree.map(jnp.copy, ema)

    @property
    def wrt(self) -> Any:
        """The filter of the optimizer's `wrt`: what is trained of what is passed."""
        return self._in_place.wrt

    @property
    def objective_state(self) -> PyTree:
        """The objective's state where modules are updated in place; None without."""
        return self._in_place.objective_state

    def load_objective_state(self, state: PyTree) -> None:
        """Go on from a saved `objective_state`, in a loop that updates in place."""
        self._in_place.load_objective_state(state)

    def _require(self, value: Any, name: str) -> Any:
        if value is None:
            raise ValueError(
                f"DistillStep: {name} must be given to make_distill_step to use "
                f"step.init or step.pure, got None. Pass {name}=..., or call "
                "step(student, optimizer, batch) with an NNX module."
            )
        return value


def make_distill_step(
    objective: Objective,
    teacher: nnx.Module | PyTree | None = None,
    *,
    student_forward: Forward | None = None,
    teacher_forward: Forward | None = None,
    teacher_head: Any = None,
    student: nnx.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    trainable: Any = nnx.Param,
    accumulate: int = 1,
    compute_dtype: Any | None = None,
    ema_decay: float | None = None,
    state_shardings: PyTree | None = None,
    batch_axes: Any | None = None,
    diagnostics: bool = True,
) -> DistillStep:
    """Make the step that trains a student on a teacher's outputs.

    The teacher is frozen: put in inference mode, outside the gradient, passed to the
    compiled step as an argument and never returned by it.

    Args:
      objective: `(student, teacher, batch) -> {name: Term}`, see `objectives`. In the
        batch it sees, `step` is the number of updates made so far, for schedules.
      teacher: An `nnx.Module`, any pytree (with `teacher_forward`), or None if the
        objective needs no teacher or the batch has its outputs under `teacher`. A dict
        of modules is several teachers, whose outputs arrive under their names.
      student_forward: `(model, batch) -> Outputs | logits`. For a student that is no
        NNX module: `(params, batch)`; or `(params, rest, batch, rng) -> (outputs,
        rest)` if `init` was given a `rest`. Default: `model(batch["inputs"])`, or
        `model(batch["tokens"], positions, segment_ids)`.
      teacher_forward: The same for the teacher; the default prefers
        `batch["teacher_inputs"]` where the data has them.
      teacher_head: The kernels of `batch["teacher"]`, where that has hidden states
        alone: what `terms.split_heads` keeps, and a provider of `teachers` has.
      student: The student's structure for `step.pure`: a module, abstract or real; None
        for a pytree, and for `step(student, optimizer, batch)`.
      tx: The optimizer, for `step.init` and `step.pure`.
      trainable: NNX filter of what is trained; all else of the student is frozen.
      accumulate: Number of microbatches. Gradients equal those of the whole batch:
        every term is divided by its count over all of them.
      compute_dtype: Type of the forward passes (`jnp.bfloat16`): parameters and inputs
        are cast to it. Parameters themselves, batch statistics, gradients and losses
        stay float32.
      ema_decay: Decay of a moving average of the parameters; None keeps none.
      state_shardings: Shardings of the `DistillState`, as a pytree of it.
      batch_axes: Mesh axes over which the batch is sharded; the teacher's outputs are
        held to it. Needs a mesh set by `jax.set_mesh`.
      diagnostics: Whether to compute `terms.DIAGNOSTICS`, which no loss needs.

    Returns:
      The step: `step(student, optimizer, batch)`, or `step.pure(state,
      step.teacher_state, batch)` with `state = step.init(student)`.

    Example:
      >>> from distilljax import objectives
      >>> teacher, student = (nnx.Linear(4, 3, rngs=nnx.Rngs(i)) for i in range(2))
      >>> optimizer = nnx.Optimizer(student, optax.adam(0.1), wrt=nnx.Param)
      >>> step = make_distill_step(objectives.LogitKD(ce_weight=0.0), teacher)
      >>> batch = {"inputs": jnp.eye(4)}
      >>> kl = [step(student, optimizer, batch)["kl"].value for _ in range(100)]
      >>> bool(kl[-1] < 0.01 * kl[0])
      True
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(
            f"make_distill_step: accumulate must be at least 1 and whole, got "
            f"{accumulate}. It is the number of microbatches in a batch."
        )
    _objective.check_average(objective, ema_decay)
    apply, state = complete_teacher if teacher_head else None, teacher_head
    if teacher is not None:
        names = _objective.features_of(objective, "teacher")
        captured = teacher_with_features(teacher, teacher_forward, names)
        apply, state = freeze(*captured, compute_dtype)
    return DistillStep(
        objective=objective,
        student_forward=student_forward or default_forward,
        teacher_apply=apply,
        teacher_state=state,
        student=student,
        tx=tx,
        trainable=trainable,
        accumulate=accumulate,
        compute_dtype=compute_dtype,
        ema_decay=ema_decay,
        state_shardings=state_shardings,
        batch_axes=batch_axes,
        diagnostics=diagnostics,
    )


__all__ = [
    "DistillState",
    "DistillStep",
    "Objective",
    "Outputs",
    "Term",
    "make_distill_step",
    "reduce_terms",
]
