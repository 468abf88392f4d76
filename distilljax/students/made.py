"""What every way to make a student returns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from distilljax._checks import fail
from distilljax.students.layers import evenly_spaced
from distilljax.typing import path_of

# In the order of a table; a norm is one wherever it stands in the path.
_PARTS = {
    "embedding": r"embed",
    "attention": r"attention(?!_norm).*(?<!norm/scale)$",
    "mlp": r"mlp(?!_norm)",
    "norms": r"norm",
    "head": r"^head",
    "other": r"",
}


@dataclass(frozen=True)
class ParameterTable:
    """How many parameters a student and its teacher have, part by part.

    Example:
      >>> print(ParameterTable({"mlp": 600, "norms": 4}, {"mlp": 1200, "norms": 4}))
      part   student  teacher  ratio
      mlp        600    1,200   0.50
      norms        4        4   1.00
      total      604    1,204   0.50
    """

    student: Mapping[str, int]
    """Parameters of the student by part."""
    teacher: Mapping[str, int]
    """The same of the teacher."""

    @property
    def ratio(self) -> float:
        """All parameters of the student, as a share of the teacher's."""
        return sum(self.student.values()) / sum(self.teacher.values())

    def __str__(self) -> str:
        parts = list(dict.fromkeys([*self.teacher, *self.student]))
        counts = [(p, self.student.get(p, 0), self.teacher.get(p, 0)) for p in parts]
        total = ("total", sum(self.student.values()), sum(self.teacher.values()))
        rows = [("part", "student", "teacher", "ratio")]
        for part, ours, theirs in (*counts, total):
            ratio = f"{ours / theirs:.2f}" if theirs else "-"
            rows.append((part, f"{ours:,}", f"{theirs:,}", ratio))
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            "  ".join(
                [part.ljust(first)]
                + [x.rjust(n) for x, n in zip(cells, others, strict=True)]
            )
            for part, *cells in rows
        )


@dataclass(frozen=True)
class Made:
    """A student, and how it is to its teacher.

    Example:
      >>> from distilljax import models, objectives, students
      >>> teacher = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=4, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)(nnx.Rngs(0))
      >>> made = students.keep_layers(teacher, 2)
      >>> objective = objectives.FeatureKD(made.layers)
      >>> round(made.parameters.ratio, 2)
      0.53
    """

    student: Any
    """The module, whose arrays are its own: none is shared with the teacher."""
    layers: Mapping[str, str]
    """Paths of the student's layers, and of those of the teacher that they are or are
    to be like: `layers` of `objectives.FeatureKD`."""
    parameters: ParameterTable
    """Their sizes."""


def made(student: Any, teacher: Any, layers: Mapping[str, str]) -> Made:
    """The student with its table."""
    return Made(
        student, layers, ParameterTable(*map(count_by_part, (student, teacher)))
    )


def count_by_part(model: nnx.Module) -> dict[str, int]:
    """Parameters by the part of the model that they belong to."""
    counts = dict.fromkeys(_PARTS, 0)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = path_of(path)
        part = next(part for part, found in _PARTS.items() if re.search(found, name))
        counts[part] += math.prod(x.shape)
    return {part: count for part, count in counts.items() if count}


def check_layered(function: str, argument: str, model: Any) -> None:
    """It has numbered layers, and a config that says how many."""
    config = getattr(model, "config", None)
    if not hasattr(config, "num_layers") or not hasattr(model, "layers"):
        fail(
            function,
            argument,
            "be a model with layers and a config that counts them",
            f"a {type(model).__name__}",
            "Pass a models.Decoder, or a module with config.num_layers and layers.",
            TypeError,
        )


def layer_pairs(num_student: int, num_teacher: int) -> dict[str, str]:
    """Layers of two models that belong together, evenly spaced in the deeper one."""
    if num_student <= num_teacher:
        pairs = enumerate(evenly_spaced(num_student, num_teacher))
    else:
        pairs = ((i, j) for j, i in enumerate(evenly_spaced(num_teacher, num_student)))
    return {f"layers/{i}": f"layers/{j}" for i, j in pairs}


def structure_of(config: Any) -> Any:
    """The module that a config describes, without arrays."""
    return nnx.eval_shape(lambda: config(nnx.Rngs(0)))


def filled(module: Any, arrays: Mapping[str, Any]) -> Any:
    """A module without arrays, with these parameters."""
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, dict(arrays))
    nnx.update(module, state)
    return module


__all__ = ["Made", "ParameterTable"]
