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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/distilljax/distilljax/blob/main/notebooks/losses_tour.ipynb)
#
# # A tour of the losses
#
# The families of `distilljax.losses` in pictures: what a loss looks at, and what it cannot see.
# All that is drawn is computed here, by the losses themselves, in two minutes on a laptop's
# CPU. Change a setting and run all cells again.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from distilljax import losses

BLUE, ORANGE, GREEN, PINK, GREY = "#1f5fa8", "#b5541c", "#00795c", "#b0508a", "0.55"
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
plt.rcParams |= {"axes.titlelocation": "left", "figure.constrained_layout.use": True}
plt.rcParams |= {"image.cmap": "Blues", "legend.frameon": False}

# %% tags=["parameters"]
# @title Settings
distance = 1.8  # @param {type:"number"}
temperature = 4.0  # @param {type:"number"}
kept_classes = 12  # @param {type:"integer"}

# %% [markdown]
# ## Divergences: what to miss
#
# A student that cannot be its teacher has to choose. This teacher has two bumps, the student is
# one Gaussian, trained from eight starts; the thick line is the one with the least loss. The
# forward KL (Hinton et al., 2014) covers all that the teacher says, and so believes in the gap
# too. The reverse KL (MiniLLM, Gu et al., 2024) takes one bump, and which one is chance: it cannot
# see what the student does not believe in. With bumps nearer to each other (`distance` 1.2) all
# losses cover both, farther apart (2.5) only the forward KL still does.

# %%
bins = jnp.linspace(-5, 5, 101)


def gaussian(mean, log_std):
    return -(((bins - mean) / jnp.exp(log_std)) ** 2) / 2


bumps = jax.nn.softmax(gaussian(np.array([[-distance], [distance]]), np.log(0.5)))
two_bumps = jnp.log(0.4 * bumps[0] + 0.6 * bumps[1] + 1e-6)
starts = jnp.stack([2 * jax.random.normal(jax.random.key(0), (8,)), jnp.full(8, np.log(0.5))])


def descend(loss, parameters, steps, rate):
    """Parameters after so many steps of Adam."""

    def update(carry, _):
        changes, state = adam.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], changes), state), None

    adam = optax.adam(rate)
    return jax.lax.scan(update, (parameters, adam.init(parameters)), length=steps)[0][0]


@functools.partial(jax.jit, static_argnums=0)
def fitted(loss):
    def values(parameters):
        student = gaussian(*parameters[:, :, None])
        return loss(student, jnp.broadcast_to(two_bumps, student.shape))

    parameters = descend(lambda p: values(p).sum(), starts, 1000, 0.03)
    return jax.nn.softmax(gaussian(*parameters[:, :, None])), values(parameters)


# %%
divergences = {
    "forward_kl": losses.forward_kl,
    "skew_forward_kl": losses.skew_forward_kl,
    "adaptive_kl": losses.adaptive_kl,
    "alpha_beta": losses.alpha_beta,
    "jensen_shannon": losses.jensen_shannon,
    "total_variation": losses.total_variation,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "reverse_kl": losses.reverse_kl,
}
teacher = np.exp(two_bumps)
fig, axes = plt.subplots(2, 4, figsize=(11, 4.2), sharex=True, sharey=True)
for ax, (name, loss) in zip(axes.flat, divergences.items()):
    students, values = map(np.asarray, fitted(loss))
    spread = np.sqrt(students @ bins**2 - (students @ bins) ** 2)
    ax.fill_between(bins, teacher, color="0.85", linewidth=0)
    ax.plot(bins, students.T, color=BLUE, linewidth=0.6, alpha=0.5)
    ax.plot(bins, students[values.argmin()], color=BLUE, linewidth=2.2)
    ax.set_title(f"{name}\n{np.sum(spread < distance / 2)} of 8 on one bump")
axes[0, 0].text(distance, 0.052, "teacher", ha="center", color="0.4")
axes[0, 0].set(ylim=(0, 0.1), yticks=[0, 0.05, 0.1])
fig.supxlabel("bin")
fig.supylabel("probability of a bin")
plt.show()

# %% [markdown]
# Between the two lie the mixtures: Jensen-Shannon (GKD, Agarwal et al., 2024) and the skews
# (DistiLLM, Ko et al., 2024). `alpha_beta` (ABKD, Wang et al., 2025) has exponents to tune,
# `adaptive_kl` (Wu et al., 2025) weighs the two KLs by where the student is wrong, and the total
# variation (Wen et al., 2023) counts the mass that is misplaced.
#
# With two classes a loss is a curve. The teacher gives the first class 0.1: what does a student
# pay that gives it q? The forward KL rises without end at both sides, since the teacher thinks
# both classes possible. The others have a bound; that of the reverse KL, -log 0.1, is the higher
# the less the teacher believes in the class.

# %%
q = np.concatenate([np.geomspace(1e-6, 0.1, 100), 1 - np.geomspace(0.9, 1e-6, 100)[1:]])
student = jnp.log(jnp.asarray(np.stack([q, 1 - q], axis=-1)))
two = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.9])), student.shape)
some = ("forward_kl", "jensen_shannon", "total_variation", "reverse_kl")
curves = jax.jit(lambda z: [divergences[name](z, two) for name in some])(student)

fig, ax = plt.subplots(figsize=(7, 3.6))
for (name, curve), color in zip(zip(some, curves), (BLUE, GREEN, PINK, ORANGE)):
    ax.plot(np.log(q / (1 - q)), curve, color=color, linewidth=2, label=name)
odds = np.array([1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, 0.99999])
ax.set_xticks(np.log(odds / (1 - odds)), [f"{x:g}" for x in odds])
ax.set(ylim=(0, 4), xlabel="q, the student's probability of the class", ylabel="loss")
ax.set_title("A teacher that says 0.1")
ax.legend(loc="upper center")
plt.show()

# %% [markdown]
# ## Temperature: dark knowledge
#
# A teacher that is sure still knows what an image looks like; at temperature 1 its other classes
# are too small to teach. Dividing logits by T shows them (Hinton et al., 2014). The gradient
# shrinks with T², which the objective gives back: no loss here has a T² of its own.

# %%
digits = load_digits()
images = jnp.asarray(digits.data / 16, jnp.float32)
labels = jnp.asarray(digits.target)
keys = jax.random.split(jax.random.key(1), 2)
weights = [jax.random.normal(keys[0], (64, 128)) / 8, jax.random.normal(keys[1], (128, 10)) / 11]


def hidden(weights, x):
    return jax.nn.relu(x @ weights[0])


@jax.jit
def trained(weights):
    def loss(weights):
        z = hidden(weights, images[:1200]) @ weights[1]
        return losses.cross_entropy(z, labels[:1200]).mean()

    return descend(loss, weights, 60, 0.01)


weights = trained(weights)
logits = hidden(weights, images[1200:]) @ weights[1]

# %%
p, soft = np.asarray(jax.nn.softmax(logits)), np.asarray(jax.nn.softmax(logits / temperature))
right = p.argmax(-1) == digits.target[1200:]
shown = np.where(right & (p.max(-1) > 0.95), np.sort(soft, axis=-1)[:, -2], 0).argmax()
ts = np.geomspace(0.5, 32, 30)
slope = jax.vmap(lambda t: jax.grad(losses.forward_kl)(jnp.zeros(10), logits[shown], temperature=t))
norms = jnp.linalg.norm(jax.jit(slope)(ts), axis=-1)

fig, (left, middle, last) = plt.subplots(1, 3, figsize=(11, 3), width_ratios=[1, 2, 2])
left.imshow(digits.images[1200 + shown], cmap="Greys")
left.set(xticks=[], yticks=[], title="A digit, as the teacher sees it")
middle.bar(np.arange(10) - 0.2, p[shown], width=0.4, color=GREY, label="T = 1")
middle.bar(np.arange(10) + 0.2, soft[shown], width=0.4, color=BLUE, label=f"T = {temperature:g}")
middle.set(xticks=range(10), xlabel="class", title="What the teacher says of it: probability")
middle.legend()
last.loglog(ts, norms, color=ORANGE, linewidth=2, label="forward_kl")
last.loglog(ts, ts**2 * norms, color=BLUE, linewidth=2, label="T² forward_kl")
last.set(xlabel="temperature", title="Size of the gradient, of an even student")
last.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
last.minorticks_off()
last.legend()
plt.show()

# %% [markdown]
# ## Decoupled KD: two parts
#
# The forward KL is a sum: how sure to be of the label, and, times the teacher's doubt 1 - p_y,
# how the other classes compare. This student is as sure as its teacher and takes all other
# classes for equal, so only the second part has anything to say. The surer the teacher, the less
# the KL hears of it; `decoupled_kd` (Zhao et al., 2022) gives that part a weight of its own.

# %%
others = 2 * jax.random.normal(jax.random.key(2), (9,))
label_logit = jnp.linspace(-2, 12, 50)[:, None]
teacher = jnp.concatenate([label_logit, jnp.broadcast_to(others, (50, 9))], axis=-1)
even = jnp.full((50, 9), jax.nn.logsumexp(others) - jnp.log(9.0))
student = jnp.concatenate([label_logit, even], axis=-1)


@jax.jit
def parts(student, teacher):
    decoupled = functools.partial(losses.decoupled_kd, student, teacher, labels=jnp.zeros(50, int))
    of_label = decoupled(target_weight=1.0, non_target_weight=0.0)
    of_others = decoupled(target_weight=0.0, non_target_weight=1.0)
    whole, doubt = losses.forward_kl(student, teacher), 1 - jax.nn.softmax(teacher)[:, 0]
    return of_label, of_others, whole, jnp.max(jnp.abs(whole - of_label - doubt * of_others))


of_label, of_others, whole, rest = parts(student, teacher)
print(f"forward_kl less its two parts: at most {rest:.0e}")

fig, ax = plt.subplots(figsize=(7, 3))
ax.plot(label_logit, of_others, color=GREEN, linewidth=2, label="decoupled_kd, other classes")
ax.plot(label_logit, whole, color=BLUE, linewidth=2, label="forward_kl")
ax.plot(label_logit, of_label, color=ORANGE, linewidth=2, label="decoupled_kd, label")
sure = np.array([0.1, 0.5, 0.9, 0.99, 0.999])
ax.set_xticks(np.log(sure / (1 - sure)) + float(jax.nn.logsumexp(others)), sure)
ax.set(xlabel="the teacher's probability of the label", ylabel="nats")
ax.set_title("A student that knows how sure to be, and nothing of the other classes")
ax.legend(loc="center right")
plt.show()

# %% [markdown]
# ## What a loss does not see
#
# A student is its teacher but for one change; each cell says how much of it a loss sees. 0 is
# nothing, 1 is as bad as the logits of another image, below 0 is better than the teacher itself.
# `dist` (Huang et al., 2022) compares by correlation and `standardize_logits` (Sun et al., 2024)
# takes the scale out, so a student need not be as sure as its teacher. `universal_logit` (Boizard
# et al., 2025) sorts both sides: it works between vocabularies, and cannot tell which class is
# which. `hinge_ranking` (after Herbrich et al., 2000) only wants the order of the best.


# %%
def table(seen, rows, columns):
    fig, ax = plt.subplots(figsize=(2.6 + 1.05 * len(columns), 0.8 + 0.34 * len(rows)))
    ax.imshow(np.clip(np.abs(seen), 0, 1.4), vmin=0, vmax=1.4, aspect="auto")
    for (row, column), value in np.ndenumerate(seen):
        blind = abs(value) < 5e-4
        text = "0" if blind else f"{value:.2g}" if abs(value) < 9.95 else f"{value:.0f}"
        color = GREEN if blind else "w" if abs(value) > 0.8 else "k"
        ax.text(column, row, text, ha="center", va="center", color=color)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    plt.show()


def seen_by(family, changes, teacher, unrelated):
    """How far each change of the teacher moves each loss, from its own to the unrelated."""

    @jax.jit
    def measure(teacher, unrelated):
        students = [teacher, unrelated, *(change(teacher) for change in changes.values())]
        values = lambda s: jnp.stack([jnp.mean(f(s, teacher)) for f in family.values()])
        return jax.lax.map(values, jnp.stack(students))

    best, far, *moved = np.asarray(measure(teacher, unrelated), np.float64)
    return np.stack([(value - best) / (far - best) for value in moved], axis=1)


def standardized(student, teacher):
    return losses.forward_kl(*map(losses.standardize_logits, (student, teacher)))


def swapped(a, b):
    """The logits of two ranks, 0 being the likeliest class, change places."""

    def change(z):
        order = jnp.argsort(z, axis=-1, descending=True)
        there = jnp.take_along_axis(z, order[:, jnp.array([a, b])], axis=-1)
        return jnp.put_along_axis(z, order[:, jnp.array([b, a])], there, axis=-1, inplace=False)

    return change


changes = {
    "logits\n+ 3": lambda z: z + 3,
    "logits\n× 1/2": lambda z: z / 2,
    "logits\n× 2": lambda z: 2 * z,
    "best two\nswapped": swapped(0, 1),
    "ranks 4, 5\nswapped": swapped(3, 4),
}
family = {
    "forward_kl": losses.forward_kl,
    "logit_mse": losses.logit_mse,
    "logit_mse, centered": functools.partial(losses.logit_mse, centered=True),
    "forward_kl, standardized": standardized,
    "dist": losses.dist,
    "hinge_ranking": losses.hinge_ranking,
    "universal_logit": losses.universal_logit,
}
softer = logits / temperature
table(seen_by(family, changes, softer[:64], softer[64:128]), list(family), list(changes))

# %% [markdown]
# ## Sparse targets
#
# A stored teacher is a few classes for each position. The best k with the mass of all others
# (`SparseLogits`) bound the loss from below, and leave the order of the others to the student. A
# sample (`SampledLogits`, Anshumann et al., 2025) is noisy and right on average, for every class.
# Renormalised, the best k are another teacher. On the left a student has the teacher's logits times
# a number, and the least loss should lie at 1; on the right it knows nothing yet, and the mean of
# its gradient is compared with the dense one. With more samples the error of their mean falls; that
# of the best k stays.

# %%
zipf = jnp.log(jnp.arange(1.0, 513) ** -1.2)
scales = jnp.linspace(0.5, 2, 16)
student = scales[:, None] * zipf
best = losses.SparseLogits.top_k(zipf, kept_classes)
rows = jnp.broadcast_to(zipf, (400, 512))
samples = losses.SampledLogits.draw(jax.random.key(4), rows, kept_classes)


@jax.jit
def along(target):
    """Cross-entropies of all students, and of all samples if there are several."""
    shape = target.ids.shape[:-1] if hasattr(target, "ids") else ()
    many = lambda z: losses.soft_cross_entropy(jnp.broadcast_to(z, (*shape, 512)), target)
    return jax.lax.map(many, student)


draws = np.asarray(along(samples))
found = {
    "dense": (along(zipf), GREY),
    f"mean of samples of {kept_classes}": (draws.mean(-1), BLUE),
    f"best {kept_classes} and a tail": (along(best), GREEN),
    f"best {kept_classes} renormalised": (along(best.renormalize()), ORANGE),
}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
left.fill_between(scales, *np.quantile(draws, [0.1, 0.9], axis=1), color=BLUE, alpha=0.12, lw=0)
for name, (curve, color) in found.items():
    style = {"linewidth": 7, "alpha": 0.5} if name == "dense" else {"linewidth": 1.8}
    left.plot(scales, curve, color=color, label=name, **style)
    left.plot(scales[np.argmin(curve)], np.min(curve), "o", color=color)
left.set(xlabel="student: the teacher's logits times", ylabel="cross-entropy", ylim=(1.5, 8.5))
left.set_title("Dots at the least; shade: 8 of 10 samples alone")
left.legend(fontsize=8, loc="upper left", ncols=2)


@jax.jit
def slopes(target):
    """Gradients for a student that knows nothing, one for each sample."""
    even = jnp.zeros((*getattr(target, "ids", zipf).shape[:-1], 512))
    return jax.grad(lambda z: losses.soft_cross_entropy(z, target).sum())(even)


def wrong(slope):
    return float(jnp.abs(slope - slopes(zipf)).sum())


ks = [5, 12, 50]
tops = [losses.SparseLogits.top_k(zipf, k) for k in ks]
drawn = [slopes(losses.SampledLogits.draw(jax.random.key(5), rows, k)) for k in ks]
errors = {
    "renormalised": ([slopes(top.renormalize()) for top in tops], ORANGE, "o-"),
    "and a tail": ([slopes(top) for top in tops], GREEN, "o-"),
    "mean of 20 samples": ([slope[:20].mean(0) for slope in drawn], BLUE, "o:"),
    "mean of 400 samples": ([slope.mean(0) for slope in drawn], BLUE, "o-"),
}
for name, (found, color, style) in errors.items():
    right.plot(ks, [wrong(slope) for slope in found], style, color=color, label=name)
right.set(xscale="log", ylim=(0, None), xlabel="classes kept or drawn")
right.set_title("Error of the mean gradient: sum of absolute values")
right.set_xticks(ks, ks)
right.minorticks_off()
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Features
#
# The same table for what is between two layers: 64 digits seen by 16 filters, in 8x8 places; 1 is
# as bad as other digits seen by other filters. A zero is a freedom of the student. `hidden_mse`
# (FitNets, Romero et al., 2015) leaves none, so it wants a projection before it;
# `attention_transfer` (Zagoruyko and Komodakis, 2017) asks where, `neuron_selectivity` (Huang and
# Wang, 2017) which patterns, `activation_boundary` (Heo et al., 2019) which side of zero, and
# `linear_cka` (Kornblith et al., 2019) accepts any rotation.


# %%
def seen_through(x, key):
    filters = jax.random.normal(jax.random.key(key), (3, 3, 1, 16)) * jnp.linspace(0.3, 1.7, 16)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, filters, (1, 1), "SAME", dimension_numbers=layout)


as_images = images[:128].reshape(-1, 8, 8, 1)
rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(6), (16, 16)))[0]
order = jax.random.permutation(jax.random.key(7), 64)
changes = {
    "all × 3": lambda x: 3 * x,
    "a vector\nadded": lambda x: x + jnp.linspace(-1, 1, 16),
    "sign\nflipped": lambda x: -x,
    "channels\npermuted": lambda x: x[..., ::-1],
    "channels\nrotated": lambda x: x @ rotation,
    "places\npermuted": lambda x: x.reshape(64, 64, 16)[:, order].reshape(x.shape),
    "images\npermuted": lambda x: x[::-1],
}


def tokens(x):
    return x.reshape(len(x), -1, x.shape[-1])


family = {
    "hidden_mse": losses.hidden_mse,
    "hidden_cosine": losses.hidden_cosine,
    "activation_boundary": losses.activation_boundary,
    "contrastive": lambda s, t: losses.contrastive(s.mean((1, 2)), t.mean((1, 2))),
    "flow_of_solution": lambda s, t: losses.flow_of_solution(
        (s[..., :8], s[..., 8:]), (t[..., :8], t[..., 8:])
    ),
    "interchannel_correlation": losses.interchannel_correlation,
    "attention_relation": lambda s, t: losses.attention_relation(
        tokens(s), tokens(t), num_relation_heads=2
    ),
    "attention_transfer": losses.attention_transfer,
    "neuron_selectivity": losses.neuron_selectivity,
    "linear_cka": losses.linear_cka,
}
maps, unrelated = seen_through(as_images[:64], 5), seen_through(as_images[64:], 14)
table(seen_by(family, changes, maps, unrelated), list(family), list(changes))

# %% [markdown]
# ## Attention maps
#
# `attention_map_kl` (MiniLM, Wang et al., 2020) compares who attends to whom, one value for each
# token that attends. The last four tokens are padding: they are in no softmax and cost nothing.

# %%
queries = jax.random.normal(jax.random.key(8), (2, 1, 1, 16, 8))
near = -jnp.abs(jnp.arange(16)[:, None] - jnp.arange(16)) / 2.0
scores_teacher = queries[0] @ queries[1].mT / 8**0.5 + near
scores_student = near[None, None] + jnp.zeros_like(scores_teacher)
where = jnp.arange(16)[None] < 12
values = losses.attention_map_kl(scores_student, scores_teacher, where=where)[0]

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), width_ratios=[1, 1, 1], sharey=True)
both = {"teacher": scores_teacher, "student, looks nearby": scores_student}
for ax, (name, scores) in zip(axes, both.items()):
    seen = jax.nn.softmax(jnp.where(where, scores[0, 0], -jnp.inf))
    ax.imshow(jnp.where(where.T, seen, jnp.nan), vmin=0, vmax=0.7)
    ax.set(title=f"Attention of the {name}", xlabel="token attended to")
axes[2].barh(range(16), values, color=BLUE)
axes[2].set(title="attention_map_kl", xlabel="nats")
axes[0].set(ylabel="token that attends")
plt.show()

# %% [markdown]
# ## Relations
#
# These compare how examples lie to each other, so widths may differ. Six points are the same on
# both sides; the seventh of the student is moved over the plane. Relational KD (Park et al., 2019)
# by distances and angles wants it in one place; the cosines of `embedding_relation` do not see how
# far it is from the origin, only where it points.

# %%
x = jnp.array([0.9, 1.9, -1.5, -1.9, 0.5, 2.3, 1.4])
y = jnp.array([2.3, 1.2, 1.7, -0.6, -1.8, -0.7, 0.9])
cloud = jnp.stack([x, y], axis=-1)
ticks = jnp.linspace(-3, 3, 61)
plane = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
relations = {
    "rkd_distance": losses.rkd_distance,
    "rkd_angle": losses.rkd_angle,
    "embedding_relation": losses.embedding_relation,
}
fig, axes = plt.subplots(1, 3, figsize=(10, 3.5), sharey=True)
for ax, (name, loss) in zip(axes, relations.items()):
    moved = jax.jit(lambda points: jax.lax.map(lambda x: loss(cloud.at[-1].set(x), cloud), points))
    values = np.asarray(moved(plane)).reshape(61, 61)
    levels = np.quantile(values, np.linspace(0, 1, 13) ** 2)
    ax.contourf(ticks, ticks, np.searchsorted(levels, values) / 12, levels=12, cmap="Blues")
    ax.plot(*cloud[:-1].T, "o", color="k", markersize=4)
    ax.plot(*cloud[-1], "*", color=ORANGE, markersize=13)
    ax.plot(0, 0, "+", color="k")
    ax.set(title=name, aspect="equal")
fig.supxlabel("Dark is more loss. Star: the teacher's point; cross: the origin.", fontsize=9)
plt.show()

# %% [markdown]
# `similarity_preserving` (Tung and Mori, 2019) asks which examples go together: its matrices are
# pictures. The teacher's 128 hidden features sort the digits, 12 random ones do not, and after
# 200 steps of the loss alone, without a label, they do.

# %%
by_class = jnp.argsort(labels[:100])
target = hidden(weights, images[:100])[by_class]
start = jax.random.normal(jax.random.key(9), (64, 12)) / 8


def narrow(kernel):
    return jax.nn.relu(images[:100][by_class] @ kernel)


@jax.jit
def preserved(kernel):
    return descend(lambda k: losses.similarity_preserving(narrow(k), target), kernel, 200, 0.01)


shown = {"teacher": target, "before": narrow(start), "after": narrow(preserved(start))}
fig, axes = plt.subplots(1, 3, figsize=(10, 3.5))
for ax, (name, x) in zip(axes, shown.items()):
    rows = x @ x.T
    ax.imshow(rows / jnp.linalg.norm(rows, axis=-1, keepdims=True))
    loss = float(losses.similarity_preserving(x, target))
    title = name if x is target else f"student, {name}: loss {loss:.1e}"
    ax.set(title=title, xticks=[], yticks=[])
fig.supxlabel("100 digits by 100 digits, sorted by class; dark is alike", fontsize=9)
plt.show()

# %% [markdown]
# What a loss makes of a rotation tells the families apart. The student is the teacher turned by an
# angle. Two networks hardly ever have the same axes; CKA (Kornblith et al., 2019) and the relations
# do not ask for them, and stay at 0 all the way.

# %%
features = jax.random.normal(jax.random.key(10), (64, 16)) + 0.5


def turned(angle):
    first, second = features[:, :8], features[:, 8:]
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([c * first - s * second, s * first + c * second], axis=-1)


of = (losses.hidden_mse, losses.linear_cka, losses.rkd_distance, losses.similarity_preserving)
all_of = jax.jit(lambda student: jnp.stack([jnp.mean(loss(student, features)) for loss in of]))
angles = np.linspace(0, 180, 37)
curves = np.stack([all_of(turned(np.deg2rad(angle))) for angle in angles], axis=1)
unrelated = all_of(jax.random.normal(jax.random.key(11), (64, 16)) + 0.5)
fig, ax = plt.subplots(figsize=(7, 3))
styles = ((ORANGE, 2), (BLUE, 7), (GREEN, 4), (PINK, 1.5))
for loss, curve, far, (color, width) in zip(of, curves, unrelated, styles):
    ax.plot(angles, curve / far, color=color, linewidth=width, label=loss.__name__)
ax.set(xlabel="angle, degrees", ylabel="loss (1: unrelated features)")
ax.set_title("A student that is its teacher, turned")
ax.legend()
plt.show()

# %% [markdown]
# ## Masks
#
# What a mask leaves out may be nan. It changes no value and gets no gradient, not even a nan: here
# four of ten positions are padding that nobody ever filled.

# %%
where = jnp.arange(10) < 6
clean = jax.random.normal(jax.random.key(12), (10, 24))
student = jnp.where(where[:, None], clean, jnp.nan)
target = 2 * jax.random.normal(jax.random.key(13), (10, 24))


@jax.jit
@jax.value_and_grad
def masked(student):
    return losses.masked_mean(losses.forward_kl(student, target, where=where), where)


value, gradient = masked(student)
print(f"loss with nan {value:.7f}, without {masked(clean)[0]:.7f}")
print("different gradients of the padding:", np.unique(gradient[6:]))

fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
cmap = plt.get_cmap("RdBu_r").with_extremes(bad="0.75")
titles = ("Logits of the student (grey: nan)", "Gradient of the mean")
for ax, x, name in zip(axes, (student, gradient), titles):
    most = np.nanmax(np.abs(x))
    ax.imshow(np.ma.masked_invalid(x), cmap=cmap, aspect="auto", vmin=-most, vmax=most)
    ax.axhline(5.5, color="k", linewidth=1)
    ax.set(title=name, xlabel="class")
axes[0].set(ylabel="position")
plt.show()

# %% [markdown]
# ## The memory of a loss
#
# The logits of a language model are its largest array. `fused_divergence` makes those of a few
# positions at a time, with their gradient (as Liger does, Hsu et al., 2024). Nothing is run here:
# the compiler says what value and gradient need beside their arguments.


# %%
def memory(num_tokens, width=128, vocabulary=32_000):
    def fused(hidden, kernel, teacher, unembedding):
        student = losses.LinearHead(hidden, kernel)
        return losses.fused_divergence(student, losses.LinearHead(teacher, unembedding))[0].value

    def plain(hidden, kernel, teacher, unembedding):
        return losses.forward_kl(hidden @ kernel, teacher @ unembedding).mean()

    shapes = [(num_tokens, width), (width, vocabulary)] * 2
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    programs = {f.__name__: jax.jit(jax.value_and_grad(f, argnums=(0, 1))) for f in (plain, fused)}
    compiled = {name: program.lower(*arguments).compile() for name, program in programs.items()}
    return {name: c.memory_analysis().temp_size_in_bytes / 2**20 for name, c in compiled.items()}


sizes = (256, 1024, 4096, 16384)
needed = [memory(n) for n in sizes]
fig, ax = plt.subplots(figsize=(7, 3.4))
logits_mib = [n * 32_000 * 4 / 2**20 for n in sizes]
ax.loglog(sizes, logits_mib, color=GREY, linestyle="--", label="one array of logits")
for name, color in (("plain", ORANGE), ("fused", BLUE)):
    ax.loglog(sizes, [one[name] for one in needed], "o-", color=color, linewidth=2, label=name)
ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
ax.minorticks_off()
ax.set(xlabel="tokens", ylabel="temporary memory, MiB")
ax.set_title("Forward KL and its gradient, 32,000 classes")
ax.legend()
plt.show()

# %% [markdown]
# Not drawn here: of the
# [relations](https://github.com/distilljax/distilljax/blob/main/docs/relation_losses.md),
# `margin_mse` (rankers), `probabilistic_transfer` and `correlation_congruence`; of the
# [features](https://github.com/distilljax/distilljax/blob/main/docs/feature_losses.md),
# `variational_information` and the `MemoryQueue` of `contrastive`.
#
# Next: [losses](https://github.com/distilljax/distilljax/blob/main/docs/losses.md) between logits,
# with formulas, gradients and the contract that all keep;
# [features](https://github.com/distilljax/distilljax/blob/main/docs/feature_losses.md);
# [relations](https://github.com/distilljax/distilljax/blob/main/docs/relation_losses.md);
# [sparse targets](https://github.com/distilljax/distilljax/blob/main/docs/sparse_targets.md);
# [fused losses](https://github.com/distilljax/distilljax/blob/main/docs/fused.md).
