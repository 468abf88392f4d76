"""Logits that are never whole: hidden states and the kernel that would make them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distilljax._checks import check_finite, check_positive, fail
from distilljax.losses import _numerics as numerics
from distilljax.losses._fused_mesh import (
    hold_classes,
    num_position_shards,
    over_positions,
    pad_axis,
    padded_rows,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearHead:
    """Logits as hidden states and an unembedding kernel, made when they are needed.

    logits = softcap tanh(scale (hidden kernel + bias) / softcap)
    without a softcap: logits = scale (hidden kernel + bias)

    A language model's logits are its largest array by far: 8,192 positions and 128,256
    classes are 4.2 GB in float32. A model that returns a head instead of logits lets
    `fused_divergence`, and every divergence, form them for a few positions at a time.

    Args:
      hidden: Last hidden states [*batch, width] of any floating dtype; get the
        gradient where the head is a student's.
      kernel: Unembedding [width, classes] of any floating dtype; gets the gradient. For
        tied embeddings pass ``embedding.T``: the gradient flows through.
      bias: [classes], or None; gets the gradient.
      softcap: A positive scalar that bounds the logits (Gemma), or None for no bound.
      scale: A scalar that multiplies the logits (Cohere, Granite); applied before the
        soft-cap.
      tied: Whether ``kernel`` is the transpose of an array, as ``embedding.T`` is. The
        results are the same; a loop over positions then reads the array itself, and
        makes no transposed copy of it first.

    Returns:
      A pytree, so that a head may be an argument or a result of compiled functions.

    Numerics: `logits` multiplies in the dtype of the inputs, accumulates in float32 and
    returns float32 (float64 if an input is).

    Example:
      >>> import jax.numpy as jnp
      >>> head = LinearHead(hidden=jnp.ones((2, 3)), kernel=jnp.eye(3, 5), scale=2.0)
      >>> head.shape, head.num_classes
      ((2, 5), 5)
      >>> head.logits()[0].tolist()
      [2.0, 2.0, 2.0, 0.0, 0.0]

    Reference: Gemma Team, "Gemma 2: Improving Open Language Models at a Practical
    Size", 2024, arXiv 2408.00118, section 2 (soft-cap).
    """

    # Any, because transformations rebuild this node around whatever they carry.
    hidden: Any
    kernel: Any
    bias: Any = None
    softcap: Any = None
    scale: Any = 1.0
    tied: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits, [*batch, classes]."""
        return (*self.hidden.shape[:-1], self.kernel.shape[-1])

    @property
    def ndim(self) -> int:
        """The number of axes of the logits."""
        return len(self.shape)

    @property
    def num_classes(self) -> int:
        """The size of the last axis, padded classes included."""
        return self.kernel.shape[-1]

    def logits(self) -> Float[Array, "*batch classes"]:
        """The logits, whole: for small models, and for positions one at a time."""
        check_head("LinearHead", "hidden", self)
        product = matmul(self.hidden, self.kernel)
        return finish(product, self.bias, self.scale, self.softcap)


def check_head(function: str, argument: str, head: LinearHead) -> None:
    """Floating-point hidden states and kernel whose widths agree, one bias a class."""
    hidden, kernel, bias = head.hidden, head.kernel, head.bias
    for name, array in (("hidden", hidden), ("kernel", kernel)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            fail(
                function,
                argument,
                f"have a floating-point {name}",
                jnp.result_type(array),
                "Pass the last hidden states and the unembedding, not token ids.",
                TypeError,
            )
    if jnp.ndim(kernel) != 2 or jnp.ndim(hidden) == 0:
        fail(
            function,
            argument,
            "have hidden [*batch, width] and kernel [width, classes]",
            f"{jnp.shape(hidden)} and {jnp.shape(kernel)}",
            "For tied embeddings [classes, width] pass kernel=embedding.T.",
        )
    if hidden.shape[-1] != kernel.shape[0]:
        fail(
            function,
            argument,
            "have a kernel with as many rows as hidden is wide, "
            f"{hidden.shape[-1]} of hidden {hidden.shape}",
            kernel.shape,
            "For tied embeddings [classes, width] pass kernel=embedding.T.",
        )
    if bias is not None and jnp.shape(bias) != kernel.shape[1:]:
        fail(
            function,
            argument,
            f"have one bias for each class, {kernel.shape[1:]}",
            jnp.shape(bias),
            "Pass bias=None for a head without one.",
        )
    for name, value in (("softcap", head.softcap), ("scale", head.scale)):
        if value is None:
            continue
        if not isinstance(value, str) and jnp.ndim(value) != 0:
            fail(
                function,
                argument,
                f"have a scalar {name}",
                f"an array of shape {jnp.shape(value)}",
                "Multiply a scale for each class into the kernel.",
            )
        check_finite(function, f"{argument}.{name}", value)
    if head.softcap is not None:
        remedy = "Use None for logits without a bound."
        check_positive(function, f"{argument}.softcap", head.softcap, remedy)


def matmul(hidden: Float[Array, "*b w"], kernel: Float[Array, "w c"]) -> Array:
    """Products in the dtype of the inputs, sums in float32, or float64."""
    dtype = jnp.promote_types(hidden.dtype, kernel.dtype)
    return jnp.matmul(
        hidden.astype(dtype),
        kernel.astype(dtype),
        preferred_element_type=numerics.compute_dtype(hidden, kernel),
    )


def finish(product: Array, bias: Any, scale: Any, softcap: Any) -> Array:
    """From the product of hidden states and kernel to the logits."""
    dtype = product.dtype
    if bias is not None:
        bias = jnp.asarray(bias).astype(dtype)
        product = product + jnp.expand_dims(bias, range(product.ndim - 1))
    if not (isinstance(scale, int | float) and scale == 1):
        product = product * jnp.asarray(scale).astype(dtype)
    if softcap is None:
        return product
    cap = jnp.asarray(softcap).astype(dtype)
    return cap * jnp.tanh(product / cap)


def first_classes(logits: Any, num_classes: int | None) -> Any:
    """Logits or a head without the classes that are padding; others as they are."""
    if num_classes is None:
        return logits
    if isinstance(logits, LinearHead):
        bias = None if logits.bias is None else logits.bias[:num_classes]
        kernel = logits.kernel[:, :num_classes]
        return dataclasses.replace(logits, kernel=kernel, bias=bias)
    return logits[..., :num_classes] if hasattr(logits, "shape") else logits


def take_rows(tree: Any, start: Any, size: int) -> Any:
    """The rows [start, start + size) of every array."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=0), tree
    )


def flat_rows(tree: Any, num_axes: int) -> Any:
    """The leading axes of every array as one."""
    return jax.tree.map(
        lambda x: jnp.reshape(x, (math.prod(x.shape[:num_axes]), *x.shape[num_axes:])),
        tree,
    )


def chunk_size(num_rows: int, most: int) -> int:
    """At most `most` rows in a chunk, and chunks as equal as can be."""
    num_chunks = max(1, -(-num_rows // max(most, 1)))
    return max(1, -(-num_rows // num_chunks))


# Products of fewer rows are slower, on a CPU by a third.
_FEW_ROWS = 128


def is_one_block(width: int, num_rows: int) -> bool:
    """Whether all logits at once take less memory than chunks of them would.

    They take some three to four arrays [positions, classes]; chunks hold the kernel's
    gradient, [width, classes] in float32, beside their own.
    """
    return num_rows <= max(_FEW_ROWS, width // 4)


def default_chunk(width: int, num_rows: int) -> int:
    """Positions in a chunk: a quarter of the student's width, and at least 128.

    A chunk costs its logits in memory, and once more the traffic of adding its part of
    the kernel's gradient to the rest: for classes V and a width W, 12 W V bytes in
    float32, beside some 24 V bytes for each of its positions. The two are equal at
    half the width; half of that is taken, because the traffic hides behind the
    products, and memory does not. Where there are few positions it is an eighth of
    them, or the blocks would be as large as the logits that they are there to avoid.
    """
    return max(_FEW_ROWS, min(width // 4, num_rows // 8))


def accepts_heads(loss: Callable[..., Array]) -> Callable[..., Array]:
    """Let a position-wise loss take a `LinearHead` wherever it takes logits.

    The logits of a chunk of positions are made, compared and dropped, and made again
    for the gradient. Arguments that are not given for each position pass through.
    """
    name = loss.__name__

    @functools.wraps(loss)
    def with_heads(first: Any, second: Any, **options: Any) -> Array:
        heads = [x for x in (first, second) if isinstance(x, LinearHead)]
        if not heads:
            return loss(first, second, **options)
        for head in heads:
            check_head(name, "hidden", head)
        where = options.pop("where", None)
        # Labels and the like belong to the positions; numbers do not.
        by_row = {
            key: options.pop(key) for key in list(options) if _is_array(options[key])
        }
        names = list(by_row)

        def of_rows(z: Any, v: Any, where: Any, *rest: Any) -> Array:
            return loss(
                z, v, where=where, **dict(zip(names, rest, strict=True)), **options
            )

        # Shapes are refused as they are for logits, before anything is split.
        whole = [_as_logits(x) for x in (first, second)]
        jax.eval_shape(of_rows, *whole, where, *by_row.values())
        mask = numerics.as_mask(where)
        signals = [_inert(x, mask) for x in (first, second)]
        return map_positions(of_rows, *signals, mask, *by_row.values())

    return with_heads


def _is_array(x: Any) -> bool:
    return not isinstance(x, str) and jnp.ndim(x) > 0


def _as_logits(signal: Any) -> Any:
    if not isinstance(signal, LinearHead):
        return signal
    dtype = numerics.compute_dtype(signal.hidden, signal.kernel)
    return jax.ShapeDtypeStruct(signal.shape, dtype)


def _inert(signal: Any, mask: Array | None) -> Any:
    """No nan of a masked position may reach the kernel's gradient, as 0 * nan does."""
    if not isinstance(signal, LinearHead):
        return signal
    hidden = numerics.zero_masked(signal.hidden, mask, trailing=1)
    return dataclasses.replace(signal, hidden=hidden)


def map_positions(function: Callable[..., Any], *signals: Any) -> Any:
    """`function` of all positions, with the logits of a chunk of them at a time.

    Args:
      function: Takes as many arguments as there are signals, each [rows, ...], and
        returns arrays [rows, ...]. Positions do not see each other.
      *signals: At least one `LinearHead`, which the function gets as logits; arrays,
        sparse signals or None, all of the same leading axes.

    Returns:
      What the function returns, with the leading axes.
    """
    lead = next(x for x in signals if isinstance(x, LinearHead)).shape[:-1]
    return jax.tree.map(lambda x: join_chunks(x, lead), map_chunks(function, *signals))


def map_chunks(function: Callable[..., Any], *signals: Any) -> Any:
    """As `map_positions`, for a function that returns anything of its rows.

    The results of the chunks come back along a new first axis. The last chunks are
    filled up with zeros: give a mask as one of the signals.

    On a mesh every device maps over the chunks of its own positions, and the classes of
    a chunk stay split over `tensor`, if they divide.
    """
    heads = [signal for signal in signals if isinstance(signal, LinearHead)]
    lead = heads[0].shape[:-1]
    num_rows = math.prod(lead)
    width = max(head.kernel.shape[0] for head in heads)
    rows_of_one = padded_rows(num_rows) // num_position_shards()
    size = chunk_size(rows_of_one, default_chunk(width, rows_of_one))
    num_chunks = num_position_shards() * -(-rows_of_one // size)
    parts = [_split(signal) for signal in signals]

    def split(x: Array) -> Array:
        flat = flat_rows(x, len(lead))
        padded = pad_axis(flat, num_chunks * size, 0)
        return padded.reshape(num_chunks, size, *flat.shape[1:])

    def mapped(chunks: Any, rests: Any) -> Any:
        @jax.checkpoint
        def chunk(rows: Any) -> Any:
            return function(*(_join(x, y) for x, y in zip(rows, rests, strict=True)))

        return jax.lax.map(chunk, chunks)

    chunks = jax.tree.map(split, [rows for rows, _ in parts])
    return over_positions(mapped)(chunks, [rest for _, rest in parts])


def _split(signal: Any) -> tuple[Any, Any]:
    """What a signal has for each position, and the rest of a head."""
    if not isinstance(signal, LinearHead):
        return signal, None
    return signal.hidden, dataclasses.replace(signal, hidden=None)


def _join(rows: Any, rest: LinearHead | None) -> Any:
    """The logits of a head, for some rows; of anything else the rows."""
    if rest is None:
        return rows
    product = hold_classes(matmul(rows, rest.kernel))
    return finish(product, rest.bias, rest.scale, rest.softcap)


def join_chunks(x: Array, lead: tuple[int, ...]) -> Array:
    """[chunks, rows, ...] as [*lead, ...], without what filled up the last chunk."""
    flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[: math.prod(lead)]
    return flat.reshape(*lead, *flat.shape[1:])
