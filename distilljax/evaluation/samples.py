"""What a language model writes: a few continuations, to be read beside the numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from distilljax._checks import check_count, fail
from distilljax.losses import LinearHead
from distilljax.terms import as_outputs


@dataclass(frozen=True)
class Samples:
    """A probe of a config: the continuations of some prompts.

    The whole text is run again for every token, which no model needs to be made for;
    it is meant for a few hundred tokens.

    Attributes:
      prompts: Texts to continue.
      tokenizer: Config of the tokenizer that model and prompts share.
      num_tokens: How many tokens are written; fewer are shown if one ends the text.
      temperature: Of the sampling; 0 takes the likeliest token each time.
      seed: Of the sampling.

    Example:
      >>> from distilljax.data.text import TokenizerJson
      >>> Samples(("It was",), TokenizerJson("student")).num_tokens   # opens nothing
      40
    """

    prompts: tuple[str, ...]
    tokenizer: Callable[[], Any]
    num_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_count("Samples", "num_tokens", self.num_tokens)
        if not self.prompts or not all(self.prompts):
            rule, got = "be at least one text, none of them empty", self.prompts
            fail("Samples", "prompts", rule, got, "A model needs something to go on.")
        if not 0.0 <= self.temperature < np.inf:
            rule, remedy = "be finite and at least 0", "Use 0 for the likeliest text."
            fail("Samples", "temperature", rule, self.temperature, remedy)

    def __call__(self, model: nnx.Module, forward: Any) -> dict[str, str]:
        """Prompt -> what the model makes of it, the prompt left out.

        Args:
          model: A language model in inference mode.
          forward: `(model, batch) -> Outputs | logits`; its batch has `tokens` alone.
        """
        tokenizer = self.tokenizer()
        before = np.array(tokenizer.prefix, np.int32)  # as a text of the data begins
        prompts = [
            np.concatenate([before, encoded.ids])
            for encoded in tokenizer.encode(self.prompts)
        ]
        for prompt, ids in zip(self.prompts, prompts, strict=True):
            if len(ids) == 0:
                rule, remedy = "have tokens", "A model needs something to go on."
                fail("Samples", "every prompt", rule, repr(prompt), remedy)
        lengths = np.array([len(ids) for ids in prompts], np.int32)
        tokens = np.zeros((len(prompts), lengths.max() + self.num_tokens), np.int32)
        for row, ids in zip(tokens, prompts, strict=True):
            row[: len(ids)] = ids
        graphdef, state = nnx.split(model)
        vocab_size = tokenizer.vocab_size
        write = jax.jit(functools.partial(self._write, graphdef, forward, vocab_size))
        written = np.asarray(write(state, tokens, lengths))
        found = {}
        for prompt, row, length in zip(self.prompts, written, lengths, strict=True):
            new = row[length : length + self.num_tokens].tolist()
            if tokenizer.eos_id in new:
                new = new[: new.index(tokenizer.eos_id)]
            found[prompt] = tokenizer.decode(new)
        return found

    def _write(
        self,
        graphdef: Any,
        forward: Any,
        vocab_size: int,
        state: Any,
        tokens_bt: Int[Array, "batch time"],
        lengths_b: Int[Array, " batch"],
    ) -> Int[Array, "batch time"]:
        """A token for every row at a time; what follows a token does not change it."""
        key, rows = jax.random.key(self.seed), jnp.arange(tokens_bt.shape[0])

        def add(i: Array, tokens_bt: Array) -> Array:
            model = nnx.merge(graphdef, state, copy=True)
            logits: Any = as_outputs(forward(model, {"tokens": tokens_bt})).logits
            if vocab_size > logits.shape[-1]:
                rule = f"have at most the model's {logits.shape[-1]} tokens"
                remedy = "Use the tokenizer of the model."
                fail("Samples", "tokenizer", rule, vocab_size, remedy)
            last_b = lengths_b + i - 1
            z_bv = _at(logits, rows, last_b).astype(jnp.float32)
            if self.temperature == 0:
                new_b = jnp.argmax(z_bv, axis=-1)
            else:
                step_key = jax.random.fold_in(key, i)
                new_b = jax.random.categorical(step_key, z_bv / self.temperature)
            return tokens_bt.at[rows, last_b + 1].set(new_b.astype(tokens_bt.dtype))

        return jax.lax.fori_loop(0, self.num_tokens, add, tokens_bt)


def _at(logits: Any, rows: Array, places: Array) -> Array:
    """The logits [batch, vocab] at one position of each row."""
    if isinstance(logits, LinearHead):
        return replace(logits, hidden=logits.hidden[rows, places]).logits()
    return logits[rows, places]
