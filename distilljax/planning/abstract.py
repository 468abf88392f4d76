"""A run without arrays: its step, its teacher and its batch as shapes on a mesh."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from distilljax._capture import teacher_with_features
from distilljax._checks import fail
from distilljax._functional import freeze
from distilljax._objective import features_of
from distilljax.config import Config
from distilljax.frozen import Teacher
from distilljax.pair import Student
from distilljax.planning.topology import Topology
from distilljax.programs import Training, check_sizes, uses_teacher
from distilljax.sharding import batch_sharding, mesh_from_string
from distilljax.teachers import CachedTeacher, StreamedTeacher
from distilljax.teachers.placed import (
    beside,
    placed_teachers,
    teacher_meshes,
    unplaced,
)
from distilljax.workdir import placed


@dataclass(frozen=True)
class AbstractRun:
    """What a step is compiled from: everything but the values."""

    config: Config
    mesh: Mesh
    student: Student
    teacher: Teacher | None
    training: Training
    batch: dict[str, Any]
    """Shapes of a global batch as it comes from the data, with their sharding."""
    streamed: StreamedTeacher | None = None
    """The teacher, if it is a program of its own."""

    @property
    def step_batch(self) -> dict[str, Any]:
        """The batch as the step gets it, with what a streamed teacher sends."""
        if self.streamed is None:
            return self.batch
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.streamed.shapes(self.batch),
        )

    def lower(self) -> Any:
        """The step as `train` compiles it, lowered for these devices."""
        step: Any = self.training.step.pure
        state, teacher = self.training.like, self.training.step.teacher_state
        with jax.set_mesh(self.mesh):
            return step.lower(state, teacher, self.step_batch)


def abstract_run(config: Config, topology: Topology) -> AbstractRun:
    """The run of a config on some devices; no weight and, of text, no data is read.

    Args:
      config: What would be trained.
      topology: On what.

    Raises:
      ValueError: The config cannot be planned, or does not divide over the devices.
    """
    devices = list(topology.devices)
    _refuse_store(config.teacher)
    own_devices = beside(config.teacher, config.mesh, devices)
    mesh = mesh_from_string(config.mesh, own_devices.get("devices", devices))
    check_sizes(config, mesh, devices)
    batch = _batch(config, mesh)
    config = replace(
        config,
        teacher=without_files(config.teacher),
        student=_Fresh(without_files(config.student)),
    )
    with jax.set_mesh(mesh):
        teacher = _teacher(config, mesh, devices)
        student = Student(config, teacher, mesh)
        streamed = _streamed(config, teacher, mesh, devices, batch)
        training = Training(config, student, teacher, mesh, streamed)
        if streamed is not None:
            training.check(streamed.shapes(batch))
    return AbstractRun(config, mesh, student, teacher, training, batch, streamed)


def without_files(part: Any) -> Any:
    """A part of a config, with what is read from files replaced by its shapes alone.

    Whatever has a method `untrained` is replaced by what that returns.

    Example:
      >>> from distilljax import models, students
      >>> small = models.DecoderConfig(
      ...     vocab_size=64, width=16, num_layers=2, num_heads=2, num_kv_heads=1,
      ...     head_dim=8, ffn_width=24)
      >>> copied = students.Copied(students.Pretrained("owner/name", shape=small))
      >>> without_files(copied).source.model.width
      16
    """
    if isinstance(part, Mapping):
        return {name: without_files(one) for name, one in part.items()}
    if isinstance(part, type) or not dataclasses.is_dataclass(part):
        return part
    make = getattr(part, "untrained", None)
    if make is not None:
        return without_files(make())
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    changed = {name: without_files(x) for name, x in fields.items()}
    changed = {name: x for name, x in changed.items() if x is not fields[name]}
    changed = {name: x for name, x in changed.items() if x != fields[name]}
    return replace(part, **changed) if changed else part


@dataclass(frozen=True)
class _Fresh:
    """A student whose arrays come from no file, and need no mesh to be made."""

    student: Any

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        if "mesh" in inspect.signature(self.student).parameters:
            return self.student(rngs, None, ())
        return self.student(rngs)


def _refuse_store(teacher: Any) -> None:
    if not isinstance(teacher, CachedTeacher):
        return
    fail(
        "plan",
        "the teacher",
        "be a model",
        "a CachedTeacher, whose signal is part of the batch",
        "Plan the arm whose teacher is in the step: without it, subtract the teacher's "
        "parameters and its pass.",
    )


def _teacher(config: Config, mesh: Mesh, devices: list[Any]) -> Teacher | None:
    """The teacher with shapes for arrays, each with its sharding."""
    if config.teacher is None or not uses_teacher(config):
        return None
    own = teacher_meshes(config.teacher, config.mesh, mesh, devices)
    several = isinstance(config.teacher, Mapping)
    makes = unplaced(config.teacher)
    made = {
        name: _on_mesh(make, own.get(name, mesh), config.teacher_rules)
        for name, make in (makes if several else {None: makes}).items()
    }
    module = made if several else made[None]
    forward = config.teacher_forward
    apply, state = freeze(*teacher_with_features(module, forward))
    on, away = next(iter(own.values()), None), None
    if any(not part.in_step for part in placed_teachers(config.teacher).values()):
        away = StreamedTeacher(
            module,
            forward,
            mesh=own if several else own[None],
            sharding=batch_sharding(mesh),
            features=(),
        )
    return Teacher(module, apply, state, "planned", on, away)


def _on_mesh(make: Any, mesh: Mesh, rules: Any) -> nnx.Module:
    def build() -> Any:
        # a trained run is known by its student's config, which takes random streams
        if "rngs" in inspect.signature(make).parameters:
            return _Fresh(make)(nnx.Rngs(0))
        return make(None, ())

    module = _shapes("the teacher", build)
    nnx.update(module, placed(nnx.state(module), mesh, rules))
    return module


def _shapes(what: str, make: Any) -> nnx.Module:
    try:
        return nnx.eval_shape(make)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"plan: {what} must be made without looking at values, got an error: "
            f"{error} Give it a method untrained() that returns what makes its shapes."
        ) from error


def _streamed(
    config: Config,
    teacher: Teacher | None,
    mesh: Mesh,
    devices: list[Any],
    batch: dict[str, Any],
) -> StreamedTeacher | None:
    """The teacher as the run's provider, as `programs.streamed` makes it."""
    if teacher is None or teacher.away is None:
        return None
    meshes = teacher_meshes(config.teacher, config.mesh, mesh, devices)
    dtype = config.compute_dtype
    return StreamedTeacher(
        teacher.module,
        config.teacher_forward,
        mesh=meshes.get(None, meshes),
        sharding=batch_sharding(mesh),
        features=features_of(config.objective, "teacher") or None,
        compute_dtype=None if dtype == "float32" else jnp.dtype(dtype),
        example=batch,
    )


def _batch(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Shapes of a global batch: as the data's config says, or as its first has them."""
    example = example_shapes(config.data)
    if example is None:
        batches = config.loader.eval_batches(config.data(), batch_size=1)
        first = {name: x for name, x in next(batches).items() if name != "index"}
        example = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), first
        )
    sharding, size = batch_sharding(mesh), config.loader.batch_size
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (size, *x.shape), jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding
        ),
        example,
    )


def example_shapes(data: Any) -> dict[str, Any] | None:
    """The shapes of an example, if the data's config says them without being opened.

    Example:
      >>> from distilljax.data import Slice, text
      >>> words = text.Tokenized(text.Texts(("a",)), text.ByteTokenizer())
      >>> example_shapes(Slice(text.Packed(words, 9), 0, 4))["tokens"].shape
      (9,)
    """
    shapes = getattr(data, "shapes", None)
    if shapes is not None:
        return shapes()
    inside = getattr(data, "source", None)
    parts = getattr(data, "parts", None)
    if isinstance(parts, Mapping):
        inside = next(iter(parts.values()))
    return None if inside is None else example_shapes(inside)
