"""Other ways to run the same step: each of them compiled, and ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import jax

from distilljax.config import Config
from distilljax.planning.plan import Plan, plan
from distilljax.planning.topology import Topology
from distilljax.planning.words import options

TENSOR_SIZES = (1, 2, 4, 8, 16)
CHUNKS = (512, 1024, 2048, 4096)
REMAT = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": None,
}
Change = Mapping[str, Any]


def search(
    config: Config,
    topology: Topology,
    found: Plan,
    *,
    limit: int = 8,
    say: Callable[[str], Any] = lambda line: None,
) -> list[dict[str, Any]]:
    """Compile variants of a config, one change at a time, then the best ones together.

    The batch of a step stays what it is: every variant trains the same student.

    Args:
      config: The config.
      topology: Where it is to run.
      found: Its plan as it is.
      limit: How many variants to compile at most.
      say: Gets a line for each.

    Returns:
      A row for each, what fits and is fastest first, in the middle between the bounds
      of its roofline: `changes`, `fits` (None: not known), `allocated` (bytes that the
      step's program sets aside), `seconds` (the bounds), `bound_by`, and `error` if
      it could not be planned.
    """
    rows = [_row({}, found)]
    for changes in list(candidates(config, found))[: max(0, limit - 1)]:
        rows.append(_tried(config, topology, changes, say))
    best = _together(rows)
    if len(best) > 1 and limit > 1:
        rows.append(_tried(config, topology, best, say))
    return sorted(rows, key=_rank)


def _tried(
    config: Config, topology: Topology, changes: Change, say: Callable[[str], Any]
) -> dict[str, Any]:
    try:
        row = _row(changes, plan(changed(config, changes), topology))
    # an error of the compiler in one of them says nothing of the others
    except (ValueError, TypeError, jax.errors.JaxRuntimeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        row = _row(changes, None, first.split(". ")[0][:200])
    words = {True: "fits", False: "does not fit", None: "compiled"}
    end = row["error"] or words[row["fits"]]
    say(f"  tried {options(changes)}: {end}")
    return row


def _row(changes: Change, found: Plan | None, error: str | None = None) -> dict:
    row: dict[str, Any] = {"changes": dict(changes), "fits": False, "error": error}
    row |= {"allocated": None, "seconds": None, "bound_by": None}
    if found is None:
        return row
    step = found.programs["step"]
    row["fits"] = found.fits
    row["allocated"] = step.needs if step.memory is None else step.memory.allocated
    row["seconds"] = found.seconds
    row["bound_by"] = step.roofline and step.roofline.bound_by
    return row


def _rank(row: Mapping[str, Any]) -> tuple[bool, float, float]:
    seconds = row["seconds"] or (float("inf"), float("inf"))
    return row["fits"] is False, sum(seconds), row["allocated"] or float("inf")


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each field the best of what is better than the config as it is."""
    base = _rank(rows[0])
    best: dict[str, tuple[Any, Any]] = {}
    for row in rows[1:]:
        ((name, value),) = row["changes"].items()
        rank = _rank(row)
        if rank < base and rank < best.get(name, (base, None))[0]:
            best[name] = (rank, value)
    return {name: value for name, (_, value) in best.items()}


def candidates(config: Config, found: Plan) -> Iterator[dict[str, Any]]:
    """Single changes that leave the batch and the models as they are.

    What is likely to matter comes first: meshes where the step waits for the network,
    what is computed again where memory is short or to spare.
    """
    kinds = [
        _chunks(config, found),
        _meshes(config, found),
        _remats(config),
        _parts(config),
    ]
    while kinds:
        for kind in list(kinds):
            try:
                yield next(kind)
            except StopIteration:
                kinds.remove(kind)


def _chunks(config: Config, found: Plan) -> Iterator[dict[str, Any]]:
    if found.has_head and hasattr(config.objective, "chunk_tokens"):
        for size in CHUNKS:
            if size != config.objective.chunk_tokens:
                yield {"chunk_tokens": size}


def _meshes(config: Config, found: Plan) -> Iterator[dict[str, Any]]:
    sizes = found.programs["step"].mesh
    planned = {axis: size for axis, size in sizes.items() if size > 1}
    now, count = sizes.get("tensor", 1), prod(sizes.values())
    near = sorted(TENSOR_SIZES, key=lambda n: abs(n.bit_length() - now.bit_length()))
    for tensor in near:
        rest, over = divmod(count, tensor)
        if over or config.loader.batch_size % (rest * config.accumulate):
            continue
        for data in (1, 2, 4):
            mesh = {"data": data, "fsdp": rest // data, "tensor": tensor}
            kept = {axis: size for axis, size in mesh.items() if size > 1}
            if rest % data == 0 and kept != planned:
                text = ",".join(f"{axis}={size}" for axis, size in kept.items())
                yield {"mesh": text or "data=1"}


def _remats(config: Config) -> Iterator[dict[str, Any]]:
    now = [part.remat for part in _with_remat(config.student)]
    for name, policy in REMAT.items():
        if now and policy is not now[0]:
            yield {"remat": name}


def _parts(config: Config) -> Iterator[dict[str, Any]]:
    for accumulate in (config.accumulate * 2, config.accumulate // 2):
        if accumulate >= 1 and config.loader.batch_size % accumulate == 0:
            yield {"accumulate": accumulate}


def changed(config: Config, changes: Change) -> Config:
    """A config with the changes of a row.

    Example:
      >>> changed(Config("a", *[len] * 4, steps=1), {"accumulate": 2}).accumulate
      2
    """
    for name, value in changes.items():
        if name == "chunk_tokens":
            objective = replace(config.objective, chunk_tokens=value)
            config = replace(config, objective=objective)
        elif name == "remat":
            student = _set_remat(config.student, REMAT[value])
            config = replace(config, student=student)
        else:
            config = replace(config, **{name: value})
    return config


def _with_remat(part: Any) -> Iterator[Any]:
    """The parts of a student's config that say what is computed again."""
    if isinstance(part, type) or not dataclasses.is_dataclass(part):
        return
    if hasattr(part, "remat"):
        yield part
        return
    for field in dataclasses.fields(part):
        yield from _with_remat(getattr(part, field.name))


def _set_remat(part: Any, policy: Any) -> Any:
    if hasattr(part, "remat"):
        return replace(part, remat=policy)
    names = [field.name for field in dataclasses.fields(part) if field.init]
    parts = {name: getattr(part, name) for name in names}
    return replace(
        part,
        **{n: _set_remat(x, policy) for n, x in parts.items() if any(_with_remat(x))},
    )
