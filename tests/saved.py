"""What a run has saved, as tests look at it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp


def saved_steps(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    found = (workdir / "checkpoints").glob("*")
    return sorted(int(p.name) for p in found if p.name.isdigit())


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, whatever devices it was written from."""
    path = str(workdir / "checkpoints" / str(step))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        ocp.checkpointables_metadata(path).metadata["state"],
    )
    found = {}
    tree = ocp.load_checkpointables(path, {"state": like})["state"]
    for key_path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        found[jax.tree_util.keystr(key_path)] = np.asarray(x)
    return found


def records(workdir: Path, split: str = "train") -> list[dict]:
    """The lines of metrics.jsonl of a split; one that is being written is left out."""
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["split"] == split:
            found.append(record)
    return found


def losses(workdir: Path) -> dict[int, float]:
    """The training loss by step, each of which was logged once."""
    found = records(workdir)
    assert len({r["step"] for r in found}) == len(found), "a step was logged twice"
    return {r["step"]: r["loss"] for r in found}
