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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/distilljax/distilljax/blob/main/notebooks/quickstart.ipynb)
#
# # Distilling a Flax model of your own
#
# A large network that has seen 1,200 handwritten digits teaches a small one that has only
# 36 of them. You write the model; distilljax brings the loss and the step. At the end there
# is a plot of what the teacher was worth. It takes under a minute on a laptop's CPU.

# %%
# On Colab only, and before jax is imported: the jax that comes with the image is too old.
import sys

if "google.colab" in sys.modules:
    source = "git+https://github.com/distilljax/distilljax"
    get_ipython().run_line_magic(
        "pip", f'install -q "jax[tpu]" "distilljax[train,report] @ {source}"'
    )

# %%
import functools
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from distilljax import data, losses, make_distill_step, objectives, optimizers
from distilljax.config import Config
from distilljax.train import train

# %% tags=["parameters"]
# @title Settings
num_labels = 36  # @param {type:"integer"}
temperature = 4.0  # @param {type:"number"}
num_steps = 300  # @param {type:"integer"}
num_seeds = 3  # @param {type:"integer"}

# %% [markdown]
# ## Data
#
# 1,797 images of 8x8 pixels. The teacher learns from 1,200 of them, all models are tested
# on the others. `Few` draws as many examples of each class as of any other.

# %%
digits = load_digits()
images = (digits.data / 16.0).astype(np.float32)
train_set = data.Arrays(images[:1200], digits.target[:1200], num_classes=10)
test_set = data.Arrays(images[1200:], digits.target[1200:], num_classes=10)


def batch_of(source):
    return {"inputs": jnp.asarray(source.inputs), "labels": jnp.asarray(source.labels)}


# %% [markdown]
# ## Fifteen lines to the first distilled step
#
# Any `nnx.Module` will do. The teacher is trained by the same kind of step as the student,
# with another objective: the labels alone.


# %%
class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.out = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


teacher = Net(512, nnx.Rngs(100))
optimizer = nnx.Optimizer(teacher, optax.adam(3e-3), wrt=nnx.Param)
teach = make_distill_step(objectives.CrossEntropy())
for _ in range(60):
    teach(teacher, optimizer, batch_of(train_set))

student = Net(32, nnx.Rngs(0))
optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
step = make_distill_step(objectives.LogitKD(temperature=temperature), teacher)
metrics = step(student, optimizer, batch_of(train_set))  # <- the first distilled step

# %% [markdown]
# The step changed the student in place. What it returns are means that are not divided yet
# (a sum and a count, so that batches and devices can be added up); `.value` divides. Nats
# are the unit of `kl`, which is always at temperature 1, whatever the objective uses.

# %%
for name, mean in metrics.items():
    print(f"{name:16} {float(mean.value):8.4f}")


# %% [markdown]
# ## What is the teacher worth?
#
# Two students with the same initial weights, the same 36 images and the same number of
# steps. One learns their labels, the other what the teacher says about them. Each seed is
# another draw of images and of weights.


# %%
@nnx.jit
def accuracy(model, batch):
    return jnp.mean(jnp.argmax(model(batch["inputs"]), axis=-1) == batch["labels"])


tx = optax.adam(1e-2)  # one for all: each new transformation would compile once more
arms = {
    "labels": make_distill_step(objectives.CrossEntropy()),
    "teacher": make_distill_step(objectives.LogitKD(temperature=temperature), teacher),
}
eval_steps = np.unique(np.linspace(0, num_steps, 31).astype(int))
curves = {arm: np.zeros((num_seeds, len(eval_steps))) for arm in arms}

for seed in range(num_seeds):
    batch = batch_of(data.Few(train_set, num_labels, seed=seed)())
    for arm, step in arms.items():
        student = Net(32, nnx.Rngs(seed))
        optimizer = nnx.Optimizer(student, tx, wrt=nnx.Param)
        for i in range(num_steps + 1):
            if i in eval_steps:
                column = np.searchsorted(eval_steps, i)
                curves[arm][seed, column] = accuracy(student, batch_of(test_set))
            step(student, optimizer, batch)

of_teacher = float(accuracy(teacher, batch_of(test_set)))
gain = curves["teacher"][:, -1] - curves["labels"][:, -1]
print(f"teacher, 1,200 labels   {of_teacher:.3f}")
for arm in arms:
    print(f"student, from {arm:9} {curves[arm][:, -1].mean():.3f}")
print("gain, seed by seed     ", ", ".join(f"{x:+.3f}" for x in gain))

# %%
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
lines = {"labels": "#b5541c", "teacher": "#1f5fa8"}
for arm, color in lines.items():
    low, high = curves[arm].min(axis=0), curves[arm].max(axis=0)
    ax.fill_between(eval_steps, low, high, color=color, alpha=0.15, linewidth=0)
    ax.plot(eval_steps, curves[arm].mean(axis=0), color=color, linewidth=2)
    at_end = curves[arm][:, -1].mean()
    ax.text(1.01 * num_steps, at_end, f"student, from {arm} {at_end:.3f}", color=color, va="center")
ax.axhline(of_teacher, color="0.35", linestyle="--", linewidth=1)
ax.text(1.01 * num_steps, of_teacher, f"teacher {of_teacher:.3f}", color="0.35", va="center")
ax.set(xlabel="steps", ylabel="test accuracy", xlim=(0, num_steps), ylim=(0.5, 1))
ax.set_title(f"Students with {num_labels} images: mean and range of {num_seeds} seeds", loc="left")
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Three seeds show a tendency, not a proof. `make demo` does this with five seeds, paired
# intervals, and two more experiments; `docs/proofs.md` has the real thing.
#
# ## The losses alone
#
# A loss is a pure function of arrays, with one value for each position. It needs neither the
# step nor Flax. Here it trains a matrix, on examples of which the teacher has seen a part:
# the others are masked, and count for nothing although their targets are nan.

# %%
x = jnp.asarray(train_set.inputs)
seen = jnp.arange(len(x)) < 1000
targets = jnp.where(seen[:, None], teacher(x), jnp.nan)


@jax.jit
def sgd(kernel):
    def loss(kernel):
        values = losses.forward_kl(x @ kernel, targets, temperature=2.0, where=seen)
        return losses.masked_mean(values, seen)

    value, gradient = jax.value_and_grad(loss)(kernel)
    return kernel - 2.0 * gradient, value


kernel = jnp.zeros((64, 10))
for i in range(201):
    kernel, value = sgd(kernel)
    if i % 50 == 0:
        print(f"step {i:3}  KL at temperature 2: {value:.4f} nats")

# %% [markdown]
# ## The same as a run
#
# For more than a notebook there is `train(config, workdir)`: the same step with validation,
# checkpoints that resume to the bit, a mesh, and results that `distilljax report` compares.
# Parts of a config are things that can be called, and here they are functions of ours.


# %%
def all_digits():
    return train_set


def test_digits():
    return test_set


def trained_teacher(mesh, rules):
    return teacher


config = Config(
    name="quickstart",
    student=functools.partial(Net, 32),
    teacher=trained_teacher,
    objective=objectives.LogitKD(temperature=temperature),
    optimizer=optimizers.AdamW(learning_rate=1e-2),
    data=all_digits,
    test=test_digits,
    loader=data.Loader(batch_size=64),
    select=None,  # no validation data here: the last step is what is measured
    steps=num_steps,
    log_every_steps=100,
)
results = train(config, tempfile.mkdtemp())
print(
    f"student, from the teacher's view of 1,200 digits without a label: "
    f"{results['student']['accuracy']:.3f}\n"
    f"parameters: {results['student']['parameters']:,}"
    f" instead of {results['teacher']['parameters']:,}"
)

# %% [markdown]
# Next: [the step](https://github.com/distilljax/distilljax/blob/main/docs/distill.md) in
# depth, with Flax Linen, meshes and schedules;
# [losses](https://github.com/distilljax/distilljax/blob/main/docs/losses.md);
# [configs](https://github.com/distilljax/distilljax/blob/main/docs/config.md).
