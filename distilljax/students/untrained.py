"""Models by their shapes alone: with random parameters, or for a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from distilljax._checks import fail
from distilljax.models.pretrained import pretrained_config
from distilljax.sharding import Rule, tree_shardings

# Fields of a config that say how a model is run, and not what it is.
HOW_IT_RUNS = {"scan", "remat", "attention", "compute_dtype", "param_dtype"}
# Nothing is computed from it.
HOW_IT_RUNS |= {"max_length"}


@dataclass(frozen=True)
class Untrained:
    """A teacher with random parameters: to try a recipe before its weights are there.

    Example:
      >>> from distilljax import models
      >>> small = models.DecoderConfig(
      ...     vocab_size=64, width=16, num_layers=2, num_heads=2, num_kv_heads=1,
      ...     head_dim=8, ffn_width=24)
      >>> Untrained(small)().config.width
      16
    """

    model: Any
    """What builds it: a callable from random streams, such as `DecoderConfig`."""
    seed: int = 0
    """Of the parameters."""

    def __call__(
        self, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The module, made on the mesh or on one device."""

        def make() -> Any:
            return nnx.state(self.model(nnx.Rngs(self.seed)))

        graphdef = nnx.graphdef(nnx.eval_shape(lambda: self.model(nnx.Rngs(self.seed))))
        if mesh is None:
            return nnx.merge(graphdef, jax.jit(make)())
        shardings = tree_shardings(jax.eval_shape(make), mesh, rules)
        return nnx.merge(graphdef, jax.jit(make, out_shardings=shardings)())


def shaped(
    path_or_id: str, dtype: Any, shape: Any, options: Mapping[str, Any]
) -> Untrained:
    """What makes the shapes of a model of files: as they say, or as is known.

    Args:
      path_or_id: As of `load_pretrained`.
      dtype: Of the parameters; None is that of the file, or float32 without it.
      shape: The model's config, if it is known.
      options: As of `load_pretrained`.
    """
    if shape is None:
        return Untrained(pretrained_config(path_or_id, dtype=dtype, **options))
    given = {"scan": False, "remat": None} | dict(options)
    if dtype is not None:
        given["param_dtype"] = jnp.dtype(dtype)
    names = {field.name for field in dataclasses.fields(shape)}
    given = {name: value for name, value in given.items() if name in names}
    return Untrained(dataclasses.replace(shape, **given))


def check_shape(path: str, found: Any, shape: Any) -> None:
    """Raise if the files have another model than the config expects."""
    if shape is None:
        return
    if type(found) is not type(shape):
        wrong = [f"{type(found).__name__} instead of {type(shape).__name__}"]
    else:
        wrong = [
            f"{field.name} {getattr(found, field.name)!r} instead of "
            f"{getattr(shape, field.name)!r}"
            for field in dataclasses.fields(shape)
            if field.name not in HOW_IT_RUNS
            and getattr(found, field.name) != getattr(shape, field.name)
        ]
    if wrong:
        fail(
            "Pretrained",
            f"the files of {path!r}",
            "be of the model that shape= describes",
            "; ".join(wrong),
            "Correct shape=, or name other files.",
        )
