"""A teacher that was asked once: its signal is read from a store.

    distilljax cache CONFIG --out runs/store --kind sampled
    distilljax train CONFIG2 --workdir W     # teacher=CachedTeacher("runs/store")

or, in a loop of one's own::

    signals = CachedTeacher("runs/store")().of(source)
    step = make_distill_step(objective, teacher_head=signals.head)
    for batch in signals.on_host(loader(source, seed=0)):
        ...                                   # batch["teacher"]: Outputs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distilljax._checks import fail
from distilljax.data.text.progress import Progress, show_progress
from distilljax.data.units import num_units, units_fingerprint, units_of
from distilljax.losses import LinearHead
from distilljax.sharding import Rule, tree_shardings
from distilljax.teachers._records import checks_of, parts_of
from distilljax.teachers.store import SignalStore
from distilljax.terms import Outputs

# What stands where there is no signal: a loss is masked there, and may be anything.
_NOTHING = {"log_probs": -np.inf, "log_weights": -np.inf}


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher whose signal `distilljax cache` has written.

    Example:
      >>> CachedTeacher("runs/store").verify    # a config opens nothing
      True
    """

    store: str
    """Folder of the store."""
    teacher: Any = None
    """The teacher itself, for evaluation: KL and agreement on validation and test data;
    None: the student is measured alone, and no teacher is loaded."""
    verify: bool = True
    """Compare the checksum of every shard when the store is opened, at about 1 GB/s;
    False: only sizes, and what ArrayRecord checks of a record when it is read."""

    def __call__(self, progress: Progress = show_progress) -> OpenedTeacher:
        """Open the store."""
        return OpenedTeacher(
            SignalStore(self.store, verify=self.verify, progress=progress)
        )


class OpenedTeacher:
    """An opened store, that can be joined to its data.

    Attributes:
      store: The store.
    """

    def __init__(self, store: SignalStore):
        self.store = store

    @property
    def fingerprint(self) -> str:
        """Of the teacher that was asked, and of the store."""
        teacher = self.store.manifest["teacher"]["fingerprint"]
        return f"{teacher} (store {self.store.digest[:16]})"

    def check(self, fingerprint: str) -> None:
        """Raise unless the teacher that was asked has this fingerprint."""
        known = self.store.manifest["teacher"]["fingerprint"]
        if fingerprint != known:
            fail(
                "CachedTeacher",
                "teacher",
                f"be the one that the store {str(self.store.folder)!r} is of, {known}",
                fingerprint,
                "Name that one, or write a store of this one.",
            )

    @property
    def num_classes(self) -> int | None:
        """How many classes the teacher knows; None without logits."""
        return self.store.manifest["teacher"]["num_classes"]

    def of(
        self, source: Any, mesh: Mesh | None = None, rules: tuple[Rule, ...] = ()
    ) -> CachedSignals:
        """The signals of a source's examples.

        Args:
          source: What the batches are made of: the data that the teacher was asked
            about, in whatever order, packed anew or not.
          mesh: Where the kernel of the head shall lie; None: on one device.
          rules: Of its shards, as of a teacher's parameters.

        Raises:
          ValueError: It is other data, or has another tokenizer.
        """
        data, folder = self.store.manifest["data"], str(self.store.folder)
        tokenizer = getattr(source, "tokenizer", None)
        own = None if tokenizer is None else tokenizer.fingerprint
        known = (self.store.manifest["tokenizer"] or {}).get("fingerprint")
        rewrite = f"Write one for this data: distilljax cache CONFIG --out {folder}-2."
        if own != known:
            fail(
                "CachedTeacher",
                "the tokenizer of the data",
                f"be that of the store {folder!r}, {known}",
                own,
                rewrite,
            )
        for what, theirs, ours in (
            ("the data", data["fingerprint"], units_fingerprint(source)),
            ("the number of its units", data["num_units"], num_units(source)),
        ):
            # None: of data that had no fingerprint; answers are compared one by one
            if theirs is not None and theirs != ours:
                fail(
                    "CachedTeacher",
                    what,
                    f"be that of the store {folder!r}, {theirs}",
                    ours,
                    rewrite,
                )
        return CachedSignals(self, source, _head(self.store.head, mesh, rules))


def _head(
    head: dict[str, Any] | None, mesh: Mesh | None, rules: tuple[Rule, ...]
) -> LinearHead | None:
    if head is None:
        return None
    head = head | {"tied": False}  # the kernel is stored as it is multiplied with
    arrays = {name: x for name, x in head.items() if isinstance(x, np.ndarray)}
    if mesh is None:
        arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    else:
        arrays = jax.device_put(arrays, tree_shardings(arrays, mesh, rules))
    return LinearHead(None, **{**head, **arrays})


class CachedSignals:
    """A provider: batches with what a store has for their examples.

    Attributes:
      head: The `LinearHead` without hidden states that the step needs; None for other
        signals.
      fingerprint: Of the teacher and of the store.
    """

    def __init__(self, opened: OpenedTeacher, source: Any, head: LinearHead | None):
        self.store, self.source, self.head = opened.store, source, head
        self.fingerprint = opened.fingerprint

    def on_host(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, each with ``teacher``; resumable, as they are.

        Args:
          batches: Of a loader over the source: ``index`` names the examples.
        """
        return _Joined(batches, self)

    def on_devices(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches: all has been read."""
        return batches

    def shapes(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch: its shapes have the signal's."""
        return batch

    def outputs(self, batch: Mapping[str, np.ndarray]) -> Outputs:
        """The teacher's outputs for a batch on the host, in NumPy arrays.

        Args:
          batch: Local rows, with their ``index``.
        """
        index = np.asarray(batch["index"])
        mask = mask_of(batch, self.store.manifest["signal"]["shape"])
        flat = mask.reshape(len(index), -1)
        keys, at, checks, rows = [], [], [], []
        for row, i in enumerate(index.tolist()):
            units = units_of(self.source, i)
            example = {n: batch[n][row] for n in _IDENTITY if n in batch}
            keys.append(units.keys)
            parts = parts_of(units, flat[row])
            at += [row * flat.shape[1] + part for part in parts]
            checks += checks_of(units, example, flat[row])
            rows += [i] * len(parts)
        units = self.store.units(np.concatenate(keys))
        for unit, place, check, i in zip(units, at, checks, rows, strict=True):
            if unit.check != check or unit.positions != len(place):
                self._refuse(i)
        places = np.concatenate(at)
        arrays, features = self.store.decode(units)
        lead = mask.shape
        spread = {name: _spread(name, x, places, lead) for name, x in arrays.items()}
        kind = self.store.kind
        return Outputs(
            None if kind is None else kind.logits(spread),
            {
                name: _spread(name, x[name], places, lead)
                if self.store.features[name][1]
                else x[name]
                for name, x in features.items()
            },
        )

    def _refuse(self, index: int) -> None:
        fail(
            "CachedTeacher",
            f"example {index}",
            "be as the teacher saw it when the store was written",
            "other tokens, inputs or positions that count",
            "Write the store again, or train on the data that it was written from. The "
            "inputs of the student alone may be augmented: "
            'Loader(augment=..., teacher_view="clean").',
        )


def mask_of(batch: Mapping[str, Any], shape: Sequence[int]) -> np.ndarray:
    """Which positions of a batch have a signal: those that are learnt.

    Args:
      batch: With ``index``, and ``loss_mask`` where not all positions count.
      shape: Positions of an example.
    """
    lead = (len(batch["index"]), *shape)
    mask = batch.get("loss_mask")
    if mask is not None and np.shape(mask) == lead:
        return np.asarray(mask) != 0
    return np.ones(lead, bool)


def check_unaugmented(function: str, loader: Any) -> None:
    """The teacher of a store saw the examples as they are: so must that of a run."""
    view = getattr(loader, "teacher_view", "same")
    if getattr(loader, "augment", None) is not None and view != "clean":
        fail(
            function,
            "loader.teacher_view",
            'be "clean" where the loader augments',
            repr(view),
            "A store has one signal for each example, of the example as it is, and the "
            "teacher would see others in training.",
        )
    for name in ("transforms", "eval_transforms"):
        if found := getattr(loader, name, None):
            fail(
                function,
                f"loader.{name}",
                "be left out for a cached teacher",
                found,
                "Transform the examples in their source, so that teacher and student "
                "see the same.",
            )


# What tells whether an example is the one that the teacher saw.
_IDENTITY = ("tokens", "inputs", "teacher_inputs")


def _spread(
    name: str, x: np.ndarray, places: np.ndarray, lead: tuple[int, ...]
) -> np.ndarray:
    """Arrays of the positions that count in an array of all positions."""
    size = int(np.prod(lead))
    shape = (size, *x.shape[1:])
    whole = np.full(shape, _NOTHING.get(name, 0), x.dtype)
    whole[places] = x
    return whole.reshape(*lead, *x.shape[1:])


class _Joined:
    """A resumable iterator over joined batches."""

    def __init__(self, batches: Any, signals: CachedSignals):
        self._batches, self._signals = iter(batches), signals

    def __iter__(self) -> _Joined:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        return {**batch, "teacher": self._signals.outputs(batch)}

    def get_state(self) -> Any:
        """That of the batches."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Continue where a state was taken."""
        self._batches.set_state(state)


__all__ = ["CachedSignals", "CachedTeacher", "OpenedTeacher", "mask_of"]
