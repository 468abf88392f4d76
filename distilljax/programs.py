"""The compiled parts of a run, shared by the runs of one command.

Runs that differ only in their seed or in their data share every compiled program; arms
that differ in their objective share the teacher and the evaluation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from distilljax._checks import fail
from distilljax._functional import Forward, default_teacher_forward
from distilljax._objective import features_of
from distilljax.config import Config, to_json
from distilljax.data import Source, load_in_memory
from distilljax.data.pipeline import _fits_in_memory
from distilljax.distill import DistillState, DistillStep, make_distill_step
from distilljax.pair import Student, Teacher, key_of, make_student, starts_from_files
from distilljax.sharding import batch_axes, batch_sharding
from distilljax.teachers import CachedTeacher, Provider, StreamedTeacher
from distilljax.teachers.cached import check_unaugmented
from distilljax.teachers.part import leaves_read
from distilljax.teachers.placed import placed_teachers, teacher_meshes, unplaced, within
from distilljax.teachers.transfer import check_rows
from distilljax.workdir import placed

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
    "diagnostics",
    "student_rules",
)


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
        several = config.teacher if isinstance(config.teacher, Mapping) else {}
        if any(isinstance(one, CachedTeacher) for one in several.values()):
            fail(
                "train",
                "the teacher",
                "be one, if its signal is read from a store",
                sorted(several),
                "Learn from one of them, or have all of them in the step.",
            )
        if isinstance(config.teacher, CachedTeacher):  # it may name the model itself
            config = replace(config, teacher=unplaced(config.teacher.teacher))
        if config.teacher is None:
            return None
        key = key_of("teacher", config, TEACHER_PARTS)
        return self._once(key, lambda: Teacher.load(config, mesh))

    def student(self, config: Config, mesh: Mesh) -> Student:
        """The structure of the student, and its evaluation."""
        teacher = self.teacher(config, mesh)
        real_classes = getattr(config.objective, "num_classes", None)
        key = f"{key_of('student', config, STUDENT_PARTS)} {real_classes}"
        return self._once(key, lambda: Student(config, teacher, mesh))

    def provider(self, config: Config, mesh: Mesh, source: Source) -> Provider | None:
        """Who makes the teacher's outputs, if that is not the student's step.

        Args:
          config: The config.
          mesh: The student's devices.
          source: Its opened training data.
        """
        if not isinstance(config.teacher, CachedTeacher):
            teacher = self.teacher(config, mesh)
            if teacher is None or teacher.away is None or not uses_teacher(config):
                return None
            key = key_of("provider", config, (*TRAINING_PARTS, "loader"))
            return self._once(key, lambda: streamed(config, teacher, mesh, source))
        if not uses_teacher(config):
            return None
        check_unaugmented("train", config.loader)
        named = to_json(config.teacher) | {"teacher": None}
        key = json.dumps(["store", named], sort_keys=True)
        opened = self._once(key, config.teacher)
        if (teacher := self.teacher(config, mesh)) is not None:
            opened.check(teacher.fingerprint)
        return opened.of(source, mesh, config.teacher_rules)

    def training(
        self, config: Config, mesh: Mesh, provider: Provider | None = None
    ) -> Training:
        """The step, and the state before it."""
        student, teacher = self.student(config, mesh), self.teacher(config, mesh)
        key = key_of("training", config, TRAINING_PARTS)
        return self._once(
            key, lambda: Training(config, student, teacher, mesh, provider)
        )


def streamed(
    config: Config, teacher: Teacher, mesh: Mesh, source: Source
) -> StreamedTeacher:
    """A placed teacher as the provider of a run."""
    meshes = teacher_meshes(config.teacher, config.mesh, mesh)
    names = features_of(config.objective, "teacher")
    dtype = config.compute_dtype
    return StreamedTeacher(
        teacher.module,
        config.teacher_forward,
        mesh=meshes.get(None, meshes),
        sharding=batch_sharding(mesh),
        depth=max(part.depth for part in placed_teachers(config.teacher).values()),
        features=names or None,
        compute_dtype=None if dtype == "float32" else jnp.dtype(dtype),
        example=next(config.loader.eval_batches(source, batch_size=1)),
        fingerprint=teacher.fingerprint,
    )


def uses_teacher(config: Config) -> bool:
    """False if the objective needs no teacher: then nothing is paid for one."""
    return getattr(config.objective, "uses_teacher", True)


def forward_in_step(config: Config, teacher: Teacher | None) -> Forward:
    """The teacher's forward; of one with its own sharding, on its own mesh."""
    forward = config.teacher_forward or default_teacher_forward
    if teacher is None or teacher.mesh is None or teacher.away is not None:
        return forward
    return within(teacher.mesh, forward)


class Training:
    """The compiled step of a config and the compiled birth of its state."""

    def __init__(
        self,
        config: Config,
        student: Student,
        teacher: Teacher | None,
        mesh: Mesh,
        provider: Provider | None = None,
    ):
        self.provider = provider
        in_step = teacher is not None and provider is None and uses_teacher(config)
        make = partial(
            make_distill_step,
            config.objective,
            teacher.module if teacher is not None and in_step else None,
            teacher_head=None if provider is None else provider.head,
            student=student.abstract,
            tx=config.optimizer(),
            student_forward=student.forward,
            teacher_forward=forward_in_step(config, teacher),
            trainable=student.trainable,
            accumulate=config.accumulate,
            compute_dtype=jnp.dtype(config.compute_dtype)
            if config.compute_dtype != "float32"
            else None,
            ema_decay=config.ema_decay,
            diagnostics=config.diagnostics,
        )

        def init(seed):
            key = jax.random.key(seed)
            return make().init(config.student(nnx.Rngs(key)), rng=key)

        def init_from(arrays, seed):
            module = nnx.merge(nnx.graphdef(student.abstract), arrays)
            return make().init(module, rng=jax.random.key(seed))

        loaded = starts_from_files(config)
        like = (nnx.state(student.abstract),) if loaded else ()
        birth = init_from if loaded else init
        shapes = jax.eval_shape(birth, *like, 0)
        rules = config.student_rules
        # replicated, unless a rule says otherwise: all devices read all of a queue
        own = placed(shapes.objective_state, mesh, rules, min_size=sys.maxsize)
        placed_state = placed(replace(shapes, objective_state=None), mesh, rules)
        self.like = replace(placed_state, objective_state=own)
        shardings = jax.tree.map(lambda x: x.sharding, self.like)
        compiled = jax.jit(birth, out_shardings=shardings)

        def load(seed: int) -> DistillState:
            module = make_student(config, nnx.Rngs(jax.random.key(seed)), mesh)
            return compiled(nnx.state(module), seed)

        self.init: Callable[[int], DistillState] = load if loaded else compiled
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
        ahead = self.provider
        if isinstance(ahead, StreamedTeacher) and ahead.features is None:
            shapes = self.like, self.step.teacher_state, batch
            ahead.send_only(features_read(step, shapes), batch)
            return
        step.eval_shape(self.like, self.step.teacher_state, batch)


def features_read(step: Any, shapes: Any) -> list[str]:
    """The teacher's features that a step reads, of several with the teacher's name."""
    names = []
    for number, *path in leaves_read(step, *shapes):
        words = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        if number.idx == 2 and words[0] == "teacher" and "features" in words:
            names.append("/".join(w for w in words[1:] if w != "features"))
    return names


def batch_shapes(batch: Mapping[str, Any], count: int = 1) -> dict[str, Any]:
    """The global shapes of what is sent to the devices, from one of `count` runs."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] * count, *x.shape[1:]), x.dtype),
        {name: x for name, x in batch.items() if name != "index"},
    )


def check_sizes(
    config: Config, mesh: Mesh, devices: Sequence[Any] | None = None
) -> None:
    """Batches divide evenly over the devices, and into microbatches."""
    teachers = teacher_meshes(config.teacher, config.mesh, mesh, devices)
    parts = placed_teachers(config.teacher)
    away = [own for n, own in teachers.items() if not parts[n].in_step]
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
        for own in away:
            check_rows(name, size, batch_sharding(mesh), own)
