"""The compiled parts of a run, shared by the runs of one command.

Runs that differ only in their seed or in their data share every compiled program; arms
that differ in their objective share the teacher and the evaluation.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilljax._capture import teacher_with_features
from distilljax._checks import fail, inputs_in_errors
from distilljax._functional import (
    default_forward,
    default_teacher_forward,
    freeze,
    module_apply,
    split_module,
)
from distilljax.config import Config, to_json
from distilljax.data import Source, load_in_memory, prefetch_to_device
from distilljax.data.pipeline import _fits_in_memory
from distilljax.data.prefetch import this_process
from distilljax.distill import DistillStep, make_distill_step
from distilljax.evaluation.cost import Model, costs
from distilljax.evaluation.evaluate import Evaluation, Evaluator
from distilljax.sharding import batch_axes, batch_sharding, tree_shardings
from distilljax.terms import as_one_teacher, as_outputs, as_teacher
from distilljax.workdir import fingerprint, placed

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

# Under which key an evaluation finds them in its batches; no example has such a key.
TEACHER_LOGITS = "the teacher's logits"
# Of one source, they stay on the devices; more are computed again each time.
KEPT_BYTES = 2**28


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

    def source(self, part: Any, loader: Any = None) -> Source:
        """An opened source; kept in memory for the next run, as its loader says."""
        in_memory = getattr(loader, "in_memory", None)
        for name in ("transforms", "eval_transforms"):
            if getattr(loader, name, None):
                in_memory = False  # as it is stored, it may not be arrays
        key = json.dumps(["source", to_json(part), in_memory], sort_keys=True)

        def open_source():
            source = part()
            keep = in_memory
            if keep is None:
                keep = len(source) > 0 and _fits_in_memory(source)
            return load_in_memory(source) if keep else source

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

    module: Any  # or a dict of several
    apply: Callable[[Any, Any], Any]
    state: Any
    fingerprint: str

    def logits(self, state: Any, batch: Any) -> Any:
        """Its logits, of several teachers those of their mean; None if it has none."""
        one = as_one_teacher(as_teacher(self.apply(state, batch)))
        return None if one is None else one.logits

    @classmethod
    def load(cls, config: Config, mesh: Mesh) -> Teacher:
        """Build it with the config's own call, onto the mesh."""
        rules = config.teacher_rules
        if isinstance(config.teacher, Mapping):
            module = {name: make(mesh, rules) for name, make in config.teacher.items()}
        else:
            module = config.teacher(mesh, rules)
        # what was built elsewhere would be sent again in every step
        arrays = nnx.state(_one_module(module))
        shardings = tree_shardings(arrays, mesh, rules)
        nnx.update(_one_module(module), jax.device_put(arrays, shardings))
        apply, state = freeze(*teacher_with_features(module, config.teacher_forward))
        return cls(module, apply, state, fingerprint(state))


def _one_module(teacher: Any) -> Any:
    """Several teachers by name as one module."""
    return nnx.Dict(teacher) if isinstance(teacher, Mapping) else teacher


class Student:
    """The structure of a student, without arrays, and what is measured of it."""

    def __init__(self, config: Config, teacher: Teacher | None, mesh: Mesh):
        self.trainable = config.trainable or nnx.Param
        self.abstract = nnx.eval_shape(lambda: config.student(nnx.Rngs(0)))
        self.forward = config.student_forward or default_forward
        self.teacher = teacher
        self.real_classes = getattr(config.objective, "num_classes", None)
        self._sharding = batch_sharding(mesh)
        self._evaluator = Evaluator(
            self.abstract,
            None if teacher is None else lambda _, batch: batch[TEACHER_LOGITS],
            mesh=mesh,
            student_forward=self.forward,
            trainable=self.trainable,
            num_classes=self.real_classes,
        )
        self._costs: dict[str, Any] = {}
        self._kept: dict[Any, list[Any]] = {}
        if teacher is not None:
            self._teacher_logits = jax.jit(teacher.logits, out_shardings=self._sharding)

    def num_classes(self, batch: Any) -> int | None:
        """How many classes it knows, found without compute; None without logits.

        Args:
          batch: Shapes of a batch.
        """
        graphdef, params, rest = split_module(
            self.abstract, self.trainable, training=False
        )
        apply = module_apply(graphdef, self.trainable, self.forward)
        key = jax.random.key(0)
        with inputs_in_errors("student", batch):
            z = jax.eval_shape(
                lambda p, r, b: apply(p, r, b, key)[0], params, rest, batch
            )
        z = as_outputs(z).logits
        return None if z is None else min(z.shape[-1], self.real_classes or z.shape[-1])

    def check(self, config: Config, num_classes: int | None, batch: Any) -> None:
        """Its teacher has the same classes, and those in focus exist; without compute.

        Args:
          config: The config, for messages.
          num_classes: How many the student has.
          batch: Shapes of a batch.
        """
        if num_classes is None:
            return
        outside = [c for c in config.focus_classes if not 0 <= c < num_classes]
        if outside:
            fail(
                "train",
                "--focus-classes",
                f"lie in [0, {num_classes}), the classes of the student",
                ", ".join(map(str, outside)),
                "Classes count from 0.",
            )
        if self.teacher is None:
            return
        with inputs_in_errors("teacher", batch):
            v = jax.eval_shape(self.teacher.logits, self.teacher.state, batch)
        known = (
            None if v is None else min(v.shape[-1], self.real_classes or v.shape[-1])
        )
        if known not in (None, num_classes):
            fail(
                "train",
                "the teacher",
                f"have the student's classes, {num_classes}",
                known,
                f"Change the student of {config.name!r}, or name another teacher with "
                "--teacher.workdir.",
            )

    def arrays(self, field: str) -> dict[str, Any]:
        """What of a checkpoint is measured: shapes of `params` or `ema`, and `rest`."""
        _, params, rest = split_module(self.abstract, self.trainable, training=False)
        return {field: params, "rest": rest}

    def evaluate(
        self, config: Config, params: Any, rest: Any, source: Source
    ) -> Evaluation:
        """Quality of these parameters, and of the teacher, on a source."""
        batches = config.loader.eval_batches(
            source,
            batch_size=config.eval_batch_size,
            **this_process(self._sharding),
        )
        sent = (batch for batch, _ in prefetch_to_device(batches, self._sharding))
        if self.teacher is not None:
            # sources are kept open: an id is that of one of them alone
            key = id(source), _key("batches", config, ("loader", "eval_batch_size"))
            sent = self._beside_teacher(self.teacher, sent, key)
        return self._evaluator(params, rest, None, sent)

    def _beside_teacher(
        self, teacher: Teacher, batches: Iterable[Any], key: Any
    ) -> Iterator[Any]:
        """The batches with the teacher's logits: it is frozen, and so is run once."""
        kept = self._kept.get(key, [])
        found, size = [], 0
        for number, batch in enumerate(batches):
            if kept:
                logits = kept[number]
            else:
                logits = self._teacher_logits(teacher.state, batch)
            jax.block_until_ready(logits)  # simulated devices run one program at a time
            size += sum(x.nbytes for x in jax.tree.leaves(logits))
            found = [*found, logits] if size <= KEPT_BYTES else []
            yield {**batch, TEACHER_LOGITS: logits}
        self._kept[key] = found

    def measure(
        self, config: Config, params: Any, rest: Any, source: Source
    ) -> tuple[dict[str, Any], bytes]:
        """Quality and cost of student and teacher; every prediction, as npz."""
        found = self.evaluate(config, params, rest, source)
        example = next(config.loader.eval_batches(source, batch_size=1))["inputs"]
        cost = self._cost(params, rest, example)
        student = {**found.student, **cost["student"]}
        arrays: dict[str, Any] = {"labels": found.labels}
        arrays["student"] = found.student_predictions
        teacher = None
        if self.teacher is not None and found.teacher is not None:
            teacher = {**found.teacher, **cost["teacher"]}
            arrays["teacher"] = found.teacher_predictions
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        num_classes = len(found.student["per_class"]["count"])
        names = getattr(source, "class_names", None) or range(num_classes)
        return {
            "num_examples": found.student["num_examples"],
            "class_names": [str(name) for name in names],
            "student": student,
            "teacher": teacher,
        }, buffer.getvalue()

    def _cost(self, params: Any, rest: Any, example: Any) -> dict[str, Any]:
        """Size and speed of student and teacher, measured once, and in turn."""
        if not self._costs:
            graphdef, _, _ = split_module(self.abstract, self.trainable, training=False)

            def student(arrays, x):
                model = nnx.merge(graphdef, *arrays, copy=True)
                return as_outputs(self.forward(model, {"inputs": x})).logits

            models = {"student": Model(student, (params, rest), params)}
            if (teacher := self.teacher) is not None:
                own = nnx.to_pure_dict(
                    nnx.state(_one_module(teacher.module), nnx.Param)
                )
                models["teacher"] = Model(
                    lambda state, x: teacher.logits(state, {"inputs": x}),
                    teacher.state,
                    own,
                )
            self._costs = costs(models, example)
        return self._costs


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
            key = jax.random.key(seed)
            return make().init(config.student(nnx.Rngs(key)), rng=key)

        shapes = jax.eval_shape(init, 0)
        rules = config.student_rules
        # replicated, unless a rule says otherwise: all devices read all of a queue
        own = placed(shapes.objective_state, mesh, rules, min_size=sys.maxsize)
        like = placed(replace(shapes, objective_state=None), mesh, rules)
        self.like = replace(like, objective_state=own)
        shardings = jax.tree.map(lambda x: x.sharding, self.like)
        self.init = jax.jit(init, out_shardings=shardings)
        axes = batch_axes(mesh)
        self.step: DistillStep = make(state_shardings=shardings, batch_axes=axes)

    @cached_property
    def update(self) -> Callable[..., Any]:
        """`state, metrics = update(state, batch)`, compiled once for the whole run."""
        pure, teacher_state = self.step.pure, self.step.teacher_state
        return lambda state, batch: pure(state, teacher_state, batch)

    def check(self, batch: Any) -> None:
        """Trace the step, so that what the objective objects to is said before compute.

        Args:
          batch: Shapes of a batch.
        """
        step: Any = self.step.pure
        step.eval_shape(self.like, self.step.teacher_state, batch)


def batch_shapes(
    batch: Mapping[str, np.ndarray], count: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """The global shapes of what is sent to the devices, from one of `count` runs."""
    return {
        name: jax.ShapeDtypeStruct((x.shape[0] * count, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
        if name != "index"
    }


def check_sizes(config: Config, mesh: Mesh) -> None:
    """Batches divide evenly over the devices, and into microbatches."""
    shards = prod(mesh.shape[axis] for axis in batch_axes(mesh))
    for name, size, parts in (
        ("loader.batch_size", config.loader.batch_size, config.accumulate),
        ("eval_batch_size", config.eval_batch_size, 1),
    ):
        if size % (shards * parts):
            times = f" times accumulate={parts}" if parts > 1 else ""
            fail(
                "train",
                name,
                f"be a multiple of data x fsdp = {shards} devices{times}",
                size,
                f"Change it, accumulate, or the mesh, {config.mesh!r}.",
            )
