"""The pass over chunks of positions, with the gradient formed on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distilljax.losses import _numerics as numerics
from distilljax.losses._fused_block import Losses, evaluate
from distilljax.losses._fused_mesh import each_for_its_positions
from distilljax.losses._heads import (
    LinearHead,
    chunk_size,
    default_chunk,
    finish,
    take_rows,
)
from distilljax.losses._products import Products

Values = dict[str, Float[Array, "rows"]]


@dataclass(frozen=True)
class Pass:
    """What of a pass is known when it is compiled.

    Attributes:
      losses: What is computed of each block.
      num_classes: How many classes are real.
      chunk: How many positions a block has at most; None for the default.
      products: How kernels are multiplied.
      tied: Whether the student's kernel is the transpose of what is in memory.
    """

    losses: Losses
    num_classes: int
    chunk: int | None
    products: Products
    tied: bool = False


def total_and_values(
    plan: Pass,
    hidden: Float[Array, "rows width"],
    heads: dict[str, LinearHead],
    rows: dict[str, Any],
    scalars: dict[str, Any],
) -> tuple[Float[Array, ""], Values]:
    """The weighted sum, differentiable, and the values of every position."""
    student = heads["student"]
    params = {
        "hidden": hidden,
        "kernel": student.kernel,
        "bias": student.bias,
        "softcap": student.softcap,
        "scale": student.scale,
    }
    # A Python number stays one, so that a scale of 1 costs nothing.
    arrays = {key: x for key, x in params.items() if isinstance(x, jax.Array)}
    trained = {key: jnp.asarray(x) for key, x in arrays.items()}
    constant = {key: x for key, x in params.items() if key not in trained}
    weights = _weights(scalars)
    others = {key: scalars[key] for key in ("temperature", "label_smoothing")}

    def run(trained: Any, weights: Any, fixed: Any, wanted: frozenset[str]) -> Any:
        def local(trained: Any, weights: Any, fixed: Any) -> Any:
            return run_chunks(plan, trained | constant, weights, fixed, wanted)

        everywhere = each_for_its_positions(local, plan.products, wanted)
        return everywhere(trained, weights, fixed)

    @jax.custom_vjp
    def total(trained: Any, weights: Any, fixed: Any) -> Any:
        values, _ = run(trained, weights, fixed, frozenset())
        return _weighted(values, weights), values

    def forward(trained: Any, weights: Any, fixed: Any) -> Any:
        wanted = frozenset(key for key, x in trained.items() if x.perturbed)
        trained, weights, fixed = jax.tree.map(
            lambda x: x.value,
            (trained, weights, fixed),
            is_leaf=lambda x: hasattr(x, "perturbed"),
        )
        values, grads = run(trained, weights, fixed, wanted)
        return (_weighted(values, weights), values), (grads, _sums(values, weights))

    def backward(residuals: Any, cotangents: Any) -> Any:
        grads, sums = residuals
        slope, _ = cotangents
        back = dict.fromkeys(trained) | {
            key: (slope * x).astype(trained[key].dtype) for key, x in grads.items()
        }
        back_weights = dict.fromkeys(weights) | {
            key: slope * x for key, x in sums.items()
        }
        return back, back_weights, None

    total.defvjp(forward, backward, symbolic_zeros=True)
    fixed = (heads.get("teacher"), rows, others)
    return total(trained, weights, jax.lax.stop_gradient(fixed))


def all_at_once(
    plan: Pass,
    hidden: Float[Array, "rows width"],
    heads: dict[str, LinearHead],
    rows: dict[str, Any],
    scalars: dict[str, Any],
) -> tuple[Float[Array, ""], Values]:
    """As `total_and_values`, with all logits in memory, and no gradient of the kernel.

    What waits for the backward pass is the slope of the logits, and the products that
    make the gradients come after it, as in any program.
    """
    student = heads["student"]
    hidden = numerics.zero_masked(hidden, rows["mask"], trailing=1)
    product = plan.products.to_logits(hidden, student.kernel)
    logits = finish(product, student.bias, student.scale, student.softcap)
    weights = _weights(scalars)
    row, signal = _signal_of(plan, heads.get("teacher"), rows)
    fixed = jax.lax.stop_gradient((signal, row, scalars))

    def values_of(logits: Any, weights: Any, fixed: Any) -> tuple[Values, Array]:
        signal, row, scalars = fixed
        return evaluate(plan.losses, logits, signal, row, scalars | weights)

    @jax.custom_vjp
    def total(logits: Any, weights: Any, fixed: Any) -> Any:
        values, _ = values_of(logits, weights, fixed)
        return _weighted(values, weights), values

    def forward(logits: Any, weights: Any, fixed: Any) -> Any:
        values, slope = values_of(logits, weights, fixed)
        return (_weighted(values, weights), values), (slope, _sums(values, weights))

    def backward(residuals: Any, cotangents: Any) -> Any:
        slope, sums = residuals
        scale, _ = cotangents
        back = dict.fromkeys(weights) | {key: scale * x for key, x in sums.items()}
        return scale * slope, back, None

    total.defvjp(forward, backward)
    return total(_real(plan, logits), weights, fixed)


def _signal_of(
    plan: Pass, teacher: LinearHead | None, row: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """What belongs to the rows, and apart from it the teacher's logits or signal."""
    row = dict(row)
    signal = row.pop("teacher", None)
    if teacher is not None:
        signal = numerics.zero_masked(signal, row["mask"], trailing=1)
        signal = plan.products.to_logits(signal, teacher.kernel)
        signal = finish(signal, teacher.bias, teacher.scale, teacher.softcap)
    elif isinstance(signal, jax.Array):
        signal = numerics.zero_masked(signal, row["mask"], trailing=1)
    return row, _real(plan, signal) if isinstance(signal, jax.Array) else signal


def _weights(scalars: dict[str, Any]) -> dict[str, Any]:
    return {x: scalars[x] for x in ("kd_weight", "ce_weight") if x in scalars}


def _sums(values: Values, weights: dict[str, Array]) -> dict[str, Float[Array, ""]]:
    """The sum of what each of the weights multiplies."""
    pairs = ((key, key.removesuffix("_weight")) for key in weights)
    return {key: jnp.sum(values[name]) for key, name in pairs if name in values}


def _weighted(values: Values, weights: dict[str, Array]) -> Float[Array, ""]:
    nothing = jnp.zeros((), values["student_entropy"].dtype)
    sums = _sums(values, weights)
    return sum((weights[key] * x for key, x in sums.items()), start=nothing)


def run_chunks(
    plan: Pass,
    params: dict[str, Any],
    scalars: dict[str, Any],
    fixed: Any,
    wanted: frozenset[str],
) -> tuple[Values, dict[str, Array]]:
    """Values of all rows, and gradients of their weighted sum for what is wanted.

    The rows are cut where they lie. The last chunk starts early enough to be full, and
    what the one before has done already is masked in it.
    """
    teacher, rows, others = fixed
    hidden = params["hidden"]
    num_rows = hidden.shape[0]
    most = plan.chunk or default_chunk(params["kernel"].shape[0], num_rows)
    size = chunk_size(num_rows, most)
    own = _where_it_lies(params["kernel"], plan.tied)
    rest = {key: params[key] for key in ("bias", "scale", "softcap")}
    theirs = teacher and _where_it_lies(teacher.kernel, teacher.tied)

    def chunk(index: Any) -> Any:
        start = jnp.minimum(index * size, num_rows - size)
        row = take_rows(rows, start, size)
        fresh = start + jnp.arange(size) >= index * size
        row["mask"] &= fresh
        part = take_rows(hidden, start, size)
        head = {"kernel": own(), **rest}
        other = replace(teacher, kernel=theirs()) if teacher and theirs else None
        return start, one_chunk(plan, part, head, other, row, scalars | others, wanted)

    def body(totals: Any, index: Any) -> Any:
        start, (values, by_row, summed) = chunk(index)
        add_rows = partial(jax.tree.map, partial(_add_rows, start))
        return (
            add_rows(totals[0], values),
            add_rows(totals[1], by_row),
            jax.tree.map(jnp.add, totals[2], summed),
        ), None

    shapes = jax.eval_shape(lambda: chunk(0)[1])
    zeros = (
        *(jax.tree.map(lambda x: _rows_like(x, num_rows), y) for y in shapes[:2]),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[2]),
    )
    num_chunks = -(-num_rows // size)
    (values, by_row, summed), _ = jax.lax.scan(body, zeros, jnp.arange(num_chunks))
    if "kernel" in summed and plan.tied:
        summed["kernel"] = summed["kernel"].T
    return values, by_row | summed


def _where_it_lies(kernel: Array, tied: bool) -> Callable[[], Array]:
    """A kernel [width, classes] for use in a loop.

    Tied to an embedding it is transposed in there: the product then reads the embedding
    as it lies, where a loop over the transpose would begin with a copy of it.
    """
    if not tied:
        return lambda: kernel
    stored = kernel.T
    return lambda: stored.T


def _rows_like(x: Any, num_rows: int) -> Array:
    return jnp.zeros((num_rows, *x.shape[1:]), x.dtype)


def _add_rows(start: Any, x: Array, new: Array) -> Array:
    old = jax.lax.dynamic_slice_in_dim(x, start, new.shape[0], axis=0)
    return jax.lax.dynamic_update_slice_in_dim(x, old + new, start, axis=0)


def one_chunk(
    plan: Pass,
    hidden: Float[Array, "rows width"],
    head: dict[str, Any],
    teacher: LinearHead | None,
    row: dict[str, Any],
    scalars: dict[str, Any],
    wanted: frozenset[str],
) -> tuple[Values, dict[str, Array], dict[str, Array]]:
    """Values, gradients that belong to the rows, and gradients that add up."""
    row, signal = _signal_of(plan, teacher, row)
    hidden = numerics.zero_masked(hidden, row["mask"], trailing=1)
    product = plan.products.to_logits(hidden, head["kernel"])
    tail = {key: head[key] for key in ("bias", "scale", "softcap")}
    arrays = {key: x for key, x in tail.items() if isinstance(x, jax.Array)}

    def to_logits(product: Array, arrays: dict[str, Array]) -> Array:
        return _real(plan, finish(product, **(tail | arrays)))

    logits, pull = jax.vjp(to_logits, product, arrays)
    values, slope = evaluate(plan.losses, logits, signal, row, scalars)
    if not wanted:
        return values, {}, {}
    back, summed = pull(slope)
    summed = {key: x.astype(slope.dtype) for key, x in summed.items() if key in wanted}
    by_row = {}
    if "hidden" in wanted:
        by_row["hidden"] = plan.products.to_hidden(back, head["kernel"])
    if "kernel" in wanted:
        # Summed as it lies in memory: a copy of it, transposed, is not always fused.
        products = plan.products
        product = products.to_embedding if plan.tied else products.to_kernel
        summed["kernel"] = product(hidden, back)
    return values, by_row, summed


def _real(plan: Pass, logits: Float[Array, "rows c"]) -> Float[Array, "rows classes"]:
    """The logits of the classes that are real."""
    if logits.shape[1] == plan.num_classes:
        return logits
    if plan.products.classes_axis is None:
        return logits[:, : plan.num_classes]
    # What is cut off a split axis would have to be sent around: it is ruled out here.
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    impossible = jnp.asarray(-jnp.inf, logits.dtype)
    return plan.products.hold(jnp.where(index < plan.num_classes, logits, impossible))
