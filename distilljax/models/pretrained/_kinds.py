"""What files say of a class of models: its families, their tensors, their places.

A family is a pair of functions, there and back. A model is written as the first family
whose description, read again, is the same model: what a family cannot say is found by
that, and not by a list of conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from flax import nnx

from distilljax._checks import fail
from distilljax.models.pretrained._tables import Table
from distilljax.sharding import Rule

Json = Mapping[str, Any]


class Family(NamedTuple):
    """A `model_type` of transformers."""

    architecture: str
    read: Callable[[Json], Any]
    write: Callable[[Any], dict[str, Any]]


class Kind(NamedTuple):
    """A class of modules that are made by one class of configs."""

    module: type[nnx.Module]
    families: Mapping[str, Family]
    table: Callable[[Any], Table]
    """Which tensor is which parameter, by the config."""
    rules: Sequence[Rule] = ()
    """Where parameters lie on a mesh."""
    options: tuple[str, ...] = ()
    """Fields of the config that say how a model is run: files do not say them."""
    plain: Callable[[Any], Any] = lambda config: config
    """The same model, said in one way."""


def read_config(kinds: Sequence[Kind], json: Json, where: str) -> tuple[Kind, Any]:
    """The kind and the config of the model that a config.json describes."""
    named = {name: kind for kind in kinds for name in kind.families}
    name = json.get("model_type")
    if name not in named:
        fail(
            "load_pretrained",
            "model_type",
            f"be one of {', '.join(sorted(named))}",
            f"{name!r} in {where}",
            "Other models work as well: load them with their own library, and pass a "
            "teacher_forward to make_distill_step.",
        )
    try:
        return named[name], named[name].families[name].read(json)
    except KeyError as error:
        fail(
            "load_pretrained",
            where,
            f"have the key {error}",
            sorted(json),
            f"A {name!r} model cannot be built without it.",
        )


def config_json(kind: Kind, config: Any) -> dict[str, Any]:
    """The config.json that describes a model."""
    plain = kind.plain(config)
    nearest: list[str] = []
    for name, family in kind.families.items():
        json = {
            "architectures": [family.architecture],
            "model_type": name,
            **family.write(plain),
        }
        again = kind.plain(family.read(json))
        if again == plain:
            return json
        lost = [
            f.name
            for f in fields(plain)
            if getattr(plain, f.name) != getattr(again, f.name)
        ]
        nearest = lost if not nearest or len(lost) < len(nearest) else nearest
    return fail(
        "save_pretrained",
        f"the {kind.module.__name__}",
        f"be what one of {', '.join(kind.families)} can be",
        f"a combination that none has ({', '.join(nearest)})",
        "Save it with distilljax.checkpoints, or change these fields.",
    )
