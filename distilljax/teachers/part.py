"""One teacher's program on its own mesh, and what of it crosses to the student."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distilljax._capture import teacher_with_features
from distilljax._functional import Batch, Forward, cast_batch, freeze
from distilljax.metrics import max_lead
from distilljax.sharding import batch_axes, tree_shardings
from distilljax.teachers.transfer import check_rows, move_rows, row_sharding
from distilljax.terms import Outputs, as_teacher, shard_outputs, split_heads


class Part:
    """One teacher on its mesh: its state, and its program."""

    def __init__(
        self,
        teacher: Any,
        forward: Forward | None,
        mesh: Mesh,
        features: Sequence[str] | None,
        *,
        dtype: Any,
        sharding: NamedSharding,
    ):
        captured = teacher_with_features(teacher, forward, features or ())
        self._apply, state = freeze(*captured, dtype)
        self.state = place(state, mesh)
        self.mesh = mesh
        self._features, self._dtype = features, dtype
        self._sharding = sharding
        self.shares = bool(sharding.device_set & set(mesh.devices.flat))
        self._programs: dict[Any, tuple[frozenset[str], Any]] = {}

    def _outputs(self, state: Any, batch: Batch) -> tuple[Any, Any]:
        seen = cast_batch(batch, self._dtype)
        outputs = as_teacher(self._apply(state, seen))
        # else the compiler splits the whole pass by rows, as the outputs leave, and
        # gathers the parameters for that
        outputs = shard_outputs(outputs, batch_axes(self.mesh))
        return split_heads(_only(outputs, self._features))

    def send(self, batch: Batch) -> Any:
        """The outputs for a batch, on their way to the student's devices."""
        reads, program = self._program(batch)
        read = {name: x for name, x in batch.items() if name in reads}
        with _one_at_a_time(self.mesh, self.shares) as running:
            with jax.set_mesh(self.mesh):
                read = move_rows(read, row_sharding(self.mesh))
                outputs = program(self.state, read)
            running.append(outputs)
            outputs = move_rows(outputs, self._sharding)
            running.append(outputs)
        return outputs

    def lower(self, batch: Batch) -> Any:
        """Its program, lowered for such batches: to be compiled, and looked at."""
        reads, program = self._program(batch)
        shapes, rows = _shapes_of(dict(batch)), row_sharding(self.mesh)
        read = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
            for name, x in shapes.items()
            if name in reads
        }
        with jax.set_mesh(self.mesh):
            return program.lower(self.state, read)

    def _program(self, batch: Batch) -> tuple[frozenset[str], Any]:
        """What the teacher reads of such batches, and its program for that."""
        shapes = _shapes_of(dict(batch))
        leaves, structure = jax.tree.flatten(shapes)
        key = structure, tuple((x.shape, x.dtype) for x in leaves)
        if key not in self._programs:
            with jax.set_mesh(self.mesh):
                found = leaves_read(
                    lambda batch, state: self._outputs(state, batch)[0],
                    shapes,
                    _shapes_of(self.state),
                )
            reads = frozenset(path[1].key for path in found if path[0].idx == 0)
            split = NamedSharding(self.mesh, PartitionSpec(batch_axes(self.mesh)))

            def run(state: Any, read: Batch) -> Any:
                read = jax.lax.with_sharding_constraint(read, split)
                return self._outputs(state, _with_unread(read, shapes))[0]

            rows = row_sharding(self.mesh)
            self._programs[key] = reads, jax.jit(run, out_shardings=rows)
        return self._programs[key]

    def send_only(self, features: Sequence[str]) -> None:
        """Leave out the features that the forward returns and nobody reads."""
        self._features = features
        self._programs.clear()

    def shapes(self, batch: Mapping[str, Any]) -> Any:
        """The shapes of the outputs for a batch, if they can be sent.

        Args:
          batch: Shapes of a batch.
        """
        rows = next(iter(batch.values())).shape[0]
        check_rows("the batch size", rows, self._sharding, self.mesh)
        with jax.set_mesh(self.mesh):
            return jax.eval_shape(self._outputs, _shapes_of(self.state), batch)[0]

    def head(self, example: Any) -> Any:
        """The head without hidden states, on the student's devices."""
        shapes = _shapes_of(dict(example))

        def find(state: Any) -> Any:
            return self._outputs(state, _with_unread({}, shapes))[1]

        with jax.set_mesh(self.mesh):
            if not jax.tree.leaves(jax.eval_shape(find, self.state)):
                return None
            whole = NamedSharding(self.mesh, PartitionSpec())
            if is_abstract(self.state):
                found = jax.eval_shape(find, self.state)
                return place(found, self._sharding.mesh)
            found = jax.jit(find, out_shardings=whole)(self.state)
        local = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), found)
        student: Any = self._sharding.mesh
        shardings = tree_shardings(local, student)
        return jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
            local,
            shardings,
        )


def is_abstract(state: Any) -> bool:
    """Whether there are shapes instead of arrays, as in a plan."""
    leaves = jax.tree.leaves(state)
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


def place(state: Any, mesh: Any) -> Any:
    """Arrays that do not lie on a mesh yet, put there; random keys as well."""
    devices = set(mesh.devices.flat)
    shardings = tree_shardings(state, mesh)

    def put(x: Any, sharding: NamedSharding) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            own = x.sharding or sharding
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)
        there = isinstance(x, jax.Array) and x.sharding.device_set == devices
        return x if there else jax.device_put(x, sharding)

    return jax.tree.map(put, state, shardings)


# Of simulated devices: what runs on a mesh, for whatever is to run there next.
_RUNNING: dict[Mesh, list[Any]] = {}


@contextlib.contextmanager
def _one_at_a_time(mesh: Mesh, shares: bool) -> Iterator[list[Any]]:
    """Simulated devices run one program at a time; see `metrics.max_lead`."""
    running: list[Any] = []
    if max_lead() > 0:
        yield running
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # raised where it is used
        jax.block_until_ready(_RUNNING.pop(mesh, None))
    yield running
    if shares:
        jax.block_until_ready(running)
    else:
        _RUNNING[mesh] = running


def leaves_read(function: Callable[..., Any], *shapes: Any) -> list[Any]:
    """The paths of the arrays on whose values a result depends; without compute.

    Args:
      function: What makes the result.
      *shapes: Of its arguments.

    Example:
      >>> shapes = {"inputs": jax.ShapeDtypeStruct((2,), "float32"),
      ...           "labels": jax.ShapeDtypeStruct((2,), "int32")}
      >>> [(_, key)] = leaves_read(lambda batch: 2 * batch["inputs"], shapes)
      >>> key.key
      'inputs'
    """
    traced: Any = jax.make_jaxpr(function)(*shapes)
    everything = [True] * len(traced.jaxpr.outvars)
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, everything)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return [path for (path, _), read in zip(leaves, used, strict=True) if read]


def _with_unread(read: Batch, shapes: Batch) -> dict[str, Any]:
    """A batch with all its keys; the compiler drops what nothing is made of."""
    unread = {name: x for name, x in shapes.items() if name not in read}
    return {**jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), unread), **read}


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            jnp.shape(x),
            jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True),
        ),
        tree,
    )


def _only(outputs: Any, features: Sequence[str] | None) -> Any:
    """Without the features that nobody asks for; of several teachers, by name."""
    if features is None or outputs is None:
        return outputs
    if isinstance(outputs, Outputs):
        kept = {name: x for name, x in outputs.features.items() if name in features}
        return replace(outputs, features=kept)
    return {
        name: _only(one, features_of_one(features, name))
        for name, one in outputs.items()
    }


def features_of_one(features: Sequence[str] | None, name: str) -> list[str] | None:
    """Those of one of several teachers, without its name."""
    if features is None:
        return None
    split = (feature.partition("/") for feature in features)
    return [path for teacher, _, path in split if teacher == name]


__all__ = ["Part", "features_of_one", "leaves_read"]
