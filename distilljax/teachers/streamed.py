"""A teacher on devices of its own, one step ahead of the student."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distilljax._capture import teacher_with_features
from distilljax._checks import check_count, fail
from distilljax._functional import Batch, Forward, cast_batch, freeze
from distilljax.metrics import max_lead, tokens_of
from distilljax.sharding import batch_axes, tree_shardings
from distilljax.teachers.transfer import check_reach, move_rows, row_sharding
from distilljax.terms import Outputs, as_teacher, split_heads


class StreamedTeacher:
    """A teacher's outputs for batches that a student trains on elsewhere.

    While the student trains on batch n, batch n + 1 is with the teacher: two programs,
    each compiled for its own devices. What travels is hidden states where the teacher
    ends in a `LinearHead`, whose kernel is put on the student's devices once; features
    that are asked for; logits only where there is no head.

        step = make_distill_step(objective, teacher_head=streamed.head, ...)
        for batch in streamed(batches):
            metrics = step(student, optimizer, batch)

    It does not see how far the student is: a loop that never waits for the metrics of a
    step would let outputs pile up (`train` waits for those of `depth` steps ago).

    Args:
      teacher: An `nnx.Module`, any pytree (with `forward`), or a dict of modules.
      forward: `(teacher, batch) -> Outputs | logits`, as `teacher_forward` of
        `make_distill_step`.
      mesh: The teacher's devices, as `mesh_from_string` makes them; of a dict of
        teachers also a dict, each with devices of its own. Arrays that do not lie there
        are put there, by size over `fsdp`.
      sharding: Of the student's batches: `batch_sharding(student_mesh)`.
      depth: How many batches the teacher is ahead of the one that was last yielded.
      features: Names of features to send; None: those that the forward itself returns.
      compute_dtype: Type of the teacher's forward pass, and so of what travels.
      example: A batch, or its shapes; `head` is found with it.

    Example:
      >>> from flax import nnx
      >>> from distilljax.sharding import batch_sharding, mesh_from_string
      >>> mesh = mesh_from_string("data=1", jax.devices()[:1])
      >>> teacher = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> streamed = StreamedTeacher(teacher, mesh=mesh, sharding=batch_sharding(mesh))
      >>> batches = [{"inputs": jnp.ones((2, 4)), "labels": jnp.array([0, 2])}]
      >>> for batch in streamed(batches):
      ...     print(batch["teacher"].logits.shape, streamed.bytes_per_token)
      (2, 3) 12.0
    """

    def __init__(
        self,
        teacher: Any,
        forward: Forward | None = None,
        *,
        mesh: Mesh | Mapping[str, Mesh],
        sharding: NamedSharding,
        depth: int = 1,
        features: Sequence[str] | None = None,
        compute_dtype: Any = None,
        example: Any = None,
        fingerprint: str = "",
    ):
        check_count("StreamedTeacher", "depth", depth)
        self.sharding, self.depth = sharding, depth
        self.fingerprint = fingerprint
        self.bytes_per_token: float | None = None
        """Bytes that cross per token of a batch, or per example without tokens."""
        options = {"dtype": compute_dtype, "sharding": sharding}
        self._parts: dict[str | None, _Part]
        if isinstance(mesh, Mapping):
            self._parts = {
                name: _Part(
                    teacher[name],
                    forward,
                    mesh[name],
                    _features_of_one(features, name),
                    **options,
                )
                for name in teacher
            }
        else:
            self._parts = {None: _Part(teacher, forward, mesh, features, **options)}
        self._head: tuple[Any] | None = None
        if example is not None:
            self.find_head(example)

    @property
    def head(self) -> Any:
        """What `make_distill_step` gets as `teacher_head`; None without a head."""
        if self._head is None:
            fail(
                "StreamedTeacher",
                "example",
                "be given to know the teacher's head before its first batch",
                None,
                "Pass example=, a batch or its shapes.",
            )
        return self._head[0]

    def find_head(self, example: Any) -> Any:
        """The teacher's heads without hidden states, on the student's devices.

        Args:
          example: A batch, or its shapes.
        """
        if self._head is None:
            heads = {name: part.head(example) for name, part in self._parts.items()}
            if None in heads:
                self._head = (heads[None],)
            else:
                found = any(head is not None for head in heads.values())
                self._head = (heads if found else None,)
        return self._head[0]

    def __call__(self, batches: Iterable[Any]) -> Stream:
        """The batches, with the teacher's outputs under `teacher`.

        Args:
          batches: Batches, or pairs of a batch and its index as `prefetch_to_device`
            returns them; resumable if `get_state` is to be.
        """
        return Stream(self, batches)

    def on_host(self, batches: Iterator[Any]) -> Iterator[Any]:
        """As they are: nothing is read for them."""
        return batches

    def on_devices(self, batches: Iterator[Any]) -> Stream:
        """As the call."""
        return self(batches)

    def with_outputs(self, batch: Batch) -> dict[str, Any]:
        """One batch with the teacher's outputs, on their way to the student."""
        sent = {name: part.send(batch) for name, part in self._parts.items()}
        teacher = sent.get(None, sent)
        if self.bytes_per_token is None:
            self.bytes_per_token = _bytes_per_token(batch, teacher)
        return {**batch, "teacher": teacher}

    def shapes(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The shapes of a batch with those of the outputs; checks that they can move.

        Args:
          batch: Shapes of a batch.
        """
        sent = {name: part.shapes(batch) for name, part in self._parts.items()}
        teacher = sent.get(None, sent)
        self.bytes_per_token = _bytes_per_token(batch, teacher)
        return {**batch, "teacher": teacher}

    def described(self) -> str:
        """What is where, and what crosses, in a sentence."""
        where = ", ".join(
            f"{f'teacher {name!r}' if name else 'the teacher'} on {part.mesh.size} "
            f"devices ({_axes(part.mesh)})"
            for name, part in self._parts.items()
        )
        own = self._parts[next(iter(self._parts))]
        beside = "the student's own" if own.shares else "others"
        return (
            f"{where}, {beside}; {self.bytes_per_token:,.0f} bytes per token cross to "
            f"the student on {self.sharding.mesh.size} ({_axes(self.sharding.mesh)})"
        )


class Stream:
    """The iterator of a `StreamedTeacher`; resumable if its batches are."""

    def __init__(self, teacher: StreamedTeacher, batches: Iterable[Any]):
        self._teacher = teacher
        self._batches: Any = iter(batches)
        self._queue: deque[tuple[Any, Any]] = deque()
        self._state = self._source_state()

    def __iter__(self) -> Stream:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next batch; the teacher has got those that follow by then."""
        while len(self._queue) <= self._teacher.depth:
            try:
                item = next(self._batches)
            except StopIteration:
                break
            pair = isinstance(item, tuple)
            batch = self._teacher.with_outputs(item[0] if pair else item)
            item = (batch, *item[1:]) if pair else batch
            self._queue.append((item, self._source_state()))
        if not self._queue:
            raise StopIteration
        item, self._state = self._queue.popleft()
        # the queue holds back a host that is ahead of the teacher; an error of its
        # program is raised here, and not in the student's step
        batch = item[0] if isinstance(item, tuple) else item
        jax.block_until_ready(batch["teacher"])
        return item

    def get_state(self) -> Any:
        """The state after the batch last yielded: what is ahead does not count."""
        if self._state is None:
            fail(
                "get_state",
                "batches",
                "have a get_state of their own",
                type(self._batches).__name__,
                "Stream the iterator of a Loader.",
                TypeError,
            )
        return self._state

    def set_state(self, state: Any) -> None:
        """Continue where ``state`` was taken; what is ahead is dropped."""
        self._batches.set_state(state)
        self._queue.clear()
        self._state = self._source_state()

    def _source_state(self) -> Any:
        get_state = getattr(self._batches, "get_state", None)
        return None if get_state is None else get_state()


class _Part:
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
        self._programs: dict[Any, tuple[frozenset[str], Callable[..., Any]]] = {}

    def _outputs(self, state: Any, batch: Batch) -> tuple[Any, Any]:
        seen = cast_batch(batch, self._dtype)
        outputs = as_teacher(self._apply(state, seen))
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

    def _program(self, batch: Batch) -> tuple[frozenset[str], Callable[..., Any]]:
        """What the teacher reads of such batches, and its program for that."""
        shapes = _shapes_of(dict(batch))
        leaves, structure = jax.tree.flatten(shapes)
        key = structure, tuple((x.shape, x.dtype) for x in leaves)
        if key not in self._programs:
            with jax.set_mesh(self.mesh):
                reads = keys_read(lambda b: self._outputs(self.state, b)[0], shapes)
            split = NamedSharding(self.mesh, PartitionSpec(batch_axes(self.mesh)))

            def run(state: Any, read: Batch) -> Any:
                read = jax.lax.with_sharding_constraint(read, split)
                return self._outputs(state, _with_unread(read, shapes))[0]

            rows = row_sharding(self.mesh)
            self._programs[key] = reads, jax.jit(run, out_shardings=rows)
        return self._programs[key]

    def shapes(self, batch: Mapping[str, Any]) -> Any:
        rows = next(iter(batch.values())).shape[0]
        if rows % self.mesh.size:
            fail(
                "StreamedTeacher",
                "the batch size",
                f"be a multiple of the teacher's devices, {self.mesh.size}",
                rows,
                "Change it, or the teacher's mesh.",
            )
        there = row_sharding(self.mesh)
        check_reach(self._sharding, there, rows)
        check_reach(there, self._sharding, rows)
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
            found = jax.jit(find, out_shardings=whole)(self.state)
        local = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), found)
        shardings = tree_shardings(local, self._sharding.mesh)
        return jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
            local,
            shardings,
        )


def place(state: Any, mesh: Mesh) -> Any:
    """Arrays that do not lie on a mesh yet, put there; random keys as well."""
    devices = set(mesh.devices.flat)
    shardings = tree_shardings(state, mesh)

    def put(x: Any, sharding: NamedSharding) -> Any:
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
    jax.block_until_ready(_RUNNING.pop(mesh, None))
    yield running
    if shares:
        jax.block_until_ready(running)
    else:
        _RUNNING[mesh] = running


def keys_read(function: Callable[[Any], Any], batch: Mapping[str, Any]) -> frozenset:
    """The entries of a batch on whose values a result depends; without compute.

    Args:
      function: Of a batch.
      batch: Its shapes.

    Example:
      >>> shapes = {"inputs": jax.ShapeDtypeStruct((2,), "float32"),
      ...           "labels": jax.ShapeDtypeStruct((2,), "int32")}
      >>> sorted(keys_read(lambda batch: 2 * batch["inputs"], shapes))
      ['inputs']
    """
    traced: Any = jax.make_jaxpr(function)(dict(batch))
    everything = [True] * len(traced.jaxpr.outvars)
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, everything)
    names = [
        path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(dict(batch))
    ]
    return frozenset(name for name, read in zip(names, used, strict=True) if read)


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
        name: _only(one, _features_of_one(features, name))
        for name, one in outputs.items()
    }


def _features_of_one(features: Sequence[str] | None, name: str) -> list[str] | None:
    """Those of one of several teachers, without its name."""
    if features is None:
        return None
    split = (feature.partition("/") for feature in features)
    return [path for teacher, _, path in split if teacher == name]


def _bytes_per_token(batch: Any, teacher: Any) -> float:
    """Of the arrays themselves; per example where there are no tokens."""
    rows = next(iter(jax.tree.leaves(batch))).shape[0]
    size = sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(teacher))
    return size / (rows * (tokens_of(batch) or 1))


def _axes(mesh: Mesh) -> str:
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return ",".join(sizes) or "data=1"


__all__ = ["Stream", "StreamedTeacher", "keys_read"]
