"""From the host to the devices, ahead of the step that needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from distilljax._checks import fail
from distilljax.data.finish import Batch

DeviceBatch = dict[str, jax.Array]


class DevicePrefetch:
    """The iterator that `prefetch_to_device` returns; resumable if its batches are."""

    def __init__(
        self,
        batches: Iterable[Batch],
        sharding: jax.sharding.Sharding,
        depth: int,
        check: Callable[[Batch], None] | None,
    ):
        self._batches: Any = iter(batches)
        self._sharding = sharding
        self._check_rows = check
        self._depth = depth
        self._queue: deque[tuple[DeviceBatch, np.ndarray, dict[str, int] | None]]
        self._queue = deque()
        self._state = self._source_state()
        self._checked = False

    def __iter__(self) -> DevicePrefetch:
        """Itself."""
        return self

    def __next__(self) -> tuple[DeviceBatch, np.ndarray]:
        """The next batch on the devices, and the index of its local rows."""
        while len(self._queue) < self._depth:
            try:
                batch = next(self._batches)
            except StopIteration:
                break
            self._queue.append(self._sent(batch))
        if not self._queue:
            raise StopIteration
        arrays, index, self._state = self._queue.popleft()
        return arrays, index

    def get_state(self) -> dict[str, int]:
        """The state after the batch last yielded: what is on its way does not count."""
        if self._state is None:
            fail(
                "get_state",
                "batches",
                "have a get_state of their own",
                type(self._batches).__name__,
                "Prefetch the iterator of a Loader.",
                TypeError,
            )
        return self._state

    def set_state(self, state: dict[str, int]) -> None:
        """Continue where ``state`` was taken; what is on its way is dropped."""
        self._batches.set_state(state)
        self._queue.clear()
        self._state = self._source_state()

    def _source_state(self) -> dict[str, int] | None:
        get_state = getattr(self._batches, "get_state", None)
        return None if get_state is None else get_state()

    def _sent(
        self, batch: Batch
    ) -> tuple[DeviceBatch, np.ndarray, dict[str, int] | None]:
        rows = {name: array for name, array in batch.items() if name != "index"}
        if not self._checked:
            self._check(batch["index"])
            self._checked = True
        if self._check_rows is not None:
            self._check_rows(batch)
        # With several processes jax counts this as an implicit transfer, though it can
        # hardly be said more explicitly.
        with jax.transfer_guard_host_to_device("allow"):
            arrays = jax.make_array_from_process_local_data(self._sharding, rows)
        return arrays, batch["index"], self._source_state()

    def _check(self, index: np.ndarray) -> None:
        rows = len(index) * this_process(self._sharding)["process_count"]
        try:
            self._sharding.shard_shape((rows,))
        except ValueError as error:
            fail(
                "prefetch_to_device",
                "sharding",
                f"split the {rows} rows of a batch evenly",
                f"{len(self._sharding.device_set)} devices ({error})",
                "Change the batch size, or the data axes of the mesh.",
            )


def this_process(sharding: jax.sharding.Sharding) -> dict[str, int]:
    """Which run of a batch this process reads, and of how many, as loaders take it.

    Processes whose devices hold the same rows, because an axis that does not split the
    batch lies across them, read the same run.
    """
    held = _held(sharding, (sharding.num_devices,))
    runs = sorted(set(held.values()))
    own = runs.index(held[jax.process_index()])
    return {"process_index": own, "process_count": len(runs)}


def as_read(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """The rows of a global batch in the order in which they were read, run by run."""
    runs = sorted(set(_held(sharding, shape).values()))
    return np.concatenate([np.arange(*piece) for run in runs for piece in run])


def _held(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> dict[int, tuple[tuple[int, int], ...]]:
    """The pieces of the first axis that each process holds, from where to where."""
    held: dict[int, set[tuple[int, int]]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(shape[0])
        held.setdefault(device.process_index, set()).add((start, stop))
    return {process: tuple(sorted(pieces)) for process, pieces in held.items()}


def prefetch_to_device(
    batches: Iterable[Batch],
    sharding: jax.sharding.Sharding,
    depth: int = 2,
    check: Callable[[Batch], None] | None = None,
) -> DevicePrefetch:
    """Global arrays from each process's local batches, sent ahead of their use.

    Yields pairs: the batch as a dict of global `jax.Array`, and the local ``index``,
    which stays a NumPy array on the host (it names examples in errors and caches; a
    step has no use for it, and jax would cut its 64 bits). ``get_state`` is that of the
    batch last yielded, however many are on their way.

    No thread: transfers and steps are asynchronous, so the host prepares batch k +
    depth while the devices work on batch k, and readers that decode have threads of
    their own. Thus an error in the data is raised here, with the traceback of where it
    happened, and the state is still that of the last good batch. Only explicit
    transfers are made: it works under ``jax.transfer_guard("disallow")``.

    Args:
      batches: What a Loader or `eval_batches` returned, for the run of the batch that
        this process is to read. Its rows lie where its devices do: in one piece, if the
        mesh orders them so.
      sharding: Of every array; its first axis is the batch.
      depth: How many batches are on the devices or on their way, besides the one that
        was last yielded.
      check: Called with each batch on the host, before it is sent; raises if it is bad.

    Example:
      >>> batch = {"inputs": np.ones((2, 3), np.float32), "index": np.arange(2)}
      >>> one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      >>> for arrays, index in prefetch_to_device([batch], one):
      ...     print(float(arrays["inputs"].sum()), index.tolist())
      6.0 [0, 1]
    """
    if depth < 1:
        fail("prefetch_to_device", "depth", "be at least 1", depth, "2 is common.")
    return DevicePrefetch(batches, sharding, depth, check)
