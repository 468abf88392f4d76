"""A teacher on devices of its own, one step ahead of the student."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from distilljax._checks import check_count, fail
from distilljax._functional import Batch, Forward
from distilljax.metrics import tokens_of
from distilljax.teachers.part import Part, features_of_one


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
      >>> import jax, jax.numpy as jnp
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
        mesh: Mesh | Mapping[Any, Mesh],
        sharding: NamedSharding,
        depth: int = 1,
        features: Sequence[str] | None = None,
        compute_dtype: Any = None,
        example: Any = None,
        fingerprint: str = "",
    ):
        check_count("StreamedTeacher", "depth", depth)
        self.sharding, self.depth = sharding, depth
        self.fingerprint, self.features = fingerprint, features
        self.bytes_per_token: float | None = None
        """Bytes that cross per token of a batch, or per example without tokens."""
        options = {"dtype": compute_dtype, "sharding": sharding}
        self._parts: dict[str | None, Part]
        if isinstance(mesh, Mapping):
            self._parts = {
                name: Part(
                    teacher[name],
                    forward,
                    mesh[name],
                    features_of_one(features, name),
                    **options,
                )
                for name in teacher
            }
        else:
            self._parts = {None: Part(teacher, forward, mesh, features, **options)}
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

    def send_only(self, features: Sequence[str], batch: dict[str, Any]) -> None:
        """Leave out the features that the forward returns and nobody reads.

        Args:
          features: Names of those that are read, of several teachers with theirs.
          batch: Shapes of a batch.
        """
        self.features = features
        for name, part in self._parts.items():
            own = features if name is None else features_of_one(features, name)
            part.send_only(own or ())
        self.shapes({name: x for name, x in batch.items() if name != "teacher"})

    def lower(self, batch: Batch) -> dict[Any, Any]:
        """The lowered program of each teacher, by name; of one alone under None.

        Args:
          batch: A batch, or its shapes.
        """
        return {name: part.lower(batch) for name, part in self._parts.items()}

    @property
    def parts(self) -> dict[str | None, Part]:
        """Each teacher on its mesh, by name; one alone under None."""
        return dict(self._parts)

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
        self.teacher_seconds = 0.0
        """How long the host has been asking the teacher, and waiting for it."""

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
            asked = time.perf_counter()
            batch = self._teacher.with_outputs(item[0] if pair else item)
            self.teacher_seconds += time.perf_counter() - asked
            item = (batch, *item[1:]) if pair else batch
            self._queue.append((item, self._source_state()))
        if not self._queue:
            raise StopIteration
        # the queue holds back a host that is ahead of the teacher; an error of its
        # program is raised here, and not in the student's step
        item, state = self._queue[0]
        batch = item[0] if isinstance(item, tuple) else item
        waiting = time.perf_counter()
        jax.block_until_ready(batch["teacher"])
        self.teacher_seconds += time.perf_counter() - waiting
        self._queue.popleft()
        self._state = state
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


def _bytes_per_token(batch: Any, teacher: Any) -> float:
    """Of the arrays themselves; per example where there are no tokens."""
    rows = next(iter(jax.tree.leaves(batch))).shape[0]
    size = sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(teacher))
    return size / (rows * (tokens_of(batch) or 1))


def _axes(mesh: Any) -> str:
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return ",".join(sizes) or "data=1"


__all__ = ["Stream", "StreamedTeacher"]
