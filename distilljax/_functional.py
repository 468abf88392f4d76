"""Models as pure functions: an NNX module, or any pytree with a forward of its own.

The step is compiled over plain nested dicts of arrays, which XLA can donate and Orbax
can save, and which mean the same in the graph mode and in the tree mode of NNX. Here is
the only place that knows how a module becomes that, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Batch = Mapping[str, Any]
PyTree = Any
Forward = Callable[..., Any]
# (params, rest, batch, rng) -> (outputs, rest after the call)
Apply = Callable[[PyTree, PyTree, Batch, jax.Array], tuple[Any, PyTree]]


def default_forward(model: Callable[..., Any], batch: Batch) -> Any:
    """``model(inputs)``, or ``model(tokens, positions, segment_ids)``."""
    if "inputs" in batch:
        return model(batch["inputs"])
    if "tokens" in batch:
        return model(batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
    raise ValueError(
        "default_forward: batch must have 'inputs' or 'tokens', got the keys "
        f"{sorted(batch)}. Rename the key, or pass student_forward= and "
        "teacher_forward= functions of (model, batch)."
    )


def default_teacher_forward(model: Callable[..., Any], batch: Batch) -> Any:
    """``default_forward`` on the teacher's own view of the examples, if any."""
    if "teacher_inputs" in batch:
        return model(batch["teacher_inputs"])
    return default_forward(model, batch)


def cast_floating(tree: PyTree, dtype: Any | None) -> PyTree:
    """Every floating-point array of ``tree`` in ``dtype``; all others as they are."""
    if dtype is None:
        return tree

    def cast(x: Any) -> Any:
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, dtype) if floating else x

    return jax.tree.map(cast, tree)


def cast_batch(batch: Batch, dtype: Any | None) -> Batch:
    """A batch in ``dtype``, but for a teacher's outputs: they are as they came."""
    own = {"teacher": batch["teacher"]} if "teacher" in batch else {}
    return {**cast_floating({**batch, **dict.fromkeys(own)}, dtype), **own}


def _pure_like(state: Any, like: PyTree) -> PyTree:
    """A state as arrays: plain dicts where ``like`` is one, else a pure State."""
    return nnx.to_pure_dict(state) if isinstance(like, dict) else nnx.as_pure(state)


def split_module(
    module: nnx.Module, trainable: Any, *, training: bool
) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """The structure of a module, its trainable arrays and its other arrays.

    The structure that comes back is that of the module in training mode, or in
    inference mode (no dropout, BatchNorm with its running averages). The module itself
    keeps the mode it is in, and shares its arrays with what is returned.
    """
    copy = nnx.merge(*nnx.split(module))
    if training:
        copy.train()
    else:
        copy.eval()
    graphdef, params, rest = nnx.split(copy, trainable, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def module_apply(graphdef: nnx.GraphDef, trainable: Any, forward: Forward) -> Apply:
    """The pure function of an NNX module in training: outputs, and new state."""

    @jax.named_scope("student")  # for profiles, and for the reader of a plan
    def apply(params: PyTree, rest: PyTree, batch: Batch, rng: jax.Array):
        del rng  # a module carries its own random streams, in `rest`
        # copy=True: else a Variable of an outer trace would be mutated in this one.
        model = nnx.merge(graphdef, params, rest, copy=True)
        model.train()  # while it is traced: the user's module keeps its mode
        outputs = forward(model, batch)
        nnx.pop(model, nnx.Intermediate)  # what was sown is not state
        return outputs, _pure_like(nnx.split(model, trainable, ...)[2], rest)

    return apply


def module_infer(
    graphdef: nnx.GraphDef, forward: Forward
) -> Callable[[PyTree, PyTree, Batch], Any]:
    """The pure function of an NNX module in inference mode: outputs alone."""

    def infer(params: PyTree, rest: PyTree, batch: Batch) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        model.eval()
        return forward(model, batch)

    return infer


def pytree_infer(forward: Forward) -> Callable[[PyTree, PyTree, Batch], Any]:
    """The same of a model that is a pytree: its forward, if that has no state."""

    def infer(params: PyTree, rest: PyTree, batch: Batch) -> Any:
        if rest is not None:
            raise ValueError(
                "DistillStep: rest must be None for a teacher that is the student's "
                "average, got arrays: a forward with state is that of training, with "
                "dropout and batch statistics. Use an nnx.Module as the student."
            )
        return forward(params, batch)

    return infer


def pytree_apply(forward: Forward) -> Apply:
    """The pure function of a model that is a pytree and a forward function.

    The forward is ``forward(params, batch)``; or, where there is state besides the
    parameters (``rest`` is not None), ``forward(params, rest, batch, rng)``, which
    returns the outputs and the new ``rest``.
    """

    def apply(params: PyTree, rest: PyTree, batch: Batch, rng: jax.Array):
        if rest is None:
            return forward(params, batch), None
        return forward(params, rest, batch, rng)

    return apply


def freeze(
    teacher: nnx.Module | PyTree, forward: Forward | None, dtype: Any | None = None
) -> tuple[Callable[[PyTree, Batch], Any], PyTree]:
    """A teacher as ``apply(state, batch) -> outputs``, in inference mode; its state.

    With a `dtype`, its parameters are cast to it where it is applied; the statistics of
    a module stay as they are.
    """
    if isinstance(teacher, nnx.Module):
        graphdef, state, _ = split_module(teacher, ..., training=False)
        forward = forward or default_teacher_forward

        @jax.named_scope("teacher")
        def apply(state: PyTree, batch: Batch) -> Any:
            model = nnx.merge(graphdef, state, copy=True)
            if dtype is not None:
                nnx.update(model, cast_floating(nnx.state(model, nnx.Param), dtype))
            return forward(model, batch)

        return apply, state
    if forward is None:
        raise TypeError(
            "make_distill_step: teacher must be an nnx.Module unless teacher_forward "
            f"is given, got {type(teacher).__name__}. Pass "
            "teacher_forward=lambda params, batch: ..."
        )
    return lambda state, batch: forward(cast_floating(state, dtype), batch), teacher


def key_of(data: jax.Array | None) -> jax.Array:
    """The key of saved key data: of the default implementation, if it is as long.

    Data has no type, and so keeps one sharding through a compiled step; its length
    tells the implementations apart. None is key(0).
    """
    default = jax.random.key(0)
    if data is None or data.shape == jax.random.key_data(default).shape:
        return default if data is None else jax.random.wrap_key_data(data)
    impl = {2: "threefry2x32", 4: "rbg"}[data.shape[-1]]
    return jax.random.wrap_key_data(data, impl=impl)


def split_batch(batch: Batch, num_parts: int) -> PyTree:
    """[batch, ...] -> [num_parts, batch / num_parts, ...], without leaving a device.

    Part i has the examples i, i + num_parts, ...: contiguous parts would each lie on
    other devices than the next.
    """

    def split(x: jax.Array) -> jax.Array:
        if jnp.ndim(x) == 0:
            raise ValueError(
                "DistillStep: every array of the batch must have a batch axis where "
                f"accumulate={num_parts}, got a scalar, {x}. Repeat it for each "
                "example, or give it to the objective otherwise."
            )
        if x.shape[0] % num_parts:
            raise ValueError(
                f"DistillStep: batch must be divisible by accumulate={num_parts}, got "
                f"{x.shape[0]} examples. Change the batch size or accumulate."
            )
        return jnp.swapaxes(x.reshape(-1, num_parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, dict(batch))


def shard_as_batch(outputs: PyTree, axes: Any) -> PyTree:
    """Hold a model's outputs to the sharding of the batch, so that none is replicated.

    Other axes than the first are left to the compiler. Nothing is done without `axes`.
    """
    if axes is None:
        return outputs
    free = jax.sharding.PartitionSpec.UNCONSTRAINED

    def constrain(x: jax.Array) -> jax.Array:
        spec = jax.sharding.PartitionSpec(axes, *[free] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(constrain, outputs)


def refuse_shared_arrays(student: PyTree, teacher: PyTree) -> None:
    """Raise if they share an array: the student's are overwritten in place."""
    theirs = {id(x) for x in jax.tree.leaves(teacher)}
    if any(id(x) in theirs for x in jax.tree.leaves(student)):
        raise ValueError(
            "DistillStep: student must not share arrays with the teacher, got a module "
            "that does (the student's are overwritten in place). Copy it first: "
            "nnx.update(student, jax.tree.map(jnp.copy, nnx.state(student)))."
        )
