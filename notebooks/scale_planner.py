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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/distilljax/distilljax/blob/main/notebooks/scale_planner.ipynb)
#
# # Plan a pod from a CPU
#
# Does it fit? What does it send? What bounds it? The TPU's compiler answers that on any machine:
# the training step is compiled for a slice that need not be there, and the program is read. As it
# stands a tiny pair of models is planned for four chips, in two minutes. Choose a recipe in
# the settings, and the same cells plan Llama 70B to 8B for 128 chips, in minutes for each
# compilation. No weights are read, and no TPU is used.

# %%
# On Colab only, and before jax is imported: the jax that comes with the image is too old.
import sys

if "google.colab" in sys.modules:
    source = "git+https://github.com/distilljax/distilljax"
    get_ipython().run_line_magic(
        "pip", f'install -q -U jax "distilljax[train,report,text,plan] @ {source}"'
    )

# %%
import html
import os
from dataclasses import replace
from importlib.util import find_spec

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is compiled for is not what is here

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import HTML, display

from distilljax import data, models, objectives, optimizers, students
from distilljax.config import Config
from distilljax.data import text
from distilljax.planning import open_topology, plan
from distilljax.planning.page import COLORS, page
from distilljax.planning.search import search
from distilljax.planning.words import balance_sentence, gib, lines, ranking
from distilljax.teachers import Placed

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
plt.rcParams |= {"axes.titlelocation": "left", "figure.constrained_layout.use": True}

# %% tags=["parameters"]
# @title Settings
recipe = "tiny"  # @param ["tiny", "llama_70b_to_8b", "qwen3_32b_to_0.6b", "gemma2_9b_to_2b"]
topology = "as the recipe"  # @param ["as the recipe", "v5e:2x2", "v5e:8x8", "v6e:8x8", "v5p:4x4x8", "cpu:8"] {allow-input: true}
mesh = "as the recipe"  # @param ["as the recipe", "fsdp=4", "fsdp=2,tensor=2", "fsdp=64"] {allow-input: true}
search_limit = 3  # @param {type:"integer"}

# %% [markdown]
# ## The recipe
#
# A shape is all that a plan needs of a model. Each recipe also has a slice, a mesh, the sequences
# of a step, and in how many parts they are done. `fsdp` splits parameters and sequences, `tensor`
# splits the layers themselves. Another slice wants a mesh of as many devices.


# %%
def decoder(vocab_size, width, layers, heads, kv_heads, ffn_width, head_dim=128, **more):
    return models.DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=ffn_width,
        max_length=32_768,
        scan=True,
        remat=jax.checkpoint_policies.nothing_saveable,
        **more,
    )


def gemma2(width, *sizes):
    fixed = {"post_norm": True, "unit_offset": True, "activation": nnx.gelu, "norm_eps": 1e-6}
    caps = {"attention_softcap": 50.0, "logit_softcap": 30.0, "attention_scale": 256**-0.5}
    local = {"window": 4_096, "local_layers": (True, False), "embed_scale": width**0.5}
    return decoder(256_000, width, *sizes, head_dim=256, **fixed, **caps, **local)


qwen3 = {"qk_norm": True, "norm_eps": 1e-6, "rope": models.Rope(base=1_000_000.0)}
untied = {"tied": False}
recipes = {
    "tiny": {
        "teacher": decoder(2_048, 64, 4, 2, 1, 128, head_dim=32, **untied),
        "student": decoder(2_048, 32, 2, 2, 1, 64, head_dim=16, **untied),
        "run": {"context": 128, "batch": 16, "accumulate": 1},
        "where": ("v5e:2x2", "fsdp=4"),
    },
    "llama_70b_to_8b": {
        "teacher": decoder(128_256, 8_192, 80, 64, 8, 28_672, **untied),
        "student": decoder(128_256, 4_096, 32, 32, 8, 14_336, **untied),
        "run": {"context": 4_096, "batch": 512, "accumulate": 4},
        "where": ("v5p:4x4x8", "fsdp=32,tensor=4"),
    },
    "qwen3_32b_to_0.6b": {
        "teacher": decoder(151_936, 5_120, 64, 64, 8, 25_600, **qwen3, **untied),
        "student": decoder(151_936, 1_024, 28, 16, 8, 3_072, **qwen3),
        "run": {"context": 4_096, "batch": 512, "accumulate": 4},
        "where": ("v6e:8x8", "fsdp=16,tensor=4"),
    },
    "gemma2_9b_to_2b": {
        "teacher": gemma2(3_584, 42, 16, 8, 14_336),
        "student": gemma2(2_304, 26, 8, 4, 9_216),
        "run": {"context": 4_096, "batch": 512, "accumulate": 4},
        "where": ("v5e:8x8", "fsdp=16,tensor=4"),
    },
}

# %%
chosen = recipes[recipe]
slice_name = chosen["where"][0] if topology == "as the recipe" else topology
own_mesh = chosen["where"][1] if mesh == "as the recipe" else mesh
split = {axis: int(size) for axis, size in (part.split("=") for part in own_mesh.split(","))}
if not slice_name.startswith("cpu:") and find_spec("libtpu") is None:
    slice_name = f"cpu:{np.prod(list(split.values()))}"
    print('No TPU compiler here, so plain CPUs are planned for: pip install "distilljax[plan]"')
where = open_topology(slice_name)


def config_of(context, batch, accumulate):
    documents = text.Tokenized(text.Texts(("Not read.",)), text.ByteTokenizer())
    teacher = replace(chosen["teacher"], param_dtype=jnp.bfloat16, remat=None)
    return Config(
        name=recipe,
        teacher=students.Untrained(teacher),
        student=chosen["student"],
        objective=objectives.LogitKD(),
        optimizer=optimizers.AdamW(learning_rate=1e-5, clip_norm=1.0),
        data=text.Packed(documents, context),
        loader=data.Loader(batch_size=batch),
        eval_batch_size=batch // accumulate,
        accumulate=accumulate,
        compute_dtype="bfloat16",
        steps=1,
        mesh=own_mesh,
        student_rules=models.DECODER_RULES,
        teacher_rules=models.DECODER_RULES,
    )


config = config_of(**chosen["run"])

# %% [markdown]
# ## The plan
#
# What is compiled is the step that `train` runs: the teacher, the fused loss, the student's
# backward pass, the optimizer. A program that does not fit is an answer too, with what it needs.

# %%
found = plan(config, topology=where)
print("\n".join(lines(found)))

# %% [markdown]
# Whose bytes are they? Parameters, optimizer and batch are known from their shardings; gradients,
# activations and temporaries are those that live at the peak of the compiled program. The models of
# the tiny recipe are nothing beside a chip, so the bar ends where they do.


# %%
BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
TIMES = {"s": 1, "ms": 1e-3, "µs": 1e-6}


def unit(largest, units):
    """The name and size of the unit in which the largest number is at least 1."""
    return next(((name, size) for name, size in units.items() if largest >= size), ("", 1))


def memory_bar(found):
    fig, ax = plt.subplots(figsize=(9, 1.7 + 0.5 * len(found.programs)))
    shown = [p.owners if p.memory is None else p.memory.owners for p in found.programs.values()]
    longest, limit = max(sum(owners.values()) for owners in shown), found.programs["step"].limit
    name, size = unit(longest, BYTES)
    for row, owners in enumerate(shown):
        left = 0
        for owner, n in owners.items():
            label = None if row else owner
            ax.barh(row, n / size, left=left / size, color=COLORS[owner], label=label, height=0.6)
            left += n
    if limit is not None and limit < 20 * longest:
        ax.axvline(limit / size, color="k", linewidth=1.5)
    of = "" if limit is None else f", of {gib(limit)}: {'fits' if found.fits else 'does not fit'}"
    ax.set_title(f"Memory of a device at the peak{of}")
    ax.set(xlabel=name, yticks=range(len(shown)))
    ax.set_yticklabels(found.programs)
    fig.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    plt.show()


memory_bar(found)

# %% [markdown]
# What a device sends in a step, by kind and by the axis of the mesh along which it goes; loops are
# counted as often as they run. An all-gather over `fsdp` brings a layer's parameters together; no
# logits may be among what is gathered.

# %%
sent = found.to_json()["programs"]["step"]
kinds, parts = sent["collectives"], sent["sent_by_part"]
fig, axes = plt.subplots(1, 2, figsize=(10, 2.6), width_ratios=[1.3, 1])
named = ([f"{kind}, {row['times']:,} times" for kind, row in kinds.items()], list(parts))
sizes = ([row["bytes_per_step"] for row in kinds.values()], list(parts.values()))
for ax, names, values, title in zip(axes, named, sizes, ("by kind", "by what it is for")):
    ax.barh(names, values, color="#1f5fa8")
    for row, value in enumerate(values):
        ax.text(value, row, f" {gib(value)}", va="center", fontsize=8)
    ax.set(title=f"Sent by a device in a step, {title}", xticks=[])
    ax.set_xlim(0, 1.3 * max([1, *values]))
    ax.spines["bottom"].set_visible(False)
    ax.invert_yaxis()
plt.show()

# %% [markdown]
# The roofline divides operations, memory traffic and bytes sent by what the chip can do at its
# best. If all of it overlaps, a step takes as long as the longest; if nothing does, as long as the
# sum. It is a bound and not a measurement. Of models as small as the tiny ones all three
# are next to nothing, and a real step would be longer.


# %%
def roofline_bars(found):
    fig, ax = plt.subplots(figsize=(9, 1.3 + 0.5 * len(found.programs)))
    shades = {"compute": "#1f5fa8", "memory": "#00795c", "interconnect": "#b5541c"}
    name, size = unit(found.seconds[1], TIMES)
    for row, program in enumerate(found.programs.values()):
        line, left = program.roofline, 0.0
        for part, color in shades.items():
            took = getattr(line, part) / size
            ax.barh(row, took, left=left, color=color, height=0.6, label=None if row else part)
            left += took
        low, high = line.mfu
        said = f" at least {line.at_least / size:.3g} {name}: {line.bound_by}"
        said += f"\n MFU {low:.2f} to {high:.2f}"
        ax.text(left, row, said, va="center", fontsize=8)
    ax.set_yticks(range(len(found.programs)), list(found.programs))
    ax.set_xlim(0, 1.35 * ax.get_xlim()[1])
    ax.set_xlabel(name)
    ax.set_title("Roofline of a step, one part after the other")
    fig.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    plt.show()


if found.seconds is None:
    print("Nobody knows what this chip can do, so there is no roofline: choose a TPU slice.")
else:
    roofline_bars(found)

# %% [markdown]
# ## What else would do
#
# `search` compiles variants that train the same student on the same batch: chunks of the loss,
# meshes, what is computed again, microbatches. A long bar of time says that much depends on how
# well the parts overlap. `search_limit` says how many are compiled.

# %%
rows = search(config, where, found, limit=search_limit, say=print)
print("\n".join(ranking(rows)))

fits = [row for row in rows if row["fits"] is not False]
names = ["\n".join(f"{k} {v}" for k, v in row["changes"].items()) or "as it is" for row in fits]
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 1.4 + 0.45 * len(fits)), sharey=True)
name, size = unit(max(row["allocated"] for row in fits), BYTES)
left.barh(names, [row["allocated"] / size for row in fits], color="#1f5fa8", height=0.6)
left.set(title="Memory set aside on a device", xlabel=name)
if found.seconds is not None:
    name, size = unit(max(row["seconds"][1] for row in fits), TIMES)
    low, high = np.array([row["seconds"] for row in fits]).T / size
    right.barh(names, high - low, left=low, color="#b5541c", height=0.6)
    right.set(title="A step, from all overlapped to nothing", xlabel=name, xlim=(0, None))
left.invert_yaxis()
plt.show()

# %% [markdown]
# ## A teacher on devices of its own
#
# The teacher can have half of the devices and run one step ahead. Then there are two programs, and
# one of them waits for the other: the balance says which, and how many devices would be even.

# %%
half = ",".join(f"{axis}={size}" for axis, size in (split | {"fsdp": split["fsdp"] // 2}).items())
apart = replace(config, teacher=Placed(config.teacher, mesh=half), mesh=half)
streamed = plan(apart, topology=where)
memory_bar(streamed)
even = streamed.to_json()["balance"]
if even is not None:
    roofline_bars(streamed)
    print(balance_sentence(even))

# %% [markdown]
# ## The page
#
# What `distilljax plan CONFIG --topology v5p:4x4x8 --search --out DIR` writes: one HTML file with
# all of it, here with the largest arrays at the peak and where in the model they are from.

# %%
whole = page(found.to_json() | {"search": rows})
frame = f'<iframe srcdoc="{html.escape(whole)}" width="100%" height="600"></iframe>'
display(HTML(f"<div>{frame}</div>"))

# %% [markdown]
# Next: [planning](https://github.com/distilljax/distilljax/blob/main/docs/scale.md), with what each
# number proves, and the recipes at their size;
# [launching](https://github.com/distilljax/distilljax/blob/main/docs/launch.md) on the real thing;
# [the teacher](https://github.com/distilljax/distilljax/blob/main/docs/teacher.md) on devices of
# its own.
