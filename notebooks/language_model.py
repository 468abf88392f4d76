# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/distilljax/distilljax/blob/main/notebooks/language_model.ipynb)
#
# # A language model from half of another's layers
#
# A decoder learns to write about Python from Python's own help. Then half of its layers are
# kept, and taught by all of them: is that better than learning from the text again? Here the
# models are small enough for a CPU of two cores, three minutes in all. Put the name of a model
# on the Hugging Face hub where it says so, and the same cells distil that.

# %%
# On Colab only, and before jax is imported: the jax that comes with the image is too old.
import sys

if "google.colab" in sys.modules:
    source = "git+https://github.com/distilljax/distilljax"
    get_ipython().run_line_magic(
        "pip", f'install -q "jax[tpu]" "distilljax[train,report,text,llm] @ {source}"'
    )

# %%
import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from pydoc_data.topics import topics

from distilljax import data, evaluation, models, objectives, optimizers, students
from distilljax.config import Config
from distilljax.data import text
from distilljax.train import train
from distilljax.workdir import TrainedRun

# %% tags=["parameters"]
# @title Settings
teacher_steps = 900  # @param {type:"integer"}
student_steps = 60  # @param {type:"integer"}
num_seeds = 1  # @param {type:"integer"}
width = 64  # @param {type:"integer"}

# %% [markdown]
# ## Text
#
# Documents and a tokenizer become rows: each is filled with several documents, whose tokens do
# not see each other's. One document in ten is held out, by a hash of its text. Bytes are the
# tokens here, so that no file is needed; a model of the hub has `text.TokenizerJson(folder)`.

# %%
folder = Path(tempfile.mkdtemp())
documents = text.Texts(tuple(topics[name] for name in sorted(topics)))
tokens = text.Tokenized(documents, text.ByteTokenizer(), cache_dir=str(folder / "tokens"))
packed = functools.partial(text.Packed, tokens, 128, validation_fraction=0.1)
rows, held_out = packed(split="train"), packed(split="validation", repack=False)

row = rows()[0]
print(f"{len(rows()):,} rows, {len(held_out()):,} held out; the first one:")
print(text.ByteTokenizer()().decode(row["tokens"].tolist())[:300])

# %% [markdown]
# ## The teacher
#
# A Llama of four layers. `Config` says what a run is, `train` does it: validation, checkpoints
# that resume, results. Whoever has a teacher leaves this out, and writes
# `teacher = students.Pretrained("HuggingFaceTB/SmolLM2-135M", scan=True)`.

# %%
shape = models.DecoderConfig(
    vocab_size=264,
    width=width,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=width // 4,
    ffn_width=3 * width,
    scan=True,
)
base = Config(
    name="language_model",
    student=shape,
    objective=objectives.CrossEntropy(),
    optimizer=optimizers.AdamW(
        learning_rate=optimizers.WarmupCosine(1e-2, teacher_steps, warmup_steps=min(10, teacher_steps // 2))
    ),
    data=rows,
    validation=data.Slice(held_out, -16),
    test=data.Slice(held_out, 0, 48),
    loader=data.Loader(batch_size=16),
    steps=teacher_steps,
    select="nll",
    eval_every_steps=50,
    eval_batch_size=16,
    log_every_steps=50,
)
found = train(replace(base, name="teacher"), folder / "teacher")["student"]
print(f"teacher: {found['bits_per_byte']:.3f} bits per byte, perplexity {found['perplexity']:.2f}")

# %% [markdown]
# ## Two students
#
# Both are the teacher's layers 0 and 3, with its embedding, and both read the same rows in the
# same order. One learns the next byte; the other learns what the teacher thinks of every byte.

# %%
teacher = TrainedRun(str(folder / "teacher"))
kept = students.KeptLayers(teacher, layers=2)
print(kept.make().parameters)

distilled = replace(
    base,
    student=kept,
    teacher=teacher,
    objective=objectives.LogitKD(temperature=1.0),
    optimizer=optimizers.AdamW(
        learning_rate=optimizers.WarmupCosine(2e-3, student_steps, warmup_steps=min(10, student_steps // 2))
    ),
    steps=student_steps,
    eval_every_steps=max(student_steps // 10, 1),
    probes={
        "samples": evaluation.Samples(
            ("The class statement ", "An expression "), text.ByteTokenizer(), num_tokens=60
        )
    },
)
arms = {
    "labels": replace(distilled, objective=objectives.CrossEntropy()),
    "distilled": replace(distilled, baseline="labels"),
}
results = {}
for arm, config in arms.items():
    for seed in range(num_seeds):
        workdir = folder / arm / f"seed_{seed}"
        results[arm, seed] = train(replace(config, seed=seed), workdir, arm=arm)
    print(f"{arm:10} {results[arm, 0]['student']['bits_per_byte']:.3f} bits per byte")


# %%
def curve(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([(r["step"], r["nll"]) for r in lines if r["split"] == "validation"]).T


fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for arm, color in {"labels": "#b5541c", "distilled": "#1f5fa8"}.items():
    steps, nll = curve(folder / arm / "seed_0")
    ax.plot(steps, nll, color=color, linewidth=2)
    ax.annotate(arm, (steps[-1], nll[-1]), xytext=(6, 0), textcoords="offset points", color=color)
of_teacher = curve(folder / "teacher")[1].min()
ax.axhline(of_teacher, color="0.35", linestyle="--", linewidth=1)
ax.annotate("teacher", (steps[-1], of_teacher), xytext=(6, 0), textcoords="offset points", color="0.35")
ax.set(xlabel="step", ylabel="validation NLL, nats per byte")
ax.set_title("Half of the layers, from the text or from the teacher", loc="left")
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## What they write
#
# The likeliest continuation of each prompt. The report has the same, with KL to the teacher,
# agreement, calibration and cost, and says whether a difference is more than the luck of a
# seed: for that it wants three or more (`num_seeds`).

# %%
for who, evaluated in {
    "teacher": results["distilled", 0]["teacher"],
    "labels": results["labels", 0]["student"],
    "distilled": results["distilled", 0]["student"],
}.items():
    for prompt, written in evaluated["probes"]["samples"].items():
        print(f"{who:10} {prompt}[{written}]")

report = evaluation.report([folder])
print("\n".join(report.headlines))

# %% [markdown]
# Next: [language models](https://github.com/distilljax/distilljax/blob/main/docs/language_models.md),
# with meshes, remat and recipes for pods;
# [making the student](https://github.com/distilljax/distilljax/blob/main/docs/students.md);
# [text](https://github.com/distilljax/distilljax/blob/main/docs/text.md).
