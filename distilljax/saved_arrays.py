"""Which arrays a checkpoint has, and what it is if they are not those asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distilljax._checks import fail
from distilljax.patience import WAITS_SECS, is_passing, patiently
from distilljax.typing import path_of


class UnlikeError(ValueError):
    """What a checkpoint is instead of what is asked for."""


class DamagedError(UnlikeError):
    """What a checkpoint has become since it was written."""

    def __init__(self, reason: str, *, agreed: bool = False):
        super().__init__(reason)
        self.agreed = agreed


def is_unread(error: BaseException) -> bool:
    """True if something may be read the next time.

    Orbax may take what it cannot read for something that is not there.

    Args:
      error: What was raised.
    """
    return is_passing(error) or isinstance(error, DamagedError)


def read_alone(
    operation: Callable[[], Any], passing: Callable[[BaseException], bool] = is_passing
) -> Any:
    """Patiently; of several processes, the others would wait for this one.

    Args:
      operation: Reads, and returns what was read.
      passing: After which errors it is read again.
    """
    waits_secs = () if jax.process_count() > 1 else WAITS_SECS
    return patiently(operation, waits_secs, passing)


def unreadable(folder: Path) -> str:
    """What a checkpoint is that could not be read.

    Args:
      folder: Where it should be.
    """
    # Orbax's own words, a page about its handlers, are in the traceback
    known = "arrays that are missing, damaged or of other shapes"
    return known if folder.is_dir() else "no such folder"


@contextlib.contextmanager
def explained(folder: Path, rule: str, read_only: bool) -> Iterator[None]:
    """Say what is wrong with a checkpoint that is read inside, and what to do.

    Args:
      folder: The checkpoint.
      rule: What it must do.
      read_only: Whether it belongs to a run that is not this one.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        yield
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error) if isinstance(error, UnlikeError) else unreadable(folder)
        remedy = (
            "If it is damaged, delete that folder: the run goes on from the one "
            "before it, or from the start. If it is of another model, use another "
            "--workdir."
        )
        if read_only:
            remedy = "Restore that folder from a copy, or train that run again."
        fail("Checkpoints", f"the checkpoint {folder}", rule, reason, remedy)


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): tuple(x.shape) for path, x in leaves}


def as_written(x: Any) -> Any:
    """What a checkpoint has of an array: of a random key, its data."""
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, x) if key else x


def check_same_arrays(saved: Any, like: Any) -> None:
    """Say which arrays differ; Orbax would read for a while, and then say less.

    Args:
      saved: What a checkpoint says that it has.
      like: What is asked for.

    Raises:
      UnlikeError: they are others; the first five are named.
      DamagedError: the checkpoint has none.
    """
    have, want = shapes_of(saved), shapes_of(jax.tree.map(as_written, like))
    wrong = [f"no {path}" for path in want.keys() - have.keys()]
    wrong += [f"{path}, which is not expected" for path in have.keys() - want.keys()]
    wrong += [
        f"{path} of shape {have[path]} instead of {want[path]}"
        for path in have.keys() & want.keys()
        if have[path] != want[path]
    ]
    if not have:
        raise DamagedError("one without any array")
    if wrong:
        raise UnlikeError(f"one that has {'; '.join(sorted(wrong)[:5])}")
