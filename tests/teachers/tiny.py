"""Small things that a teacher is asked about: packed text, a mixture, and digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distilljax import Outputs, models, objectives, optimizers, students
from distilljax.config import Config
from distilljax.data import Arrays, Loader
from distilljax.data.text import ByteTokenizer, Mixture, Packed, Texts, Tokenized

TEXTS = tuple(
    f"{name} {verb} {place}. " * repeats
    for name in ("Emma", "Anne")
    for verb, repeats in (("walks to", 1), ("dreams of", 4))
    for place in ("Bath", "the sea", "Highbury")
)
DECODER = models.DecoderConfig(
    vocab_size=264, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    ffn_width=24,
)  # fmt: skip
OTHERS = Tokenized(Texts(tuple(text.upper() for text in TEXTS)), ByteTokenizer())


def rows(texts: Tokenized | None = None, **fields: Any) -> Packed:
    text = texts or Tokenized(Texts(TEXTS), ByteTokenizer())
    return Packed(text, fields.pop("context", 32), **fields)


def text_config(**fields: Any) -> Config:
    """A language model of half the layers, and its teacher."""
    config = Config(
        name="tiny",
        student=replace(DECODER, num_layers=1),
        teacher=students.Untrained(DECODER, seed=7),
        objective=objectives.LogitKD(),
        optimizer=optimizers.AdamW(learning_rate=1e-2),
        data=rows(),
        loader=Loader(batch_size=8),
        steps=6,
        log_every_steps=1,
        eval_every_steps=100,
        eval_batch_size=8,
        select=None,
    )
    return replace(config, **fields)


def mixture() -> Mixture:
    return Mixture({"a": rows(), "b": rows(OTHERS)}, {"a": 3, "b": 1})


def digits(count: int = 40, classes: int = 10, **more: np.ndarray) -> Arrays:
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 17, (count, 4, 4, 1), np.uint8)
    return Arrays(inputs, rng.integers(0, classes, count), classes, extra=more)


@dataclass(frozen=True)
class Seeded:
    """A network with the same parameters each time."""

    model: models.MLP
    seed: int = 3

    def __call__(self, mesh: Any = None, rules: Any = ()) -> nnx.Module:
        del mesh, rules
        return self.model(nnx.Rngs(self.seed))


MLP = models.MLP(num_features=16, hidden=(8,), num_classes=10)


def image_config(**fields: Any) -> Config:
    config = Config(
        name="tiny images",
        student=MLP,
        teacher=Seeded(replace(MLP, hidden=(16,))),
        objective=objectives.LogitKD(temperature=2.0),
        data=digits(),
        loader=Loader(batch_size=8, scale=16.0, flatten=True),
        steps=12,
        log_every_steps=1,
        eval_every_steps=100,
        eval_batch_size=16,
        select=None,
    )
    return replace(config, **fields)


@dataclass(frozen=True)
class Telling:
    """A teacher without parameters of interest."""

    def __call__(self, mesh: Any = None, rules: Any = ()) -> Any:
        return Seeded(MLP)()


def tell(model: Any, batch: Any) -> Any:
    """Logits that are the token and its position: whole numbers, and so exact."""
    del model
    found = jnp.stack([batch["tokens"], batch["positions"]], axis=-1)
    return Outputs(found.astype(jnp.float32))


def zipf(shape: tuple[int, ...], classes: int, seed: int = 0) -> jax.Array:
    """Logits of language models' shape, of different classes at each position."""
    order = jax.random.uniform(jax.random.key(seed), (*shape, classes))
    ranks = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
    return -1.2 * jnp.log1p(ranks)


def files(folder: Path) -> dict[str, bytes]:
    """All files of a store, by name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}
