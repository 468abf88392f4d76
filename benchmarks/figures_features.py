"""What the losses between features are blind to: the figure of docs/feature_losses.md.

    python benchmarks/figures_features.py

The student's features are the teacher's, transformed: three times as large, rotated, in
another order, and so on. A loss that stays at its value for the teacher itself cannot
tell the two apart, and so leaves that much freedom to the student. Values are in units
of the loss of features that have nothing to do with the teacher's. It takes a minute.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from drawing import heat_table, write
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from distilljax import losses

Images = Float[Array, "batch height width channels"]

# 32 images of 4 x 4 positions and 16 channels.
SHAPE = (32, 4, 4, 16)
BLIND = 5e-4  # what is smaller is a rounding error


def features(seed: int) -> Images:
    """Channels that go together, of unequal strength, and not centred.

    Plain Gaussian noise looks the same to some losses when it is rotated.
    """
    scene, mix, offset = jax.random.split(jax.random.key(seed), 3)
    count = SHAPE[-1]
    mixing = jax.random.normal(mix, (count, count)) / count**0.5
    strengths = jnp.linspace(0.3, 1.7, count)
    mixed = jax.random.normal(scene, SHAPE) @ mixing
    return (mixed + jax.random.normal(offset, (count,))) * strengths


def rotation(x: Images) -> Images:
    noise = jax.random.normal(jax.random.key(7), (x.shape[-1],) * 2)
    return x @ jnp.linalg.qr(noise)[0]


def each_image_by_its_own(x: Images) -> Images:
    return x * jnp.linspace(0.5, 3.0, len(x))[:, None, None, None]


def positions_permuted(x: Images) -> Images:
    order = jax.random.permutation(jax.random.key(8), x.shape[1] * x.shape[2])
    return x.reshape(len(x), -1, x.shape[-1])[:, order].reshape(x.shape)


TRANSFORMATIONS: dict[str, Callable[[Images], Images]] = {
    "all features\n× 3": lambda x: 3 * x,
    "each image ×\nits own factor": each_image_by_its_own,
    "one vector\nadded to all": lambda x: x + jnp.linspace(-1, 1, x.shape[-1]),
    "sign\nflipped": lambda x: -x,
    "channels\npermuted": lambda x: x[..., ::-1],
    "channels\nrotated": rotation,
    "positions\npermuted": positions_permuted,
    "images\npermuted": lambda x: jnp.roll(x, 1, axis=0),
}


def tokens(x: Images) -> Float[Array, "batch time channels"]:
    """The positions as a sequence, and as rows of a table."""
    return x.reshape(len(x), -1, x.shape[-1])


def stage(x: Images) -> tuple[Images, Images]:
    """A pair of layers: half of the channels turn into the other half."""
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


LOSSES: dict[str, Callable[[Images, Images], Array]] = {
    "hidden_mse": losses.hidden_mse,
    "variational_information": lambda s, t: losses.variational_information(
        s, t, raw_scale=jnp.full(s.shape[-1], jnp.log(jnp.expm1(5.0)))
    ),
    "activation_boundary": losses.activation_boundary,
    "hidden_cosine": losses.hidden_cosine,
    "contrastive": lambda s, t: losses.contrastive(tokens(s), tokens(t)),
    "flow_of_solution": lambda s, t: losses.flow_of_solution(stage(s), stage(t)),
    "attention_relation": lambda s, t: losses.attention_relation(
        tokens(s), tokens(t), num_relation_heads=2
    ),
    "interchannel_correlation": losses.interchannel_correlation,
    "attention_transfer": losses.attention_transfer,
    "neuron_selectivity": losses.neuron_selectivity,
    "linear_cka": losses.linear_cka,
}


def measure() -> Float[np.ndarray, "losses transformations"]:
    """How far each transformation moves each loss; 1: as far as unrelated features."""
    teacher, unrelated = features(0), features(1)
    students = [unrelated, teacher]
    students += [change(teacher) for change in TRANSFORMATIONS.values()]

    def values(student: Images) -> Array:
        return jnp.stack([loss(student, teacher).mean() for loss in LOSSES.values()])

    far, best, *moved = np.asarray(jax.jit(jax.vmap(values))(jnp.stack(students)))
    return np.stack([(value - best) / (far - best) for value in moved], axis=1)


def draw(table: Float[np.ndarray, "losses transformations"]) -> Figure:
    """A cell for each loss and transformation."""
    return heat_table(
        table,
        list(LOSSES),
        list(TRANSFORMATIONS),
        "Student = transformed teacher. 0: the loss cannot tell them apart. "
        "1: as bad as unrelated features.",
        size=(9.6, 5.4),
        blind_below=BLIND,
    )


def main() -> None:
    """Measure, draw, and write the PNG."""
    write("feature_invariances", draw(measure()))


if __name__ == "__main__":
    main()
