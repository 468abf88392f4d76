"""The compiled parts of a run, shared by the runs of one command.

Runs that differ only in their seed or in their data share every compiled program; arms
that differ in their objective share the teacher and the evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from distilljax._checks import fail
from distilljax._functional import (
    default_forward,
    default_teacher_forward,
    freeze,
    module_apply,
    split_module,
)
from distilljax.config import Config, to_json
from distilljax.data import load_in_memory
from distilljax.data.pipeline import _fits_in_memory
from distilljax.distill import DistillState, DistillStep, make_distill_step
from distilljax.evaluation.cost import cost
from distilljax.evaluation.evaluate import Evaluator
from distilljax.sharding import BATCH_AXES, tree_shardings
from distilljax.terms import as_outputs
from distilljax.workdir import fingerprint


# The fields of a config that each of them depends on.
TEACHER_PARTS = ("teacher", "teacher_forward", "teacher_rules", "mesh")
STUDENT_PARTS = (*TEACHER_PARTS, "student", "student_forward", "trainable")
TRAINING_PARTS = (
    *STUDENT_PARTS,
    "objective",
    "optimizer",
    "accumulate",
    "compute_dtype",
    "ema_decay",
    "student_rules",
)


def _key(what: str, config: Config, fields: tuple[str, ...]) -> str:
    parts = {name: to_json(getattr(config, name)) for name in fields}
    return json.dumps([what, parts], sort_keys=True)


@dataclass(frozen=True)
class Programs:
    """A cache of what is compiled or loaded once, by the config's parts that decide it.

    Pass one to several calls of `train` to share compilations between them.
    """

    _made: dict[str, Any] = field(default_factory=dict)

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def source(self, part: Any) -> Any:
        """An opened source; kept in memory for the next run, if it is small."""
        key = json.dumps(["source", to_json(part)], sort_keys=True)

        def open_source():
            source = part()
            return load_in_memory(source) if _fits_in_memory(source) else source

        return self._once(key, open_source)

    def teacher(self, config: Config, mesh: Mesh) -> Teacher | None:
        """The teacher of a config, loaded onto the mesh; None if it has none."""
        if config.teacher is None:
            return None
        key = _key("teacher", config, TEACHER_PARTS)
        return self._once(key, lambda: Teacher.load(config, mesh))

    def student(self, config: Config, mesh: Mesh) -> Student:
        """The structure of the student, and its evaluation."""
        teacher = self.teacher(config, mesh)
        key = _key("student", config, STUDENT_PARTS)
        return self._once(key, lambda: Student(config, teacher, mesh))

    def training(self, config: Config, mesh: Mesh) -> Training:
        """The step, and the state before it."""
        student, teacher = self.student(config, mesh), self.teacher(config, mesh)
        key = _key("training", config, TRAINING_PARTS)
        return self._once(key, lambda: Training(config, student, teacher, mesh))


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher: its module, its pure form, and the digest of its arrays."""

    module: nnx.Module
    apply: Callable[[Any, Any], Any]
    state: Any
    fingerprint: str

    @classmethod
    def load(cls, config: Config, mesh: Mesh) -> Teacher:
        """Build it with the config's own call, onto the mesh."""
        module = config.teacher(mesh, config.teacher_rules)
        apply, state = freeze(module, config.teacher_forward)
        return cls(module, apply, state, fingerprint(state))


class Student:
    """The structure of a student, without arrays, and what is measured of it."""

    def __init__(self, config: Config, teacher: Teacher | None, mesh: Mesh):
        self.trainable = config.trainable or nnx.Param
        self.abstract = nnx.eval_shape(lambda: config.student(nnx.Rngs(0)))
        self.forward = config.student_forward or default_forward
        self.evaluator = Evaluator(
            self.abstract,
            None if teacher is None else teacher.apply,
            mesh=mesh,
            student_forward=self.forward,
            trainable=self.trainable,
        )
        self._costs: dict[str, Any] = {}

    def check_batch(self, config: Config, teacher: Teacher | None, batch: Any) -> None:
        """Student and teacher have the same classes, found without any compute."""
        graphdef, params, rest = split_module(
            self.abstract, self.trainable, training=False
        )
        apply = module_apply(graphdef, self.trainable, self.forward)
        key = jax.random.key(0)
        z = jax.eval_shape(lambda p, r, b: apply(p, r, b, key)[0], params, rest, batch)
        z = as_outputs(z).logits
        if teacher is None or z is None:
            return
        v = as_outputs(jax.eval_shape(teacher.apply, teacher.state, batch)).logits
        if v is not None and v.shape[-1] != z.shape[-1]:
            fail(
                "train",
                "the teacher",
                f"have the student's classes, {z.shape[-1]}",
                v.shape[-1],
                f"Change the student of {config.name!r}, or name another teacher with "
                "--teacher.workdir.",
            )

    def cost(self, state: DistillState, params: Any, example: Any) -> dict[str, Any]:
        """Size and speed of the student, measured once."""
        if "student" not in self._costs:
            graphdef, _, _ = split_module(self.abstract, self.trainable, training=False)

            def forward(arrays, x):
                model = nnx.merge(graphdef, *arrays, copy=True)
                return as_outputs(self.forward(model, {"inputs": x})).logits

            everything = (params, state.rest)
            self._costs["student"] = cost(forward, everything, params, example)
        return self._costs["student"]

    def teacher_cost(self, teacher: Teacher, example: Any) -> dict[str, Any]:
        """Size and speed of the teacher, measured once, in the same process."""
        if "teacher" not in self._costs:
            params = nnx.to_pure_dict(nnx.state(teacher.module, nnx.Param))

            def forward(state, x):
                return as_outputs(teacher.apply(state, {"inputs": x})).logits

            self._costs["teacher"] = cost(forward, teacher.state, params, example)
        return self._costs["teacher"]


class Training:
    """The compiled step of a config and the compiled birth of its state."""

    def __init__(
        self, config: Config, student: Student, teacher: Teacher | None, mesh: Mesh
    ):
        # an objective that needs no teacher does not pay for one
        uses_teacher = getattr(config.objective, "uses_teacher", True)
        make = partial(
            make_distill_step,
            config.objective,
            teacher.module if teacher is not None and uses_teacher else None,
            student=student.abstract,
            tx=config.optimizer(),
            student_forward=student.forward,
            teacher_forward=config.teacher_forward or default_teacher_forward,
            trainable=student.trainable,
            accumulate=config.accumulate,
            compute_dtype=jnp.dtype(config.compute_dtype)
            if config.compute_dtype != "float32"
            else None,
            ema_decay=config.ema_decay,
        )

        def init(seed):
            return make().init(config.student(nnx.Rngs(jax.random.key(seed))))

        abstract = jax.eval_shape(init, 0)
        self._mesh = mesh
        self.shardings = tree_shardings(abstract, mesh, config.student_rules)
        self.init: Callable[[int], DistillState] = jax.jit(
            init, out_shardings=self.shardings
        )
        self.like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            self.shardings,
        )
        self.step: DistillStep = make(
            state_shardings=self.shardings, batch_axes=BATCH_AXES
        )

    @cached_property
    def update(self) -> Callable[..., Any]:
        """`state, metrics = update(state, batch)`, compiled once for the whole run."""
        pure, teacher_state = self.step.pure, self.step.teacher_state
        return lambda state, batch: pure(state, teacher_state, batch)
