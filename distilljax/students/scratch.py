"""Students that are not the teacher's weights: fresh ones, and other checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distilljax._checks import check_count, fail
from distilljax.models.pretrained import load_pretrained
from distilljax.students.made import Made, check_layered, layer_pairs, made

# (the teacher's [vocab, width], the student's width) -> [vocab, student's width]
Narrowing = Callable[[Array, int], Array]


def from_scratch(
    config: Any, teacher: Any, rngs: nnx.Rngs, *, embedding: Narrowing | None = None
) -> Made:
    """A student with fresh parameters, its embedding perhaps the teacher's, narrowed.

    Args:
      config: What builds it, such as a `models.DecoderConfig`, of the teacher's
        vocabulary.
      teacher: The teacher: a module with `config`, `layers` and `embed`.
      rngs: Random streams of its parameters.
      embedding: `sliced_embedding`, `projected_embedding` or another function
        `(the teacher's embedding, width) -> embedding`; None starts it at random.

    Returns:
      The student; its layers belong to the teacher's at even distances.

    Example:
      >>> import dataclasses
      >>> from distilljax import models
      >>> config = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=4, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)
      >>> small = dataclasses.replace(config, width=16, num_layers=2, ffn_width=24)
      >>> made = from_scratch(
      ...     small, config(nnx.Rngs(0)), nnx.Rngs(1), embedding=projected_embedding)
      >>> made.layers, made.student.embed.embedding.shape
      ({'layers/0': 'layers/0', 'layers/1': 'layers/3'}, (64, 16))
    """
    student = config(rngs)
    _check_layers("from_scratch", student, teacher)
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        rule = f"have the teacher's vocabulary, of {theirs} tokens"
        remedy = "Logits are compared token by token: use the teacher's tokenizer."
        fail("from_scratch", "the student", rule, ours, remedy)
    if embedding is not None:
        ours, theirs = student.embed.embedding, teacher.embed.embedding[...]
        found = embedding(theirs, ours.shape[1])
        if found.shape != ours.shape:
            rule = f"return the shape {ours.shape} of the student's"
            fail("from_scratch", "embedding", rule, found.shape, "Keep the vocabulary.")
        ours.set_value(found.astype(ours.dtype))
    return _paired(student, teacher)


def from_checkpoint(path_or_id: str | Path, teacher: Any, **options: Any) -> Made:
    """A student that has been trained before: a smaller model of the same tokenizer.

    Models of one family pad their vocabularies to different sizes (Qwen2.5: 151,936 and
    152,064): `LogitKD(num_classes=)` is then the number of tokens that both know.

    Args:
      path_or_id: Of a model, as `models.load_pretrained` takes it.
      teacher: The teacher: a module with `config` and `layers`.
      **options: Of `models.load_pretrained`.

    Returns:
      The student; its layers belong to the teacher's at even distances.

    Example:
      >>> import tempfile
      >>> from distilljax import models
      >>> config = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)
      >>> with tempfile.TemporaryDirectory() as path:
      ...     models.save_pretrained(config(nnx.Rngs(0)), path)
      ...     made = from_checkpoint(path, config(nnx.Rngs(1)))
      >>> made.parameters.ratio
      1.0
    """
    student = load_pretrained(path_or_id, **options)
    _check_layers("from_checkpoint", student, teacher)
    return _paired(student, teacher)


def sliced_embedding(
    embedding: Float[Array, "vocab width"], width: int
) -> Float[Array, "vocab narrow"]:
    """The channels of an embedding that are largest over the vocabulary, in order.

    Example:
      >>> sliced_embedding(jnp.array([[1.0, 0.1, 2.0], [1.0, 0.1, 0.0]]), 2).tolist()
      [[1.0, 2.0], [1.0, 0.0]]
    """
    _check_narrower("sliced_embedding", embedding, width)
    sizes = jnp.linalg.norm(embedding.astype(jnp.float32), axis=0)
    kept = jnp.argsort(sizes, descending=True, stable=True)[:width]
    return jnp.take(embedding, jnp.sort(kept), axis=1)


def projected_embedding(
    embedding: Float[Array, "vocab width"], width: int
) -> Float[Array, "vocab narrow"]:
    """An embedding along its principal directions, the largest first.

    No other of this width is closer to the products between all pairs of tokens: it is
    embedding V, of the right singular vectors V that belong to the largest singular
    values, and (embedding V)(embedding V)' is the best approximation of that rank.

    Reference: Eckart and Young, "The approximation of one matrix by another of lower
    rank", Psychometrika, 1936.

    Example:
      >>> x = jnp.array([[3.0, 3.0], [1.0, -1.0], [-2.0, -2.0]])
      >>> along = projected_embedding(x, 1)[:, 0]                 # (1, 1) / sqrt(2)
      >>> [round(float(value), 3) for value in along]
      [4.243, 0.0, -2.828]
    """
    _check_narrower("projected_embedding", embedding, width)
    x_vd = embedding.astype(jnp.float32)
    _, vectors = jnp.linalg.eigh(x_vd.T @ x_vd)  # values ascend
    narrow_vn = x_vd @ vectors[:, ::-1][:, :width]
    # directions have no sign: that of most of the mass, whatever compiled it
    sign_n = jnp.where(jnp.sum(narrow_vn**3, axis=0) < 0, -1, 1)
    return (narrow_vn * sign_n).astype(embedding.dtype)


def _check_narrower(function: str, embedding: Array, width: int) -> None:
    check_count(function, "width", width)
    if width > embedding.shape[1]:
        rule = f"be at most that of the embedding, {embedding.shape[1]}"
        fail(function, "width", rule, width, "Start a wider student at random.")


def _check_layers(function: str, student: Any, teacher: Any) -> None:
    check_layered(function, "the student", student)
    check_layered(function, "teacher", teacher)


def _paired(student: Any, teacher: Any) -> Made:
    depths = student.config.num_layers, teacher.config.num_layers
    return made(student, teacher, layer_pairs(*depths))


__all__ = ["from_checkpoint", "from_scratch", "projected_embedding", "sliced_embedding"]
