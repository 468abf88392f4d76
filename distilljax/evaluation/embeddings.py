"""Sentence embeddings measured: against the teacher's, and against people's judgement.

Each is a probe of a config: a frozen dataclass that is called with a model and its
forward, and returns numbers by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from distilljax._checks import check_count, check_instance, fail
from distilljax._functional import Forward
from distilljax.data.text.documents import Texts
from distilljax.data.text.padded import Padded
from distilljax.data.text.store import Tokenized
from distilljax.data.text.tokenizer import TokenizerConfig
from distilljax.sharding import replicated
from distilljax.terms import as_outputs

_BATCH = 50
EMBEDDING = "embedding"


def embed(
    model: nnx.Module, forward: Forward, rows: Iterable[Mapping[str, Any]]
) -> Float[np.ndarray, "rows width"]:
    """The feature `embedding` of each row.

    Args:
      model: The module, in inference mode while this lasts.
      forward: `(model, batch) -> Outputs` with that feature, such as
        `models.sentence_embedding`.
      rows: Examples as `data.text.Padded` has them.

    Returns:
      [rows, width], float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from distilljax.terms import Outputs
      >>> def forward(model, batch):
      ...     return Outputs(features={"embedding": model(batch["tokens"] * 1.0)})
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> embed(model, forward, [{"tokens": np.ones(2, np.int32)}] * 7).shape
      (7, 3)
    """
    model = nnx.merge(*nnx.split(model))
    model.eval()
    graphdef, state = nnx.split(model)
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:  # a teacher may have been loaded onto one device of it
        state = jax.device_put(state, replicated(mesh))

    @jax.jit
    def of_batch(state: Any, batch: Any) -> Any:
        outputs = as_outputs(forward(nnx.merge(graphdef, state), batch))
        if EMBEDDING not in outputs.features:
            fail(
                "embed",
                "the forward",
                f"return the feature {EMBEDDING!r}",
                sorted(outputs.features),
                "Pass models.sentence_embedding as student_forward.",
            )
        return outputs.features[EMBEDDING]

    rows = list(rows)
    found = []
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
        # one shape, one program: the last batch is filled up
        filled = some + [some[0]] * (_BATCH - len(some))
        batch = {name: np.stack([row[name] for row in filled]) for name in some[0]}
        found.append(np.asarray(of_batch(state, batch), np.float32)[: len(some)])
    return np.concatenate(found)


def cosines(x: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, " pairs"]:
    """The cosine of each pair of rows, in the order of `np.triu_indices(rows, 1)`.

    Args:
      x: Embeddings, of any length but 0.

    Example:
      >>> cosines(np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])).tolist()
      [1.0, 0.0, 0.0]
    """
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return (x @ x.T)[np.triu_indices(len(x), 1)]


@dataclass(frozen=True)
class TeacherSimilarity:
    """How much a model's embeddings of held-out texts are its teacher's.

    `cosine` is the mean over texts of the cosine with the teacher's embedding, for
    models of one width; `pair_correlation`, Pearson's, is that of the cosines between
    all pairs of texts, and asks nothing of the width.

    Example:
      >>> from distilljax.students import Pretrained
      >>> teacher = Pretrained("runs/teacher")
      >>> TeacherSimilarity(teacher, list, forward=embed).num_texts
      1000
    """

    teacher: Any
    """What loads the teacher: a callable without arguments, such as `Pretrained`."""
    texts: Any
    """What opens the held-out texts: a callable such as `data.text.Padded`."""
    forward: Forward
    """The teacher's forward."""
    num_texts: int = 1000
    """Of how many texts, evenly spaced in the source, all if it has fewer."""

    def __post_init__(self):
        check_instance("TeacherSimilarity", "teacher", self.teacher)
        check_count("TeacherSimilarity", "num_texts", self.num_texts, 2)

    def __call__(self, model: nnx.Module, forward: Forward) -> dict[str, Any]:
        """`cosine` (None where widths differ), `pair_correlation` and `num_texts`."""
        source = self.texts()
        number = min(self.num_texts, len(source))
        chosen = np.linspace(0, len(source) - 1, number).astype(int)
        rows = [source[int(i)] for i in chosen]
        ours, theirs = embed(model, forward, rows), self._teacher(rows)
        cosine = None
        if ours.shape == theirs.shape:
            products = np.sum(ours * theirs, axis=-1)
            lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
            cosine = float(np.mean(products / lengths))
        correlation = np.corrcoef(cosines(ours), cosines(theirs))[0, 1]
        return {
            "cosine": cosine,
            "pair_correlation": float(correlation),
            "num_texts": number,
        }

    def _teacher(self, rows: list[Any]) -> Float[np.ndarray, "rows width"]:
        return embed(self.teacher(), self.forward, rows)


# Where scripts/fetch_assets.sh unpacks them.
_FETCHED = "py/gensim/test/test_data"
_TEXTS, _JUDGEMENTS = "lee.cor", "similarities0-1.txt"


@dataclass(frozen=True)
class HumanSimilarity:
    """How well cosines follow people's judgement of 50 news texts, all 1,225 pairs.

    `pearson` is the correlation with the mean judgement of a pair. all-MiniLM-L6-v2 has
    .654, and latent semantic analysis about .6.

    Example:
      >>> from distilljax.data.text import TokenizerJson
      >>> HumanSimilarity("assets", TokenizerJson("encoder")).context
      128

    Reference: Lee, Pincombe, Welsh, "An empirical evaluation of models of text document
    similarity", CogSci 2005.
    """

    directory: str
    """Holds lee.cor and similarities0-1.txt, or is what `scripts/fetch_assets.sh DIR
    lee` filled."""
    tokenizer: TokenizerConfig
    """The tokenizer of the models."""
    context: int = 128
    """Tokens of a text, at most."""

    def __call__(self, model: nnx.Module, forward: Forward) -> dict[str, Any]:
        """`pearson` and `num_pairs`."""
        texts, judged = self._read()
        tokenized = Tokenized(Texts(texts), self.tokenizer)
        rows = Padded(tokenized, self.context)()
        if len(rows) != len(texts):
            raise ValueError(f"HumanSimilarity: {len(rows)} of {len(texts)} texts left")
        found = cosines(embed(model, forward, rows))
        return {
            "pearson": float(np.corrcoef(found, judged)[0, 1]),
            "num_pairs": len(judged),
        }

    def _read(self) -> tuple[tuple[str, ...], Float[np.ndarray, " pairs"]]:
        folder = Path(self.directory)
        if not (folder / _TEXTS).exists():
            folder = folder / _FETCHED
        if not (folder / _TEXTS).exists():
            fail(
                "HumanSimilarity",
                "directory",
                f"hold {_TEXTS} and {_JUDGEMENTS}",
                self.directory,
                "Fetch them with scripts/fetch_assets.sh DIR lee.",
            )
        texts = (folder / _TEXTS).read_text(encoding="latin-1").splitlines()
        judged = np.loadtxt(folder / _JUDGEMENTS)
        if judged.shape != (len(texts), len(texts)):
            fail(
                "HumanSimilarity",
                _JUDGEMENTS,
                f"have a row and a column for each of {len(texts)} texts",
                judged.shape,
                "Fetch both files again.",
            )
        return tuple(texts), judged[np.triu_indices(len(texts), 1)]


__all__ = ["HumanSimilarity", "TeacherSimilarity", "cosines", "embed"]
