"""Whether data, teacher and student of a run mean the same by a token.

Equal sizes are no equal vocabulary, and unequal ones are often the same, padded: so the
tokens themselves are compared, wherever a model's files have them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from distilljax._checks import fail
from distilljax.config import Config
from distilljax.data.text import GgufTokenizer, Tokenizer, TokenizerJson
from distilljax.programs import Programs
from distilljax.students import Pretrained


def one_vocabulary(
    config: Config, programs: Programs, mesh: Mesh, source: Any
) -> Config:
    """The config for models whose classes are the tokens of a source.

    Where it is changed, a note on stderr says so.

    Args:
      config: The config.
      programs: What is compiled or loaded for it.
      mesh: Its devices.
      source: Of text; any other source changes nothing.

    Returns:
      The config, as `aligned` returns it.

    Raises:
      ValueError: As `check_tokenizers`.
    """
    tokenizer = getattr(source, "tokenizer", None)
    if tokenizer is None or len(source) == 0:
        return config
    check_tokenizers(config, tokenizer)
    teacher, student = programs.teacher(config, mesh), programs.student(config, mesh)
    if teacher is None:
        return config
    batch = next(config.loader.eval_batches(source, batch_size=1))
    sizes = student.num_classes(batch), teacher.num_classes(batch)
    config, said = aligned(config, tokenizer, *sizes)
    if said and jax.process_index() == 0:
        print(f"note: {said}", file=sys.stderr, flush=True)
    return config


def check_tokenizers(config: Config, tokenizer: Tokenizer) -> None:
    """The tokens of the data are those of every model that is loaded from files.

    A model is believed where there is nothing to compare: no tokenizer.json in its
    folder, as that of the hub before it is fetched, or none in a GGUF file that can be
    read.

    Args:
      config: Its teacher and student are searched for `Pretrained`.
      tokenizer: That of the data.

    Raises:
      ValueError: A token has another meaning; names the first one.
    """
    models = _pretrained((config.teacher, config.student))
    for path in sorted({model.path_or_id for model in models}):
        own = _tokenizer_of(Path(path))
        if own is not None and (found := differing(tokenizer, own)):
            fail(
                "train",
                "the tokenizer of the data",
                f"be that of {path}",
                found,
                "Name the model's own tokenizer in the config's data.",
            )


def check_same_tokens(name: str, part: Any, source: Any) -> None:
    """What a run is measured on has the tokens that it is trained on.

    Args:
      name: Of the split.
      part: Its source.
      source: The source of the data. Where either is no text, nothing is compared.

    Raises:
      ValueError: A token has another meaning; names the first one.
    """
    own, tokenizer = (getattr(x, "tokenizer", None) for x in (part, source))
    if own is None or tokenizer is None or own.fingerprint == tokenizer.fingerprint:
        return
    if found := differing(own, tokenizer):
        fail(
            "train",
            f"the tokenizer of {name}",
            "be that of the data",
            found,
            f"Name the same tokenizer in the config's data and {name}.",
        )


def differing(found: Tokenizer, known: Tokenizer) -> str | None:
    """How many tokens mean something else, and the first of them; None if none does."""
    shared = min(found.vocab_size, known.vocab_size)
    different = [i for i in range(shared) if found.token(i) != known.token(i)]
    if not different:
        return None
    first = different[0]
    return (
        f"{len(different):,} of {shared:,} tokens that differ; token {first} is "
        f"{found.token(first)!r}, and {known.token(first)!r} there"
    )


def _pretrained(part: Any) -> Iterator[Pretrained]:
    """All files that parts of a config name."""
    if isinstance(part, Pretrained):
        yield part
    elif isinstance(part, Mapping):
        yield from _pretrained(tuple(part.values()))
    elif isinstance(part, tuple | list):
        for inner in part:
            yield from _pretrained(inner)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield from _pretrained(getattr(part, field.name))


def _tokenizer_of(path: Path) -> Tokenizer | None:
    if path.suffix == ".gguf":
        try:
            return GgufTokenizer(str(path))()
        except ValueError:
            return None  # none that can be read: of SentencePiece, say
    if (path / "tokenizer.json").is_file():
        return TokenizerJson(str(path))()
    return None


def aligned(
    config: Config, tokenizer: Tokenizer, student: int | None, teacher: int | None
) -> tuple[Config, str | None]:
    """The config whose objective leaves out what is padding in one of the models.

    Models of one family pad their vocabularies to different sizes (Qwen2.5: 151,936 and
    152,064 for 151,665 tokens): the distribution is that over the tokens themselves.

    Args:
      config: The config.
      tokenizer: That of the data, whose tokens both models know.
      student: Classes of the student; None if it has no logits.
      teacher: Classes of the teacher; None if there is none, or it has no logits.

    Returns:
      The config, and a sentence for the log if it is another one.
    """
    objective = config.objective
    if student == teacher or student is None or teacher is None:
        return config, None
    if getattr(objective, "num_classes", 0) is not None:
        return config, None  # it has been said, or cannot be
    size = tokenizer.vocab_size
    if size > min(student, teacher):
        return config, None  # no padding: refused elsewhere
    said = (
        f"the student has {student:,} classes and the teacher {teacher:,}: the loss is "
        f"over the {size:,} tokens of the tokenizer, and the others are padding"
    )
    return replace(config, objective=replace(objective, num_classes=size)), said
