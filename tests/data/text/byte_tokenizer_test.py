"""Bytes as tokens."""

from __future__ import annotations

import hypothesis
import numpy as np
from hypothesis import strategies

from distilljax.data.text import ByteTokenizer, Tokenizer

TOKENIZER = ByteTokenizer()()


def test_it_is_a_tokenizer():
    assert isinstance(TOKENIZER, Tokenizer)
    assert TOKENIZER.token(65) == "<0x41>"
    assert TOKENIZER.token(TOKENIZER.eos_id) == "</s>"


@hypothesis.given(strategies.text())
def test_any_text_comes_back_and_counts_its_bytes(text):
    encoded = TOKENIZER.encode([text], with_starts=True)[0]
    ids = encoded.ids.tolist()
    assert TOKENIZER.decode([*ids, TOKENIZER.eos_id]) == text
    assert TOKENIZER.num_bytes()[[*ids, 256]].sum() == len(text.encode())
    starts = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
    np.testing.assert_array_equal(encoded.starts, starts)
