"""What lies around the step of `lm.py`: a whole run on text, and loading a teacher."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_steps import BATCH, TIME, TX, batch_of, config_of
from lm_worker import forget_peak, size_of_process

from distilljax import make_distill_step, objectives, optimizers
from distilljax.config import Config
from distilljax.data import Loader
from distilljax.data.text import Jsonl, Packed, Tokenized, TokenizerJson
from distilljax.models import DecoderConfig, load_pretrained, save_pretrained
from distilljax.train import train

OBJECTIVE = objectives.LogitKD(temperature=1.0, ce_weight=0.0)
CHECKPOINT = DecoderConfig(
    vocab_size=32000,
    width=1024,
    num_layers=17,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    ffn_width=2816,
)
"""1.0 GB in float32."""


@dataclass(frozen=True)
class Untrained:
    """A teacher that has learnt nothing: what it costs is what a trained one costs."""

    model: DecoderConfig
    """The spec of its module."""

    def __call__(self, mesh: Any = None, rules: Any = ()) -> nnx.Module:
        """The module, on one device."""
        del mesh, rules
        return self.model(nnx.Rngs(0))


def write_text(folder: Path, num_rows: int) -> Packed:
    """Random words in documents of all lengths, with a tokenizer of theirs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(4000)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(2 * num_rows):
            text = " ".join(rng.choice(words, rng.integers(10, 2 * TIME)))
            file.write(json.dumps({"text": text}) + "\n")
    texts = Jsonl((str(folder / "text.jsonl"),))
    return Packed(Tokenized(texts, TokenizerJson(str(folder))), TIME)


def whole_run(steps: int, rounds: int) -> dict[str, Any]:
    """`train` with data, metrics and checkpoints against its own bare step."""
    student = config_of("vocabulary", "student")
    teacher = Untrained(config_of("vocabulary", "teacher"))
    module = student(nnx.Rngs(1))
    step = make_distill_step(OBJECTIVE, teacher(), student=module, tx=TX)
    tokens = batch_of("vocabulary")["tokens"]
    places = jnp.broadcast_to(jnp.arange(TIME), tokens.shape)
    batch = {
        "tokens": tokens,
        "positions": places,
        "segment_ids": jnp.ones_like(tokens),
        "labels": tokens,
        "loss_mask": jnp.ones(tokens.shape, bool),
    }

    def bare(state: Any) -> Any:
        for _ in range(steps):
            state, _ = step.pure(state, step.teacher_state, batch)
        return jax.block_until_ready(state)

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            name="benchmark",
            student=student,
            objective=OBJECTIVE,
            teacher=teacher,
            data=write_text(Path(folder), BATCH * steps),
            loader=Loader(BATCH),
            optimizer=optimizers.AdamW(1e-3),
            steps=steps,
            select=None,
            log_every_steps=max(steps // 6, 1),
            checkpoint_every_steps=max(steps // 2, 1),
        )
        state = bare(step.init(module))  # compiles
        rates = []
        for round_ in range(rounds):
            start = time.perf_counter()
            state = bare(state)
            bare_rate = steps / (time.perf_counter() - start)
            rates.append((run_rate(config, Path(folder) / str(round_)), bare_rate))
    tokens_in_step = BATCH * TIME
    run, alone = zip(*rates, strict=True)
    return {
        "steps": steps,
        "train_tokens_per_second": round(statistics.median(run) * tokens_in_step),
        "bare_tokens_per_second": round(statistics.median(alone) * tokens_in_step),
        "ratio": round(statistics.median(a / b for a, b in rates), 3),
    }


def run_rate(config: Config, workdir: Path) -> float:
    """Steps per second of a run, from its second record on: the first one compiles."""
    train(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    windows = [record for record in records if record["split"] == "train"]
    first, last = windows[0], windows[-1]
    return (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])


def loading(env: dict[str, str], small: bool = False) -> dict[str, Any]:
    """Peak of a process that loads a checkpoint of 1 GB, and what it holds then."""
    write = "write_small" if small else "write"

    def in_a_process(word: str, path: str) -> Any:
        command = [sys.executable, __file__, word, path]
        done = subprocess.run(
            command, env=env, check=True, stdout=subprocess.PIPE, text=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory() as folder:
        in_a_process(write, folder)
        return in_a_process("load", folder)


def load(path: str) -> dict[str, Any]:
    """In a process of its own."""
    jax.block_until_ready(jnp.zeros(1))  # the backend starts
    forget_peak()
    level = size_of_process("VmRSS")
    start = time.perf_counter()
    model = load_pretrained(path)
    jax.block_until_ready(nnx.state(model))
    seconds = time.perf_counter() - start
    held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    peak = size_of_process("VmHWM") - level
    return {
        "held_bytes": held,
        "peak_bytes": peak,
        "ratio": round(peak / held, 3),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """One part, in a process of its own."""
    word, path = sys.argv[1:]
    if word.startswith("write"):
        small = replace(CHECKPOINT, num_layers=1)
        made = small if word == "write_small" else CHECKPOINT
        save_pretrained(made(nnx.Rngs(0)), path)
        print(json.dumps({}))
    else:
        print(json.dumps(load(path)))


if __name__ == "__main__":
    main()
