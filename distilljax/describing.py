"""What a store says of itself: what it was written from, and the teacher's head."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from distilljax._checks import fail
from distilljax.asking import Asked
from distilljax.config import to_json
from distilljax.data.units import num_units, units_fingerprint
from distilljax.metrics import write_atomically
from distilljax.resume import differences
from distilljax.teachers.store import FORMAT, HEAD, sha256_of
from distilljax.terms import split_heads

# What of a config decides what its teacher says.
ASKED_PARTS = (
    "teacher", "teacher_forward", "teacher_rules", "compute_dtype", "data", "loader",
    "mesh", "eval_batch_size",
)  # fmt: skip


def described_of(asked: Asked) -> dict[str, Any]:
    """The manifest as far as it is known before anything is written."""
    config, kept, source = asked.config, asked.kept, asked.source
    tokenizer = getattr(source, "tokenizer", None)
    parts = {name: to_json(getattr(config, name)) for name in ASKED_PARTS}
    logits = None
    if asked.kind is not None:
        logits = {
            "kind": asked.kind.name,
            "options": json.loads(json.dumps(asdict(asked.kind))),
            "num_classes": kept.num_classes,
            "arrays": kept.arrays,
        }
    return {
        "format": FORMAT,
        "signal": {
            "logits": logits,
            "features": kept.features,
            "shape": list(kept.shape),
        },
        "teacher": {
            "fingerprint": asked.teacher.fingerprint,
            "num_classes": kept.num_classes,
        },
        "tokenizer": None
        if tokenizer is None
        else {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "data": {
            "fingerprint": units_fingerprint(source),
            "num_units": num_units(source),
        },
        "licenses": config.licenses,
        "config": parts,
    }


def check_same(path: Path, before: dict[str, Any], described: dict[str, Any]) -> None:
    """Raise unless what was begun is what is asked for now.

    Args:
      path: Where that is written down.
      before: What was begun.
      described: What is asked for.
    """
    known = {k: v for k, v in before.items() if k in described}
    found = differences(known, described)
    has_digest = described["data"]["fingerprint"] is not None
    found = {k: v for k, v in found.items() if not _is_free(k, has_digest)}
    if found:
        changed = "; ".join(f"{k}: {v}" for k, v in list(found.items())[:10])
        fail(
            "cache",
            "--out",
            "be of the same teacher, data and signal",
            f"{str(path.parent)!r}, which differs in {changed}",
            "Choose another folder.",
        )


def _is_free(path: str, has_digest: bool) -> bool:
    """Whether a field changes no answer, or is known by a fingerprint."""
    parts = path.split(".")
    if parts[0] != "config":
        return parts[0] == "versions"
    if parts[1] == "loader":
        return parts[2:3] not in (["scale"], ["flatten"])
    if parts[1] == "data":
        return has_digest
    return parts[1] in ("teacher", "teacher_rules", "mesh", "eval_batch_size")


def head_of(asked: Asked) -> Any:
    """The kernel of the teacher's head, on the host; None if nothing needs it."""
    if asked.kind is None or asked.kind.name != "hidden":
        return None
    batch, _ = asked.sent(next(asked.batches(np.zeros(1, np.int64))))

    def head(state: Any, batch: Any) -> Any:
        return split_heads(asked.outputs(state, batch))[1]

    found = jax.jit(head)(asked.state, batch)
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(found, tiled=True)
    return jax.device_get(found)


def write_head(out: Path, head: Any) -> dict[str, Any]:
    """Write the head's arrays to a file; return what the manifest says of it."""
    arrays, numbers, data = [], {"tied": head.tied}, b""
    for name in ("kernel", "bias", "softcap", "scale"):
        value = getattr(head, name)
        if value is None:
            continue
        x = np.asarray(value)
        if x.ndim == 0:
            numbers[name] = float(x)
            continue
        described = {"name": name, "dtype": str(x.dtype), "shape": list(x.shape)}
        arrays.append({**described, "offset": len(data)})
        data += np.ascontiguousarray(x).tobytes()
    write_atomically(out / HEAD, data)
    return {
        "bytes": len(data),
        "sha256": sha256_of(out / HEAD),
        "arrays": arrays,
        "numbers": numbers,
    }


__all__ = ["ASKED_PARTS", "check_same", "described_of", "head_of", "write_head"]
