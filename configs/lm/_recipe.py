"""What the recipes for pods share: their text, their arms, and their smallest form."""

from __future__ import annotations

from dataclasses import replace

from distilljax import data, models, objectives, optimizers, students
from distilljax.config import Config
from distilljax.data import text

CORPUS = ("data/text/*.parquet",)
SMOKE_TEXTS = tuple(
    f"{name} {verb} {place}. " * 3
    for name in ("Emma", "Anne", "Fanny", "Elinor")
    for verb in ("walks to", "writes from", "dreams of", "returns to")
    for place in ("Highbury", "Bath", "Portsmouth", "the sea", "Barton Cottage")
)


def rows(tokenizer: str, context: int, split: text.Split) -> text.Packed:
    """Packed rows of the corpus, one document in 1,000 held out."""
    documents = text.Tokenized(
        text.Parquet(CORPUS, field="text"), text.TokenizerJson(tokenizer)
    )
    return text.Packed(documents, context, split=split, validation_fraction=0.001)


def arms(
    full: Config, teacher: models.DecoderConfig, student: models.DecoderConfig
) -> dict[str, Config]:
    """The recipe, the student's labels alone on its budget, and the smallest form."""
    full = replace(full, baseline="labels")
    return {
        "labels": replace(
            full,
            objective=objectives.CrossEntropy(),
            baseline=None,
            expected=None,
            description="The same student on the text alone.",
        ),
        "distilled": full,
        "smoke": smoke(full, small(teacher, 4), small(student, 2)),
    }


def small(shape: models.DecoderConfig, num_layers: int) -> models.DecoderConfig:
    """The same family with few layers, narrow, for bytes as tokens."""
    kv_heads = 1 if shape.num_kv_heads < shape.num_heads else 2
    return replace(
        shape,
        vocab_size=264,
        width=16 * num_layers,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=kv_heads,
        head_dim=8,
        ffn_width=32,
        max_length=64,
        window=None if shape.window is None else 16,
        embed_scale=1.0 if shape.embed_scale == 1.0 else (16.0 * num_layers) ** 0.5,
        attention_scale=None if shape.attention_scale is None else 8**-0.5,
    )


def smoke(
    full: Config, teacher: models.DecoderConfig, student: models.DecoderConfig
) -> Config:
    """All that the recipe is, with random weights, on a few sentences."""

    def part(split: text.Split) -> text.Packed:
        documents = text.Tokenized(text.Texts(SMOKE_TEXTS), text.ByteTokenizer())
        return text.Packed(documents, 64, split=split, validation_fraction=0.2)

    return replace(
        full,
        name=f"{full.name} (smoke)",
        description="The smallest form: random weights, a few sentences.",
        baseline=None,
        expected=None,
        student=student,
        teacher=students.Untrained(teacher),
        optimizer=optimizers.AdamW(learning_rate=1e-2, clip_norm=1.0),
        data=part("train"),
        validation=part("validation"),
        test=part("validation"),
        # so many that they can be split over 32 devices, twice
        loader=data.Loader(batch_size=64),
        accumulate=min(full.accumulate, 2),
        steps=8,
        eval_every_steps=4,
        eval_batch_size=64,
        checkpoint_every_steps=4,
        log_every_steps=2,
        mesh="data=-1",
    )
