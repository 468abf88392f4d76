"""A teacher, the data it is asked about, and what is kept of its answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distilljax._capture import teacher_with_features
from distilljax._checks import fail
from distilljax._functional import cast_batch, freeze
from distilljax.config import Config
from distilljax.data.prefetch import this_process
from distilljax.data.sources import Subset
from distilljax.data.units import Cover
from distilljax.losses import LinearHead
from distilljax.programs import Programs
from distilljax.sharding import batch_axes, batch_sharding
from distilljax.teachers._records import Unit, checks_of, pack, parts_of
from distilljax.teachers.cached import mask_of
from distilljax.teachers.placed import unplaced
from distilljax.teachers.signals import Coding, Kind
from distilljax.terms import as_outputs


@dataclass(frozen=True)
class Kept:
    """The form of what is kept, as the manifest has it.

    Attributes:
      num_classes: Of the teacher; None without logits.
      shape: Positions of an example: () for one, (time,) for a text.
      arrays: Of the logits' signal, the dtype and the shape at a position.
      features: The same of features, and whether they are there for each position.
    """

    num_classes: int | None
    shape: tuple[int, ...]
    arrays: dict[str, Any]
    features: dict[str, Any]

    @property
    def rank(self) -> int:
        """Axes of a mask: those of the positions, and the batch."""
        return 1 + len(self.shape)


@dataclass(frozen=True)
class Asked:
    """A teacher, and the rows that it reads.

    Attributes:
      config: Whose teacher and data they are.
      mesh: Where it runs.
      kind: What is kept of the logits; None: nothing.
      features: Which features are kept.
      source: The data.
      cover: Rows that have all of it once.
      teacher: The teacher as it was loaded.
    """

    config: Config
    mesh: Mesh
    kind: Kind | None
    features: tuple[str, ...]
    source: Any
    cover: Cover
    teacher: Any

    @classmethod
    def of(
        cls,
        config: Config,
        mesh: Mesh,
        kind: Kind | None,
        features: tuple[str, ...],
        programs: Programs,
    ) -> Asked:
        """Load the teacher of a config, and open its data."""
        config = replace(config, teacher=unplaced(config.teacher))
        source = programs.source(config.data, config.loader)
        if len(source) == 0:
            remedy = "Check its split, its slice and its paths."
            fail("cache", "the data", "have at least one example", 0, remedy)
        shards = prod(mesh.shape[axis] for axis in batch_axes(mesh))
        if config.eval_batch_size % shards:
            fail(
                "cache",
                "eval_batch_size",
                f"be a multiple of data x fsdp = {shards} devices",
                config.eval_batch_size,
                "So many rows the teacher reads at once.",
            )
        teacher = programs.teacher(config, mesh)
        return cls(config, mesh, kind, features, source, Cover(source), teacher)

    @cached_property
    def _frozen(self) -> tuple[Any, Any]:
        forward = self.config.teacher_forward
        named = teacher_with_features(self.teacher.module, forward, self.features)
        return freeze(*named, self._dtype)

    @property
    def _dtype(self) -> Any:
        dtype = self.config.compute_dtype
        return None if dtype == "float32" else jnp.dtype(dtype)

    @property
    def state(self) -> Any:
        """The teacher's arrays."""
        return self._frozen[1]

    def outputs(self, state: Any, batch: Any) -> Any:
        """All that the teacher says, as it would in the student's step."""
        return as_outputs(self._frozen[0](state, cast_batch(batch, self._dtype)))

    def _says(self, state: Any, batch: Any, rows: Any) -> dict[str, Any]:
        outputs = self.outputs(state, batch)
        features = {name: outputs.features[name] for name in self.features}
        logits = {} if self.kind is None else self.kind.of(outputs.logits, rows)
        return {"logits": logits, "features": features, "bad": _bad(outputs.logits)}

    @cached_property
    def _program(self) -> Any:
        return jax.jit(self._says, out_shardings=batch_sharding(self.mesh))

    @cached_property
    def reader(self) -> dict[str, int]:
        """Which run of a batch this process reads, and of how many."""
        return this_process(batch_sharding(self.mesh))

    @property
    def batch_size(self) -> int:
        """Rows of a batch that this process reads."""
        return self.config.eval_batch_size // self.reader["process_count"]

    def batches(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        """Rows of the cover, in batches of this process; the last one is padded."""
        chosen = Subset(self.cover, rows)
        loader = self.config.loader
        found = loader.eval_batches(chosen, batch_size=self.batch_size, labelled=False)
        for batch in found:
            at = batch["index"]
            yield {**batch, "index": np.where(at < 0, -1, rows[np.maximum(at, 0)])}

    def sent(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        """A batch on the devices, and the numbers of its rows."""
        sharding = batch_sharding(self.mesh)
        arrays = {name: x for name, x in batch.items() if name != "index"}
        rows = np.maximum(batch["index"], 0).astype(np.int32)
        return jax.make_array_from_process_local_data(sharding, (arrays, rows))

    def said(
        self, rows: np.ndarray, num_batches: int
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        """Batches of rows, and what is kept of each; the teacher runs one ahead.

        All processes must run as many batches, whatever they have to read.

        Args:
          rows: Rows of the cover.
          num_batches: How many batches; those beyond the rows are padding.
        """
        batches, before = self.batches(rows), None
        batch: dict[str, Any] = {}
        for _ in range(num_batches):
            padding = {**batch, "index": np.full(self.batch_size, -1)}
            batch = next(batches, padding)
            said = self._program(self.state, *self.sent(batch))
            if before is not None:
                yield before[0], jax.tree.map(local_rows, before[1])
            before = batch, said
        if before is not None:
            yield before[0], jax.tree.map(local_rows, before[1])

    @cached_property
    def kept(self) -> Kept:
        """The form of what is kept, found without compute."""
        batch = next(self.batches(np.zeros(1, np.int64)))
        sent = jax.eval_shape(lambda x: x, self.sent(batch))
        outputs = jax.eval_shape(self.outputs, self.state, sent[0])
        found = jax.eval_shape(self._says, self.state, *sent)
        lead = _lead(outputs.logits, batch)
        if self.kind is not None and outputs.logits is None:
            remedy = "Keep features alone: --kind none --features NAME."
            fail("cache", "the teacher", "have logits", "features alone", remedy)
        arrays = {
            name: {"dtype": str(x.dtype), "shape": list(x.shape[len(lead) :])}
            for name, x in found["logits"].items()
        }
        features = {}
        for name, x in found["features"].items():
            each = len(lead) > 1 and x.shape[: len(lead)] == lead
            if not each and hasattr(self.source, "units"):
                fail(
                    "cache",
                    f"the feature {name!r}",
                    f"be an array [batch, time, ...] = {lead}, where rows are packed",
                    x.shape,
                    "A piece of a text has its own part of it, or none.",
                )
            shape = x.shape[len(lead) if each else 1 :]
            features[name] = {"dtype": str(x.dtype), "shape": list(shape)}
            features[name]["per_position"] = each
        classes = None if self.kind is None else outputs.logits.shape[-1]
        return Kept(classes, tuple(lead[1:]), arrays, features)

    @cached_property
    def coding(self) -> Coding | None:
        """How the logits' signal is coded."""
        if self.kind is None or self.kept.num_classes is None:
            return None
        layout = {
            name: (a["dtype"], tuple(a["shape"]))
            for name, a in sorted(self.kept.arrays.items())
        }
        return self.kind.coding(self.kept.num_classes, layout, 1)

    def records(
        self, batch: dict[str, Any], said: Any, counts: dict[str, int]
    ) -> Iterator[bytes]:
        """The records of a batch's rows, one for each.

        Args:
          batch: The batch, with the numbers of its rows.
          said: What is kept of it, in NumPy arrays.
          counts: What is counted, here and in the next batches.
        """
        mask = mask_of(batch, self.kept.shape)
        for at, row in enumerate(batch["index"].tolist()):
            if row < 0:
                continue
            units = self.cover.units(row)
            flat = mask[at].reshape(-1)
            self._check_numbers(row, at, said, flat)
            checks = checks_of(units, {k: x[at] for k, x in batch.items()}, flat)
            kept = []
            for key, part, check in zip(
                units.keys.tolist(), parts_of(units, flat), checks, strict=True
            ):
                kept.append(Unit(key, check, len(part), self._unit(said, at, part)))
                counts["positions"] += len(part)
            counts["units"] += len(kept)
            counts["rows"] += 1
            yield pack(kept)

    def _check_numbers(self, row: int, at: int, said: Any, flat: np.ndarray) -> None:
        """What is learnt later is a number now."""
        bad = said["bad"] is not None and np.any(said["bad"][at].reshape(-1) & flat)
        for name, x in said["features"].items():
            each = self.kept.features[name]["per_position"]
            seen = x[at].reshape(len(flat), -1)[flat] if each else x[at]
            bad = bad or np.isnan(seen).any()
        if bad:
            fail(
                "cache",
                f"what the teacher says of row {row}, example {self.cover.where(row)},",
                "be numbers",
                "nan or inf",
                "Leave the example out, or run the teacher in float32.",
            )

    def _unit(self, said: Any, at: int, part: np.ndarray) -> bytes:
        """What is kept of some positions of a row."""

        def at_positions(x: np.ndarray) -> np.ndarray:
            return x[at].reshape(-1, *x.shape[self.kept.rank :])[part]

        data = []
        for name in sorted(self.features):
            x = said["features"][name]
            each = self.kept.features[name]["per_position"]
            x = at_positions(x) if each else x[at]
            data.append(np.ascontiguousarray(x).tobytes())
        if self.coding is not None:
            arrays = {name: at_positions(x) for name, x in said["logits"].items()}
            data.append(self.coding.encode(arrays))
        return b"".join(data)


def _bad(logits: Any) -> Any:
    """Where no distribution can be made of them; None if there are none."""
    if logits is None:
        return None
    if isinstance(logits, LinearHead):
        head = [x for x in (logits.kernel, logits.bias) if x is not None]
        whole = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in head]))
        return ~(jnp.isfinite(logits.hidden).all(axis=-1) & whole)
    return (jnp.isnan(logits) | jnp.isposinf(logits)).any(axis=-1)


def _lead(logits: Any, batch: dict[str, Any]) -> tuple[int, ...]:
    """The axes of positions, the batch first."""
    if logits is not None:
        return logits.shape[:-1]
    return np.shape(batch["loss_mask"])


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a batch that this process read."""
    pieces = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start].data) for start in sorted(pieces)])


__all__ = ["Asked", "Kept", "local_rows"]
