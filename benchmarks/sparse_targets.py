"""What a student learns from each form of a teacher's signal, through the store.

    python benchmarks/sparse_targets.py           # prints JSON; some minutes
    python benchmarks/sparse_targets.py --out benchmarks/results/sparse_targets.json

The teacher says the same at 4,000 positions: 512 classes with probabilities as rank to
the power of -1.2 (3.964 nats). It is asked once by `caching.cache`, in each form; a
student of 512 free logits is trained from the store by `train`, 3,000 steps of Adam; of
the sampled forms three times, from other draws. Reported are its KL from the teacher,
the error of its confidence, and the bias of the targets over 200,000 draws. After
"Sparse Logit Sampling" (arXiv 2503.16870), section 3.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import drawing
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distilljax import Outputs, losses, objectives, optimizers
from distilljax.caching import cache
from distilljax.config import Config
from distilljax.data import Arrays, Loader
from distilljax.metrics import write_atomically
from distilljax.programs import Programs
from distilljax.teachers import CachedTeacher, Dense, Sampled, TopK
from distilljax.train import train
from distilljax.workdir import TrainedRun, machine, today, versions

CLASSES, POSITIONS, STEPS, DRAWS = 512, 4000, 3000, 200_000
RANKS = np.arange(1, CLASSES + 1)
P = RANKS**-1.2 / np.sum(RANKS**-1.2)
SEEDS = (0, 1, 2)


class Logits(nnx.Module):
    """The same logits everywhere."""

    def __init__(self, values: Any):
        self.values = nnx.Param(jnp.asarray(values, jnp.float32))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[batch, classes]."""
        return jnp.broadcast_to(self.values[...], (len(inputs), CLASSES))


@dataclass(frozen=True)
class Zipf:
    """The teacher."""

    def __call__(self, mesh: Any = None, rules: Any = ()) -> nnx.Module:
        """Its logits."""
        del mesh, rules
        return Logits(np.log(P))


@dataclass(frozen=True)
class Free:
    """The student."""

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        """All logits at 0."""
        del rngs
        return Logits(np.zeros(CLASSES))


@dataclass(frozen=True)
class Target(objectives.LogitKD):
    """Distillation from what is made of a stored signal."""

    made: Callable[[Any], Any] | None = None

    def __call__(self, student: Any, teacher: Any, batch: Any) -> Any:
        """The terms of `LogitKD`."""
        signal = teacher.logits if self.made is None else self.made(teacher.logits)
        return super().__call__(student, Outputs(signal), batch)


def renormalised(sparse: losses.SparseLogits) -> losses.SparseLogits:
    """The stored classes as if they were all."""
    return sparse.renormalize()


def weighted(sample: losses.SampledLogits) -> losses.SparseLogits:
    """The classes that were drawn, with the teacher's probabilities, renormalised."""
    used = sample.log_weights > -jnp.inf
    log_p = jnp.where(used, jnp.log(jnp.asarray(P, jnp.float32))[sample.ids], -jnp.inf)
    empty = jnp.full((*log_p.shape[:-1], 1), -jnp.inf)
    return losses.SparseLogits(sample.ids, log_p, empty).renormalize()


ARMS = {
    "dense": (Dense(), None),
    "sampled 12": (Sampled(12), None),
    "sampled 50": (Sampled(50), None),
    "sampled 256": (Sampled(256), None),
    "one sample": (Sampled(1), None),
    "top 5 + tail": (TopK(5), None),
    "top 12 + tail": (TopK(12), None),
    "top 50 + tail": (TopK(50), None),
    "top 5 renormalised": (TopK(5), renormalised),
    "top 12 renormalised": (TopK(12), renormalised),
    "top 50 renormalised": (TopK(50), renormalised),
    "drawn 12, weights p": (Sampled(12), weighted),
    "drawn 50, weights p": (Sampled(50), weighted),
    "drawn 256, weights p": (Sampled(256), weighted),
}


def config(kind: Any, made: Any, seed: int) -> Config:
    return Config(
        name="sparse targets",
        student=Free(),
        teacher=Zipf(),
        objective=Target(made=made),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(5e-2, STEPS, warmup_steps=50),
            weight_decay=0.0,
        ),
        data=Arrays(np.zeros((POSITIONS, 1), np.float32)),
        loader=Loader(batch_size=500),
        steps=STEPS,
        log_every_steps=STEPS,
        eval_every_steps=STEPS,
        eval_batch_size=500,
        checkpoint_every_steps=STEPS,
        select=None,
        seed=seed,
    )


def learnt(kind: Any, made: Any, seed: int, folder: Path) -> dict[str, Any]:
    """A student's distribution after training from a store of its own."""
    if hasattr(kind, "seed"):
        kind = replace(kind, seed=seed)
    run, store = config(kind, made, seed), folder / "store"
    programs = Programs()
    manifest = cache(run, store, logits=kind, programs=programs)
    cached = replace(run, teacher=CachedTeacher(str(store)))
    train(cached, folder / "run", programs=programs)
    module: Any = TrainedRun(str(folder / "run"))()
    log_q = np.asarray(jax.nn.log_softmax(module.values[...]), np.float64)
    top = int(np.argmax(log_q))
    return {
        "kl": float(np.sum(P * (np.log(P) - log_q))),
        "calibration_error": float(abs(np.exp(log_q[top]) - P[top])),
        "bytes_per_position": manifest["counts"]["bytes"] / POSITIONS,
        "q": np.exp(log_q).tolist(),
    }


def bias(kind: Any, made: Any) -> dict[str, float]:
    """How far the mean target of many draws is from the teacher."""
    logits = jnp.log(jnp.asarray(P, jnp.float32))

    def target(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if isinstance(kind, Sampled):
            signal: Any = losses.SampledLogits.draw(key, logits, kind.num_samples)
            signal = signal.merge()
        else:
            signal = losses.SparseLogits.top_k(logits, kind.k)
        signal = signal if made is None else made(signal)
        weights = getattr(signal, "log_weights", getattr(signal, "log_probs", None))
        distinct = jnp.sum(weights > -jnp.inf)
        return jnp.zeros(CLASSES).at[signal.ids].add(jnp.exp(weights)), distinct

    many = DRAWS // 1000 if isinstance(kind, Sampled) else 1
    total, distinct = jax.jit(
        lambda keys: jax.lax.scan(
            lambda carry, some: (
                jax.tree.map(lambda c, x: c + x.sum(0), carry, jax.vmap(target)(some)),
                None,
            ),
            (jnp.zeros(CLASSES), jnp.zeros((), jnp.int32)),
            keys,
        )[0]
    )(jax.random.split(jax.random.key(0), (many, 1000)))
    mean = np.asarray(total, np.float64) / (many * 1000)
    return {
        "ids_per_position": float(distinct) / (many * 1000),
        "l1_bias": float(np.abs(mean - P).sum()),
        "head_ratio": float(mean[:5].sum() / P[:5].sum()),
        "tail_ratio": float(mean[100:].sum() / P[100:].sum()),
    }


def measure() -> dict[str, Any]:
    arms = {}
    for name, (kind, made) in ARMS.items():
        seeds = SEEDS if isinstance(kind, Sampled) else SEEDS[:1]
        found = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                found.append(learnt(kind, made, seed, Path(folder)))
        arms[name] = {
            **({} if isinstance(kind, Dense) else bias(kind, made)),
            "kl": [f["kl"] for f in found],
            "calibration_error": [f["calibration_error"] for f in found],
            "bytes_per_position": found[0]["bytes_per_position"],
            "q": found[0]["q"],
        }
        shown = {k: v for k, v in arms[name].items() if k != "q"}
        print(f"{name:22}", json.dumps(shown), flush=True)
    return {
        "format": 1, "date": today(), "versions": versions(), "machine": machine(),
        "classes": CLASSES, "positions": POSITIONS, "steps": STEPS, "draws": DRAWS,
        "teacher_entropy": float(-np.sum(P * np.log(P))), "arms": arms,
    }  # fmt: skip


def draw(found: dict[str, Any]) -> None:
    """KL and calibration error of each arm; what each has learnt, by rank."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = list(found["arms"])[::-1]
    colors = [
        drawing.GREEN if n == "dense" else drawing.BLUE if n.startswith("sampled")
        else drawing.GREY if "tail" in n or n == "one sample" else drawing.ORANGE
        for n in names
    ]  # fmt: skip
    with mpl.rc_context(drawing.STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 0.8, 1.2))
        for axis, key, title in (
            (left, "kl", "KL(teacher, student), nats"),
            (middle, "calibration_error", "error of the confidence"),
        ):
            values = [max(np.mean(found["arms"][n][key]), 1e-6) for n in names]
            axis.barh(
                names if axis is left else range(len(names)), values, color=colors
            )
            axis.set_xscale("log")
            axis.set_title(title)
            if axis is middle:
                axis.set_yticks([])
        right.loglog(RANKS, P, color=drawing.INK, lw=1, label="teacher")
        for name, color in (
            ("sampled 50", drawing.BLUE), ("top 12 + tail", drawing.GREY),
            ("drawn 50, weights p", drawing.PINK),
            ("top 50 renormalised", drawing.ORANGE),
        ):  # fmt: skip
            right.loglog(RANKS, found["arms"][name]["q"], color=color, lw=1, label=name)
        right.set_ylim(1e-6, 1)
        right.set_title("what is learnt, by the rank of the class")
        right.legend()
    drawing.write("sparse_targets", figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write JSON and the figure")
    parser.add_argument("--draw", action="store_true", help="draw --out alone")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.out.read_text()))
        return
    found = measure()
    if args.out:
        write_atomically(args.out, json.dumps(found, indent=1) + "\n")
        draw(found)


if __name__ == "__main__":
    main()
