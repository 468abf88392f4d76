"""Whether a store says what its teacher says, and what its coding costs.

`verify` asks the teacher again about some of the rows; `coding_kl` compares what is
decoded with what was coded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distilljax._checks import check_count, fail
from distilljax.asking import Asked
from distilljax.config import Config, from_json
from distilljax.data.hashing import derive_key, random_bits
from distilljax.losses import forward_kl
from distilljax.objectives import CrossEntropy
from distilljax.programs import Programs
from distilljax.sharding import mesh_from_string
from distilljax.teachers._records import parts_of
from distilljax.teachers.cached import mask_of
from distilljax.teachers.store import SignalStore
from distilljax.terms import complete_teacher, split_heads

# A machine with other instructions rounds otherwise; more than this is another teacher.
_RELATIVE, _SHARE, _KL = 1e-2, 0.02, 1e-3


def verify(
    folder: str | Path,
    *,
    num_rows: int = 32,
    mesh: str | None = None,
    eval_batch_size: int | None = None,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Compare every file of a store with its checksum, and some rows with the teacher.

    Args:
      folder: The store.
      num_rows: How many rows the teacher reads again, spread over all of them.
      mesh: Devices by axis; None: as when it was written.
      eval_batch_size: Rows that the teacher reads at once; None: as it was written.
      programs: What was loaded already.

    Returns:
      `same`: whether the answers agree, as far as another machine may round otherwise;
      and by how much they differ.

    Raises:
      ValueError: A file is damaged, or it is another teacher or other data.
    """
    check_count("verify", "rows", num_rows)
    store = SignalStore(folder)
    config = _config(store, {"mesh": mesh, "eval_batch_size": eval_batch_size})
    devices = mesh_from_string(config.mesh)
    with jax.set_mesh(devices):
        features = tuple(store.features)
        asked = Asked.of(config, devices, store.kind, features, programs or Programs())
        known = store.manifest["teacher"]["fingerprint"]
        if asked.teacher.fingerprint != known:
            fail(
                "verify",
                "the teacher",
                f"be the one that was asked, {known}",
                asked.teacher.fingerprint,
                "Its files have changed: restore them, or write the store again.",
            )
        order = np.argsort(
            random_bits(derive_key("verify"), np.arange(len(asked.cover)))
        )
        rows = np.sort(order[:num_rows])
        found = _compared(asked, store, rows)
    return {"store": str(folder), "files": "as written", "rows": len(rows), **found}


def _config(store: SignalStore, given: dict[str, Any]) -> Config:
    """What the store was written from, as far as it matters."""
    parts = {k: from_json(v) for k, v in store.manifest["config"].items()}
    parts |= {name: value for name, value in given.items() if value is not None}
    return Config(
        name="verify", student=None, objective=CrossEntropy(), steps=1, **parts
    )


def _compared(asked: Asked, store: SignalStore, rows: np.ndarray) -> dict[str, Any]:
    """How much what is stored of some rows differs from what the teacher says now."""
    again: dict[str, list[np.ndarray]] = {}
    keys = []
    for batch, said in asked.said(rows, -(-len(rows) // asked.batch_size)):
        mask = mask_of(batch, asked.kept.shape)
        for at, row in enumerate(batch["index"].tolist()):
            if row < 0:
                continue
            units = asked.cover.units(row)
            keys.append(units.keys)
            for part in parts_of(units, mask[at].reshape(-1)):
                for name, x in said["logits"].items():
                    flat = x[at].reshape(-1, *x.shape[asked.kept.rank :])
                    again.setdefault(name, []).append(flat[part])
            for name, x in said["features"].items():
                again.setdefault(f"features.{name}", []).append(
                    _of(asked, name, x[at], mask[at])
                )
    units = store.units(np.concatenate(keys))
    arrays, features = store.decode(units)
    now = {name: np.concatenate(parts) for name, parts in again.items()}
    report: dict[str, Any] = {"positions": sum(unit.positions for unit in units)}
    same = True
    if store.kind is not None:
        expected = _through(store, now)
        report["logits"], same = _difference(store.kind, expected, arrays)
    for name, stored in features.items():
        report[name], close = _relative(now[f"features.{name}"], stored[name])
        same &= close
    return {**report, "same": bool(same)}


def _of(asked: Asked, name: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A feature of one row as it is stored."""
    if not asked.kept.features[name]["per_position"]:
        return x[None]
    flat = x.reshape(-1, *x.shape[asked.kept.rank - 1 :])
    return flat[mask.reshape(-1)]


def _through(store: SignalStore, now: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the teacher says now, coded and decoded as the store's was."""
    assert store.coding is not None
    arrays = {k: x for k, x in now.items() if not k.startswith("features.")}
    count = len(next(iter(arrays.values())))
    return store.coding.decode([store.coding.encode(arrays)], np.array([count]))


def _difference(
    kind: Any, now: dict[str, np.ndarray], stored: dict[str, np.ndarray]
) -> tuple[dict[str, float], bool]:
    if kind.name == "sampled":
        different = float(np.mean(np.any(now["ids"] != stored["ids"], axis=-1)))
        return {"share_of_positions_that_differ": different}, different <= _SHARE
    if kind.name == "top_k":
        different = float(np.mean(np.any(now["ids"] != stored["ids"], axis=-1)))
        kl = max(bucketed_kl(kind.temperatures, now, stored).values())
        return {"share_of_positions_that_differ": different, "kl": kl}, kl <= _KL
    (name,) = stored
    return _relative(now[name], stored[name])


def _relative(now: np.ndarray, stored: np.ndarray) -> tuple[dict[str, float], bool]:
    now, stored = now.astype(np.float64), stored.astype(np.float64)
    largest = float(np.max(np.abs(now - stored), initial=0))
    size = float(np.sqrt(np.mean(stored**2))) if stored.size else 1.0
    relative = largest / max(size, 1e-30)
    return {"largest_difference": largest, "relative_to_rms": relative}, (
        relative <= _RELATIVE
    )


def bucketed_kl(
    temperatures: Sequence[float],
    exact: dict[str, np.ndarray],
    coded: dict[str, np.ndarray],
) -> dict[str, float]:
    """Mean KL of one top-k signal from another, at each temperature, in nats.

    Over the classes that both have, each by itself, and all others as one: a class that
    ties for the last place may be in one signal and not in the other.

    Args:
      temperatures: The grid.
      exact: Arrays of `SparseLogits`, [positions, ...].
      coded: The same of the other signal.
    """
    found = {}
    for g, t in enumerate(temperatures):
        p, q = _buckets(exact, coded, g, t), _buckets(coded, exact, g, t)
        with np.errstate(invalid="ignore"):
            terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
        found[str(t)] = float(terms.sum(axis=-1).mean())
    return found


def _buckets(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], g: int, t: float
) -> np.ndarray:
    """Log-probabilities of the classes of both by id, unused slots, and the rest."""
    places = np.argsort(one["ids"], axis=-1)
    ids = np.take_along_axis(one["ids"], places, -1)
    log_p = np.take_along_axis(one["log_probs"], places, -1).astype(np.float64) / t
    shared = np.stack([np.isin(a, b) for a, b in zip(ids, other["ids"], strict=True)])
    rest = np.where(shared, -np.inf, log_p)
    tail = one["log_tail"][:, g : g + 1].astype(np.float64)
    tail = np.logaddexp.reduce(np.concatenate([rest, tail], axis=-1), axis=-1)
    # shared classes first, in the order of their ids
    first = np.argsort(~shared, axis=-1, kind="stable")
    log_p = np.take_along_axis(np.where(shared, log_p, -np.inf), first, -1)
    log_p = np.concatenate([log_p, tail[:, None]], axis=-1)
    return log_p - np.logaddexp.reduce(log_p, axis=-1, keepdims=True)


def coding_kl(asked: Asked) -> dict[str, float] | None:
    """What the coding of the logits costs, in nats of KL, by temperature.

    Of the first batch, at the positions that count; None where nothing is lost.

    Args:
      asked: The teacher, its data, and the kind of signal.
    """
    kind: Any = asked.kind
    lossy = kind is not None and (
        (kind.name == "top_k" and kind.values != "float32")
        or (kind.name == "hidden" and kind.dtype != "same")
    )
    if kind is None or not lossy or jax.process_count() > 1:
        return None
    rows = np.arange(min(asked.batch_size, len(asked.cover)))
    ((batch, said),) = asked.said(rows, 1)
    mask = mask_of(batch, asked.kept.shape) & (batch["index"] >= 0).reshape(
        -1, *[1] * len(asked.kept.shape)
    )
    if not mask.any():
        return None
    exact = {name: x[mask] for name, x in said["logits"].items()}
    assert asked.coding is not None
    coded = asked.coding.decode([asked.coding.encode(exact)], np.array([mask.sum()]))
    if kind.name == "top_k":
        return bucketed_kl(kind.temperatures, exact, coded)
    return {"1.0": _hidden_kl(asked, batch, mask, coded["hidden"])}


def _hidden_kl(asked: Asked, batch: Any, mask: np.ndarray, hidden: np.ndarray) -> float:
    """KL of the teacher from what its rounded hidden states say."""
    whole = np.zeros((*mask.shape, hidden.shape[-1]), hidden.dtype)
    whole[mask] = hidden

    def compare(state: Any, batch: Any, whole: Any) -> Any:
        outputs = asked.outputs(state, batch)
        sent, head = split_heads(outputs)
        rounded = replace(sent, logits=replace(sent.logits, hidden=whole))
        student = complete_teacher(head, {"teacher": rounded})
        return forward_kl(student.logits, outputs.logits)

    sent, _ = asked.sent(batch)
    found = np.asarray(jax.jit(compare)(asked.state, sent, whole))
    return float(found[mask].mean())


__all__ = ["bucketed_kl", "coding_kl", "verify"]
