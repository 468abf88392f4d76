"""Features of a model by the paths of its modules, without an edit to the model.

While a forward is traced, the modules that are asked for sow what their call returns;
`nnx.capture` collects that through `nnx.remat`, `nnx.scan` and `nnx.vmap`, in the graph
mode and in the tree mode of NNX. (Its own `method_outputs` would note every method of
every module, and miss the methods that a class inherits.)
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import jax
from flax import nnx
from flax.errors import TraceContextError

from distilljax._checks import fail
from distilljax._functional import (
    Apply,
    Batch,
    Forward,
    PyTree,
    default_teacher_forward,
    module_apply,
    module_infer,
    pytree_apply,
    pytree_infer,
)
from distilljax._objective import features_of
from distilljax.terms import Outputs, as_outputs

# The entry under which a module's own output is noted; others are what it sows.
_OUTPUT = "__call__"
_MARK = "is_noted"
# A class has one call for all threads, so they take turns: one that came while another
# is at it would put back, when it leaves, the other's call. Re-entrant, because a
# forward may hold another one with features.
_CALLS = threading.RLock()


def with_features(
    forward: Forward, names: Sequence[str], whose: str = "student"
) -> Forward:
    """A forward whose outputs have these features, captured where it gives them not.

    Args:
      forward: `(model, batch) -> Outputs | logits`, the model an `nnx.Module`.
      names: Paths of modules such as `blocks/3`, for what their call returns; of what
        they sow, such as `blocks/3/weights`; or features that the forward gives itself.
      whose: Whose forward it is, for messages.
    """
    if not names:
        return forward

    def captured(model: nnx.Module, batch: Batch) -> Outputs:
        modules = {_join(path): m for path, m in nnx.iter_modules(model)}
        noted = [modules[n] for n in _candidates(names, modules)]
        with _noting(noted):
            outputs, notes = nnx.capture(forward, nnx.Intermediate)(model, batch)
        outputs = as_outputs(outputs)
        found = {
            _join(path): value.get_value() for path, value in nnx.to_flat_state(notes)
        }
        features = {
            name: _feature(name, found, modules, whose)
            for name in names
            if name not in outputs.features
        }
        return replace(outputs, features={**outputs.features, **features})

    return captured


def teacher_with_features(
    teacher: Any, forward: Forward | None, names: Sequence[str] = ()
) -> tuple[Any, Forward | None]:
    """A teacher, or a dict of them as one module, and its forward with features.

    Of several teachers, a feature is named `name of the teacher/path`, and the outputs
    are a dict of theirs.
    """
    several = isinstance(teacher, Mapping) and all(
        isinstance(module, nnx.Module) for module in teacher.values()
    )
    if several and teacher:
        if unknown := [n for n in names if n.partition("/")[0] not in teacher]:
            fail(
                "make_distill_step",
                "the features of several teachers",
                f"begin with the name of one, {', '.join(teacher)}",
                unknown[0],
                "Say which teacher: MultiTeacher(objective, combine=Only(name)).",
            )
        forwards = {
            name: with_features(
                forward or default_teacher_forward,
                [n.partition("/")[2] for n in names if n.partition("/")[0] == name],
                f"teacher {name!r}",
            )
            for name in teacher
        }
        return nnx.Dict(teacher), lambda model, batch: {
            name: each(model[name], batch) for name, each in forwards.items()
        }
    if isinstance(teacher, nnx.Module):
        forward = with_features(forward or default_teacher_forward, names, "teacher")
    elif forward is not None:
        forward = require_features(forward, names, "teacher")
    return teacher, forward


class Student(NamedTuple):
    """The student as pure functions: in training, and its average in inference."""

    apply: Apply
    infer: Callable[[PyTree, PyTree, Batch], Any]


def bind_student(
    graphdef: nnx.GraphDef | None, trainable: Any, forward: Forward, objective: Any
) -> Student:
    """The student with the features of an objective; a pytree if there is no graph."""
    names, average = (features_of(objective, whose) for whose in ("student", "average"))
    if graphdef is None:
        return Student(
            require_features(pytree_apply(forward), names, "student"),
            require_features(pytree_infer(forward), average, "student"),
        )
    return Student(
        module_apply(graphdef, trainable, with_features(forward, names)),
        module_infer(graphdef, with_features(forward, average)),
    )


def require_features(
    apply: Callable[..., Any], names: Sequence[str], whose: str
) -> Callable[..., Any]:
    """The pure function of a model that is no NNX module, which is not looked into."""

    def checked(*args: Any) -> Any:
        found = apply(*args)
        outputs = as_outputs(found[0] if isinstance(found, tuple) else found)
        if missing := [name for name in names if name not in outputs.features]:
            fail(
                "make_distill_step",
                f"the {whose}'s features",
                f"have {missing[0]!r}",
                sorted(outputs.features),
                "Only NNX modules are looked into: return Outputs(logits, features="
                f"{{{missing[0]!r}: ...}}) from {whose}_forward.",
            )
        return found

    return checked


def _join(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))


def _without_an_index(name: str) -> Iterator[tuple[str, str, int]]:
    """`blocks/3/mlp` as layer 3 of the stack `blocks`: (`blocks/mlp`, `blocks`, 3)."""
    parts = name.split("/")
    for i, part in enumerate(parts):
        if part.isdigit():
            yield _join(parts[:i] + parts[i + 1 :]), _join(parts[:i]), int(part)


def _candidates(names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
    """The modules whose output may be what a name means."""
    found = set()
    for name in names:
        found |= {name, *(path for path, _, _ in _without_an_index(name))}
    return sorted(name for name in found & modules.keys() if callable(modules[name]))


def _noting_call(kind: type) -> Any:
    """The call of a class, which sows what the marked modules of it return."""
    call = kind.__call__

    @functools.wraps(call)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(self, *args, **kwargs)
        # a subclass that calls its parent here is noted by its own call
        if getattr(self, _MARK, False) and type(self).__call__ is noting:
            _refuse_other_trace(self)
            self.sow(nnx.Intermediate, _OUTPUT, output)
        return output

    return noting


def _refuse_other_trace(module: Any) -> None:
    """Raise where the output lives in a trace that the module is not from."""
    for notes in module.__captures__:
        try:
            notes.set_value(notes.get_value())
        except TraceContextError:
            fail(
                "make_distill_step",
                f"a feature of {type(module).__name__}",
                "be computed outside jax.checkpoint, jax.lax.scan and jax.vmap",
                "a call inside one of them",
                "Use nnx.remat, nnx.scan or nnx.vmap there, which know modules; or "
                "return the feature from the forward as Outputs(logits, features="
                "{...}).",
            )


@contextlib.contextmanager
def _noting(modules: Sequence[nnx.Module]) -> Iterator[None]:
    """While this lasts, calls of these modules leave a note; other threads wait."""
    with _CALLS:
        # what a transform rebuilds inside is another object, known by its mark
        for module in modules:
            setattr(module, _MARK, True)
        homes = {_home(type(module)) for module in modules}
        originals = {home: home.__dict__["__call__"] for home in homes}
        try:
            for home in homes:
                home.__call__ = _noting_call(home)
            yield
        finally:
            for home, call in originals.items():
                home.__call__ = call
            for module in modules:
                delattr(module, _MARK)


def _home(kind: type) -> Any:
    """The class in which the call of a class is defined."""
    return next(base for base in kind.__mro__ if "__call__" in base.__dict__)


def _feature(
    name: str, found: Mapping[str, Any], modules: Mapping[str, Any], whose: str
) -> jax.Array:
    for key in (name, f"{name}/{_OUTPUT}"):
        if key in found:
            return _single(name, found[key], whose)
    for path, stack, index in _without_an_index(name):
        for key in (path, f"{path}/{_OUTPUT}"):
            if key in found and stack in modules:
                stacked = _single(name, found[key], whose)
                layers = _num_layers(modules[stack])
                if layers == stacked.shape[0] and index < layers:
                    return stacked[index]
                if layers == stacked.shape[0]:
                    fail(
                        "make_distill_step",
                        f"the {whose}'s feature {name!r}",
                        f"name one of the {layers} layers stacked in {stack!r}",
                        index,
                        "They count from 0.",
                    )
    return _not_found(name, found, modules, whose)


def _not_found(
    name: str, found: Mapping[str, Any], modules: Mapping[str, Any], whose: str
) -> NoReturn:
    instead = (
        f"return the feature from {whose}_forward as Outputs(logits, features={{...}})"
    )
    near = (name, *(path for path, *_ in _without_an_index(name)))
    if any(callable(modules.get(path)) for path in near):
        fail(
            "make_distill_step",
            f"the {whose}'s feature {name!r}",
            "come from a module whose call can be seen",
            "none",
            "It is not called, or in a scan over arrays (jax.lax.scan over nnx.split): "
            f"use nnx.scan there, or {instead}.",
        )
    known = sorted({*modules, *(n.removesuffix(f"/{_OUTPUT}") for n in found)} - {""})
    fail(
        "make_distill_step",
        f"the {whose}'s feature {name!r}",
        "be the path of a module, or of what one sows",
        f"none of {', '.join(known[:40])}{', ...' if len(known) > 40 else ''}",
        f"Layers stacked for nnx.scan have an index, 'blocks/3'; or {instead}.",
    )


def _num_layers(module: nnx.Module) -> int:
    """The length of the stack whose layers a module holds; -1 if it is one layer."""
    arrays = jax.tree.leaves(nnx.as_pure(nnx.state(module, nnx.Param)))
    sizes = {x.shape[0] if x.ndim else -1 for x in arrays}
    return sizes.pop() if len(sizes) == 1 else -1


def _single(name: str, notes: Any, whose: str) -> jax.Array:
    """The one array that a module returned or sowed, fit for use."""
    if isinstance(notes, tuple) and len(notes) != 1:
        fail(
            "make_distill_step",
            f"the {whose}'s feature {name!r}",
            "be made once in a forward pass",
            f"{len(notes)} calls",
            f"Return the one you mean from {whose}_forward as Outputs(logits, "
            "features={...}).",
        )
    value = notes[0] if isinstance(notes, tuple) else notes
    if not isinstance(value, jax.Array):
        fail(
            "make_distill_step",
            f"the {whose}'s feature {name!r}",
            "be an array",
            type(value).__name__,
            f"Return the part you mean from {whose}_forward as Outputs(logits, "
            "features={...}).",
            TypeError,
        )
    return value


__all__ = ["Student", "bind_student", "teacher_with_features", "with_features"]
