"""What a model writes, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax.data.text.tokenizer import Encoded
from distilljax.evaluation import Samples
from distilljax.losses import LinearHead
from distilljax.models import DecoderConfig
from distilljax.terms import Outputs


class Letters:
    """Each letter from a to z is a token; z ends a text."""

    eos_id, vocab_size, prefix = 25, 26, ()

    def encode(self, texts, *, with_starts=False):
        return [Encoded(np.array([ord(c) - 97 for c in t], np.int32)) for t in texts]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


@dataclass(frozen=True)
class LettersConfig:
    def __call__(self) -> Letters:
        return Letters()


class Next(nnx.Module):
    """Says the next letter of the alphabet."""

    def __call__(self, tokens):
        return 9.0 * jax.nn.one_hot((tokens + 1) % 26, 26)


class NextAsHead(nnx.Module):
    def __call__(self, tokens):
        hidden = jax.nn.one_hot(tokens, 26)
        return Outputs(LinearHead(hidden, 9.0 * jnp.roll(jnp.eye(26), 1, axis=1)))


def forward(model, batch):
    return model(batch["tokens"])


@pytest.mark.parametrize("model", [Next(), NextAsHead()], ids=["logits", "head"])
def test_prompts_of_any_length_go_on_where_they_end(model):
    samples = Samples(("a", "defg", "w"), LettersConfig(), num_tokens=3)
    assert samples(model, forward) == {"a": "bcd", "defg": "hij", "w": "xy"}


def test_a_decoder_writes_what_it_finds_likeliest_one_at_a_time():
    model = DecoderConfig(
        vocab_size=26, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        ffn_width=24,
    )(nnx.Rngs(3))  # fmt: skip
    text = [0, 5, 7]
    for _ in range(6):
        logits = model(jnp.array([text])).logits.logits()
        text.append(int(jnp.argmax(logits[0, -1])))
    expected = Letters().decode(text[3:]).split("z")[0]
    samples = Samples(("afh", "q"), LettersConfig(), num_tokens=6)
    assert samples(model, forward)["afh"] == expected


def test_a_temperature_draws_and_a_seed_repeats():
    def written(**fields):
        samples = Samples(("abc",), LettersConfig(), num_tokens=20, **fields)
        return samples(Next(), forward)["abc"]

    assert written(temperature=9.0) == written(temperature=9.0)
    assert written(temperature=9.0) != written(temperature=9.0, seed=1)
    assert written(temperature=0.1, seed=1) == written()


class Prefixed(Letters):
    prefix = (3,)


class Wide(Letters):
    vocab_size = 27


@dataclass(frozen=True)
class Kind:
    kind: type

    def __call__(self):
        return self.kind()


class Count(nnx.Module):
    """Says the letter of how many tokens came before."""

    def __call__(self, tokens):
        places = jnp.arange(tokens.shape[1])[None] + 0 * tokens
        return 9.0 * jax.nn.one_hot(places, 26)


def test_a_prompt_begins_as_the_texts_of_the_data_do():
    for kind, expected in ((Letters, "bc"), (Prefixed, "cd")):
        samples = Samples(("xy",), Kind(kind), num_tokens=2)
        assert samples(Count(), forward) == {"xy": expected}


def test_tokens_that_a_model_has_not_and_prompts_without_any_are_errors():
    with pytest.raises(ValueError, match="tokenizer must have at most the model's 26"):
        Samples(("a",), Kind(Wide), num_tokens=2)(Next(), forward)

    class Nothing(Letters):
        def encode(self, texts, *, with_starts=False):
            return [Encoded(np.zeros(0, np.int32)) for _ in texts]

    with pytest.raises(ValueError, match="every prompt must have tokens, got 'a'"):
        Samples(("a",), Kind(Nothing), num_tokens=2)(Next(), forward)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": ()}, "prompts must be at least one text, none of them empty"),
        ({"prompts": ("a", "")}, "none of them empty"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1"),
        ({"num_tokens": 0}, "num_tokens must"),
    ],
)
def test_what_cannot_be_written_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Samples(**{"prompts": ("a",), "tokenizer": LettersConfig(), **fields})
