"""The frozen teacher of a run: where it lies, what it says, what identifies it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from distilljax._capture import teacher_with_features
from distilljax._checks import inputs_in_errors
from distilljax._functional import freeze
from distilljax.config import Config
from distilljax.sharding import Rule, batch_sharding, tree_shardings
from distilljax.teachers import StreamedTeacher
from distilljax.teachers.placed import placed_teachers, teacher_meshes
from distilljax.terms import as_one_teacher, as_teacher, complete_teacher
from distilljax.workdir import fingerprint


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher: its module, its pure form, and the digest of its arrays."""

    module: Any  # or a dict of several
    apply: Callable[[Any, Any], Any]
    state: Any
    fingerprint: str
    mesh: Mesh | None = None  # its own, if it is not the student's
    away: StreamedTeacher | None = None  # the same, if it is no part of the step

    def beside(self) -> Teacher:
        """It where the student is: of one that is away, only its head."""
        if self.away is None:
            return self
        return dataclasses.replace(self, apply=complete_teacher, state=None, away=None)

    def on_one_mesh(self) -> Any:
        """Its state; that of several, each on devices of its own, is brought there."""
        devices = [x.sharding.device_set for x in jax.tree.leaves(self.state)]
        if self.mesh is None or all(own == devices[0] for own in devices):
            return self.state
        return jax.device_put(self.state, tree_shardings(self.state, self.mesh))

    def logits(self, state: Any, batch: Any) -> Any:
        """Its logits, of several teachers those of their mean; None if it has none."""
        one = as_one_teacher(as_teacher(self.apply(state, batch)))
        return None if one is None else one.logits

    def num_classes(self, batch: Any) -> int | None:
        """How many classes it knows, found without compute; None without logits."""
        with inputs_in_errors("teacher", batch):
            found = jax.eval_shape(self.logits, self.state, batch)
        return None if found is None else found.shape[-1]

    @classmethod
    def load(cls, config: Config, mesh: Mesh) -> Teacher:
        """Build it with the config's own call, onto the mesh."""
        rules, forward = config.teacher_rules, config.teacher_forward
        own = teacher_meshes(config.teacher, config.mesh, mesh)
        several = isinstance(config.teacher, Mapping)
        makes = config.teacher if several else {None: config.teacher}
        made = {
            name: _on_mesh(make, own.get(name, mesh), rules)
            for name, make in makes.items()
        }
        module = made if several else made[None]
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
        return cls(module, apply, state, fingerprint(state), on, away)


def _on_mesh(make: Any, mesh: Mesh, rules: Sequence[Rule]) -> nnx.Module:
    """A teacher on a mesh: by these rules, or as it has split itself there."""
    devices = set(mesh.devices.flat)
    with jax.set_mesh(mesh):  # else what it makes would lie on the student's
        module = make(mesh, rules)
    # what was built elsewhere would be sent again in every step
    arrays = nnx.state(module)
    places = [x.sharding for x in jax.tree.leaves(arrays)]
    by_itself = all(place.device_set == devices for place in places) and any(
        not place.is_fully_replicated for place in places
    )
    if rules or not by_itself:
        shardings = tree_shardings(arrays, mesh, rules)
        nnx.update(module, jax.device_put(arrays, shardings))
    return module


def one_module(teacher: Any) -> Any:
    """Several teachers by name as one module."""
    return nnx.Dict(teacher) if isinstance(teacher, Mapping) else teacher
