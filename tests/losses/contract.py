"""The contract that every loss keeps, as checks that take a `Case`.

A loss joins with one line in ``contract_test.py``. What differs between losses is a
`Kind` (which axes are reduced, and whether the examples of a batch see each other) and
flags. ``contract_test.py`` also runs the checks on losses that are broken on purpose.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.losses import oracles


@dataclass(frozen=True)
class Kind:
    """How the result's shape follows from the shapes of the inputs.

    Inputs are ``lead + item``: the mask has the shape ``lead``, the axes of ``item``
    are reduced. ``leads`` are the leading shapes to accept, the first for most checks.
    The result is ``lead``, or anything (a scalar, one value per anchor) if ``coupled``.
    If ``whole``, a row is no example by itself, so that the rows that are kept cannot
    be taken out of their sequence: the oracle gets all of them, and ``where``.
    """

    leads: tuple[tuple[int, ...], ...]
    item: tuple[int, ...]
    coupled: bool = False
    whole: bool = False


POSITION = Kind(leads=((6,), (), (2, 6), (2, 1, 3)), item=(40,))
EXAMPLE = Kind(leads=((6,),), item=(3, 4))
IMAGE = Kind(leads=((6,),), item=(2, 3, 4))
BATCH = Kind(leads=((6,),), item=(40,), coupled=True)
ROWS = Kind(leads=((6,), (2, 3)), item=(40,), coupled=True)
# Tokens first, so that most checks see a mask [batch, time].
LOGITS = Kind(leads=((2, 4), (7,)), item=(8,), coupled=True)
POINTS = Kind(leads=((2, 4), (7,)), item=(5,), coupled=True)
SEQUENCE = Kind(leads=((2, 4), (1, 4), (3, 2)), item=(8,), whole=True)


def as_it_is(array):
    return array


UNOPTIMIZED = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True, eq=False)
class Case:
    """A loss, its oracle in float64, and in what it differs from a plain divergence."""

    loss: Callable[..., jax.Array]
    oracle: Callable[..., np.ndarray]
    gradient: Callable[..., np.ndarray] | None = None
    """The closed form, where there is one; else central differences of the oracle."""
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = POSITION
    labelled: bool = False
    """The second argument is integer labels."""
    tempered: bool = True
    has_classes: bool = True
    """The last axis is a softmax's, so that a class may be at -inf."""
    shift_invariant: bool = True
    zero_at_teacher: bool = True
    """loss(p, p) is 0, and not only the minimum."""
    minimal_at_teacher: bool = True
    """No student does better than the teacher's own output."""
    any_width: bool = False
    """The last axes of student and teacher may differ."""
    pack: Callable[[Any], Any] = as_it_is
    """An argument of the loss, made of the one array that the checks work with."""
    spread: float = 2.0
    """The standard deviation of the teacher's logits or features."""
    unequal_classes: bool = False
    """The teacher may have more or fewer classes than the student."""
    surrogate: bool = False
    """Its gradient is not that of its value: a weight in it is a constant to it."""
    compiler_options: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        plain = (bool, int, float, str)
        short = {k: v if isinstance(v, plain) else "_" for k, v in self.options.items()}
        options = ",".join(f"{key}={value}" for key, value in short.items())
        return self.loss.__name__ + (f"({options})" if options else "")

    @property
    def gathers(self) -> bool:
        """It meets the examples of other shards when it is told the axis."""
        return "axis_name" in inspect.signature(self.loss).parameters

    def keywords(self, temperature):
        tempered = {"temperature": temperature} if self.tempered else {}
        return tempered | dict(self.options)

    def call(self, student, teacher, where=None, temperature=1.0):
        student, teacher = self.pack(student), self.pack(teacher)
        return self.loss(student, teacher, where=where, **self.keywords(temperature))

    def eager(self, student, teacher, where, temperature=1.0):
        """Values, student's gradient and teacher's gradient of a weighted sum."""

        def weighted(student, teacher):
            values = self.call(student, teacher, where, temperature)
            return jnp.sum(weights_of(values) * values), values

        wrt = (0,) if self.labelled else (0, 1)
        gradient = jax.grad(weighted, argnums=wrt, has_aux=True)
        gradients, values = gradient(student, teacher)
        return values, gradients[0], None if self.labelled else gradients[1]

    @functools.cached_property
    def compiled(self):
        return jax.jit(self.eager, compiler_options=self.compiler_options)

    def probe(self, student, teacher, where, temperature=1.0):
        """The same, compiled; most checks keep to one shape, to compile it once."""
        # A default would be a constant, and another compilation: it is passed on.
        return self.compiled(student, teacher, where, temperature)

    @functools.cached_property
    def quick_probe(self):
        """The same, compiled in half the time, for a shape that is used once."""
        return jax.jit(self.eager, compiler_options=UNOPTIMIZED)

    def oracle_values(self, student, teacher, temperature, **told):
        keywords = self.keywords(temperature) | told
        return np.asarray(self.oracle(student, teacher, **keywords))

    def oracle_gradient(self, student, teacher, temperature, weights, **told):
        """Gradient of the weighted sum; for closed forms, a weight for each row."""
        if self.gradient is None:
            return oracles.central_differences(
                lambda z: weights * self.oracle_values(z, teacher, temperature, **told),
                np.asarray(student, np.float64),
            )
        rows = self.gradient(student, teacher, **self.keywords(temperature), **told)
        return weights[..., None] * rows


def weights_of(values):
    """A different weight for each value, so that a mixed-up gradient shows."""
    weights = 1.0 + np.arange(values.size).reshape(values.shape) / 4
    return weights.astype(values.dtype)


def inputs(case: Case, lead=None, seed=0, noise=1.0):
    """Float64 logits (or features) of student and teacher, or labels for the latter."""
    lead = case.kind.leads[0] if lead is None else lead
    shape = lead + case.kind.item
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=shape) * case.spread
    student = teacher + noise * rng.normal(size=shape)
    if case.labelled:
        return student, rng.integers(shape[-1], size=lead)
    return student, teacher


def to_jax(case: Case, student, teacher, dtype=jnp.float32):
    second = jnp.asarray(teacher, jnp.int32 if case.labelled else dtype)
    return jnp.asarray(student, dtype), second


def some(case: Case):
    """A mask that keeps every other position."""
    lead = case.kind.leads[0]
    return np.arange(np.prod(lead)).reshape(lead) % 2 == 0


def every(case: Case):
    return np.ones(case.kind.leads[0], bool)


def kept(values, mask):
    return values[mask] if np.ndim(values) else values


# --- Values and gradients ------------------------------------------------------------


def matches_the_oracle(case: Case):
    """On the kept rows alone, at two temperatures, in float32."""
    student, teacher = inputs(case)
    mask = some(case)
    rows, told = (slice(None), {"where": mask}) if case.kind.whole else (mask, {})
    for temperature in (1.0, 2.5)[: 1 + case.tempered]:
        values, gradient, _ = case.probe(
            *to_jax(case, student, teacher), mask, temperature
        )
        weights = kept(weights_of(values), rows)
        expected = case.oracle_values(student[rows], teacher[rows], temperature, **told)
        slope = case.oracle_gradient(
            student[rows], teacher[rows], temperature, weights, **told
        )
        np.testing.assert_allclose(kept(values, rows), expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(gradient[rows], slope, rtol=1e-4, atol=1e-5)


def is_exact_in_float64(case: Case):
    """Under x64 nothing is rounded to float32 on the way, in value or gradient."""
    student, teacher = inputs(case)
    with jax.enable_x64(True):
        arrays = to_jax(case, student, teacher, jnp.float64)
        values, gradient, _ = case.quick_probe(*arrays, every(case), 1.7)
    assert values.dtype == gradient.dtype == np.float64
    weights = weights_of(values)
    expected = case.oracle_values(student, teacher, 1.7)
    np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-13)
    if not case.surrogate:
        differences = oracles.central_differences(
            lambda z: weights * case.oracle_values(z, teacher, 1.7), student
        )
        np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)
    if case.gradient is not None:
        slope = case.oracle_gradient(student, teacher, 1.7, weights)
        np.testing.assert_allclose(gradient, slope, rtol=1e-9, atol=1e-12)


def survives_bfloat16(case: Case):
    """A student close to its teacher (KL about 0.01), given in bfloat16.

    The oracle sees the same rounded numbers, so that only the arithmetic is judged: a
    log-softmax in bfloat16 makes a KL of 0.01 negative.
    """
    student, teacher = inputs(case, noise=0.15)
    arrays = to_jax(case, student, teacher, jnp.bfloat16)
    student, teacher = (np.asarray(x.astype(jnp.float32), np.float64) for x in arrays)
    teacher = teacher.astype(int) if case.labelled else teacher
    values, gradient, _ = case.quick_probe(*arrays, every(case))
    expected = case.oracle_values(student, teacher, 1.0)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
    assert np.all(np.asarray(values) >= -1e-6)
    slope = case.oracle_gradient(student, teacher, 1.0, weights_of(values))
    assert gradient.dtype == jnp.bfloat16
    error = np.abs(np.asarray(gradient.astype(jnp.float32)) - slope)
    assert error.max() <= 1e-2 * np.abs(slope).max()


def is_minimal_at_the_teacher(case: Case):
    """loss(p, p) has no gradient, and no student near the teacher does better."""
    _, teacher = inputs(case)
    z, v = to_jax(case, teacher, teacher)
    best, gradient, _ = case.probe(z, v, every(case))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    if case.zero_at_teacher:
        np.testing.assert_allclose(best, 0, atol=1e-6)
    for seed, noise in enumerate((0.01, 0.1, 1.0, 10.0)):
        step = np.random.default_rng(seed).normal(size=teacher.shape) * noise
        values, _, _ = case.probe(*to_jax(case, teacher + step, teacher), every(case))
        assert np.all(np.asarray(values) >= np.asarray(best) - 1e-6)
    assert np.all(np.asarray(values) > np.asarray(best) + 1e-3)


def takes_another_width(case: Case):
    """A teacher half as wide again: nothing is cropped, padded or broadcast."""
    student, teacher = inputs(case)
    teacher = np.concatenate([teacher, teacher[..., ::2]], axis=-1)
    arrays = to_jax(case, student, teacher)
    values, gradient, _ = case.quick_probe(*arrays, every(case))
    expected = case.oracle_values(student, teacher, 1.0)
    slope = case.oracle_gradient(student, teacher, 1.0, weights_of(values))
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


def keeps_examples_apart(case: Case):
    """Another first example changes nothing of the others, in value or gradient."""
    student, teacher = inputs(case)
    values, gradient, _ = case.probe(*to_jax(case, student, teacher), every(case))
    student[0] += np.random.default_rng(1).normal(size=student[0].shape)
    others, slope, _ = case.probe(*to_jax(case, student, teacher), every(case))
    assert np.any(values[0] != others[0])
    np.testing.assert_array_equal(values[1:], others[1:])
    np.testing.assert_array_equal(gradient[1:], slope[1:])


def ignores_a_shift(case: Case):
    """A constant added to all logits of a row changes no probability."""
    student, teacher = inputs(case)
    values, gradient, _ = case.probe(*to_jax(case, student, teacher), every(case))
    teacher = teacher if case.labelled else teacher - 5.0
    shifted, slope, _ = case.probe(*to_jax(case, student + 3.0, teacher), every(case))
    np.testing.assert_allclose(shifted, values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slope, gradient, rtol=1e-4, atol=1e-5)


def gives_the_teacher_no_gradient(case: Case):
    _, _, gradient = case.probe(*to_jax(case, *inputs(case)), every(case))
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


# --- Masks and impossible classes ----------------------------------------------------


def is_blind_to_masked_positions(case: Case):
    """Values and gradients are the same to the bit, whatever stands under the mask."""
    student, teacher = inputs(case)
    mask = some(case)
    clean_values, clean_gradient, _ = case.probe(*to_jax(case, student, teacher), mask)
    assert np.any(clean_values), "the case is trivial"
    for number, label in ((np.nan, -1), (np.inf, -100), (-np.inf, 10**6), (1e30, 3)):
        dirty, dirty_teacher = student.copy(), teacher.copy()
        dirty[~mask] = number
        dirty_teacher[~mask] = label if case.labelled else number
        values, gradient, _ = case.probe(*to_jax(case, dirty, dirty_teacher), mask)
        np.testing.assert_array_equal(values, clean_values)
        np.testing.assert_array_equal(gradient, clean_gradient)
        np.testing.assert_array_equal(gradient[~mask], np.zeros_like(gradient[~mask]))
        if not case.kind.coupled:
            np.testing.assert_array_equal(values[~mask], np.zeros_like(values[~mask]))


def is_zero_under_an_empty_mask(case: Case):
    """Also when nothing under it is a number."""
    student, teacher = inputs(case)
    nothing = np.zeros(case.kind.leads[0], bool)
    for bad in (student, np.full_like(student, np.nan)):
        values, gradient, _ = case.probe(*to_jax(case, bad, teacher), nothing)
        np.testing.assert_array_equal(values, np.zeros_like(values))
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def ignores_phantom_classes(case: Case):
    """Padded classes at -inf on both sides: the loss without them, and no gradient."""
    student, teacher = inputs(case)
    narrow, narrow_teacher = student[..., :-3], teacher[..., :-3]
    student[..., -3:] = -np.inf
    if case.labelled:
        narrow_teacher = teacher = teacher % narrow.shape[-1]
    else:
        teacher[..., -3:] = -np.inf
    values, gradient, _ = case.probe(*to_jax(case, student, teacher), every(case))
    expected = case.oracle_values(narrow, narrow_teacher, 1.0)
    slope = case.oracle_gradient(narrow, narrow_teacher, 1.0, weights_of(values))
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient[..., :-3], slope, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gradient[..., -3:], np.zeros_like(gradient[..., -3:]))


# --- Shapes, dtypes and transformations ----------------------------------------------


def takes_all_leading_axes(case: Case):
    """Without a mask: the leading shape comes back, and float32 whatever came in."""
    leads = case.kind.leads[1:] or case.kind.leads  # other checks use the first
    pairs = [inputs(case, lead) for lead in leads]

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def call_all(pairs):
        return [case.call(*pair) for pair in pairs]

    results = call_all([to_jax(case, *pair) for pair in pairs])
    for lead, pair, values in zip(leads, pairs, results, strict=True):
        assert case.kind.coupled or values.shape == lead
        expected = case.oracle_values(*pair, 1.0)
        np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        arrays = to_jax(case, *pairs[0], dtype)
        assert jax.eval_shape(case.call, *arrays).dtype == jnp.float32


def is_the_same_without_jit(case: Case):
    arrays = (*to_jax(case, *inputs(case)), jnp.asarray(some(case)), 2.5)
    values, _, _ = case.probe(*arrays)
    np.testing.assert_allclose(case.call(*arrays), values, rtol=1e-5, atol=1e-6)


def maps_over_a_batch(case: Case):
    """vmap gives what one call for each element gives, gradients included."""
    pairs = [to_jax(case, *inputs(case, seed=seed)) for seed in (1, 2)]
    single = [case.probe(*pair, some(case)) for pair in pairs]
    masks = jnp.stack([jnp.asarray(some(case))] * 2)
    student, teacher = (jnp.stack(arrays) for arrays in zip(*pairs, strict=True))
    values, gradient, _ = jax.vmap(case.quick_probe)(student, teacher, masks)
    for row, (one_value, one_gradient, _) in enumerate(single):
        np.testing.assert_allclose(values[row], one_value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient[row], one_gradient, rtol=1e-4, atol=1e-6)


def is_the_same_on_eight_devices(case: Case):
    """Values and gradients, with a mask that leaves unequal counts on the shards.

    A scalar comes back the same from every shard, values per anchor in their order.
    """
    lead = (16, *case.kind.leads[0][1:])
    arrays = to_jax(case, *inputs(case, lead))
    mask = jnp.asarray(np.random.default_rng(7).random(lead) < 0.6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")

    def local(student, teacher, mask):
        keywords = case.keywords(1.0)
        values = case.loss(student, teacher, where=mask, axis_name="data", **keywords)
        return jnp.atleast_1d(values)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split)

    def both(student, teacher):
        alone, pull = jax.vjp(lambda z: case.call(z, teacher, mask), student)
        values, pull_sharded = jax.vjp(lambda z: sharded(z, teacher, mask), student)
        weights = weights_of(alone)
        if alone.ndim:
            return alone, values, pull(weights), pull_sharded(weights)
        share = jnp.full_like(values, 1 / 8)
        return alone, values, pull(weights), pull_sharded(share)

    both = jax.jit(both, compiler_options=UNOPTIMIZED)
    alone, values, (slope,), (gradient,) = both(*arrays)
    expected = np.broadcast_to(alone, values.shape)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert np.any(slope)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


def refuses_other_shapes(case: Case):
    """Nothing broadcasts; the message has the function, both shapes and the fix."""
    student, teacher = to_jax(case, *inputs(case))
    student_argument, argument = case.pack(student), case.pack(teacher)
    keywords = case.keywords(1.0)
    shape = jax.tree.leaves(argument)[0].shape
    cuts = [(np.s_[:1], "one-hot" if case.labelled else "leading axes differ")]
    if not (case.labelled or case.any_width or case.unequal_classes):
        cuts.append((np.s_[..., :-1], "last axes"))
    for cut, remedy in cuts:
        other = jax.tree.map(operator.itemgetter(cut), argument)
        with pytest.raises(ValueError, match=remedy) as caught:
            case.loss(student_argument, other, **keywords)
        other_shape = jax.tree.leaves(other)[0].shape
        for part in (f"{case.loss.__name__}: ", f"{shape}", f"{other_shape}"):
            assert part in str(caught.value)
    for mask in (np.ones(student.shape, bool), np.ones((1,), bool), np.bool_(True)):
        with pytest.raises(ValueError, match="where must have the shape") as caught:
            case.call(student, teacher, jnp.asarray(mask))
        assert str(caught.value).startswith(case.loss.__name__)


def takes_unequal_classes(case: Case):
    """Fewer in the teacher, then fewer in the student: values and gradients."""
    student, teacher = inputs(case)
    for z, v in ((student, teacher[..., :-7]), (student[..., :-7], teacher)):
        values, gradient, _ = case.quick_probe(*to_jax(case, z, v), every(case))
        expected = case.oracle_values(z, v, 1.0)
        slope = case.oracle_gradient(z, v, 1.0, weights_of(values))
        np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


def refuses_other_kinds(case: Case):
    """Integer logits and floating labels are a `TypeError` of ours.

    The shape checker of the tests would be first, so it is taken off here.
    """
    student, teacher = to_jax(case, *inputs(case))
    loss = functools.partial(inspect.unwrap(case.loss), **case.keywords(1.0))
    with pytest.raises(TypeError, match="must be a floating-point array"):
        loss(case.pack(student.astype(jnp.int32)), case.pack(teacher))
    rule, other = "a floating-point array", jnp.int32
    if case.labelled:
        rule, other = "integer class indices", jnp.float32
    with pytest.raises(TypeError, match=f"must be {rule}"):
        loss(case.pack(student), case.pack(teacher.astype(other)))


def takes_a_traced_temperature(case: Case):
    """The same as a static one, without a second compilation; bad ones are refused."""
    student, teacher = to_jax(case, *inputs(case))
    at_two, _, _ = case.probe(student, teacher, every(case), 2.0)
    compilations = case.compiled._cache_size()
    at_three, _, _ = case.probe(student, teacher, every(case), 3.0)
    assert case.compiled._cache_size() == compilations
    static = case.call(student, teacher, temperature=3.0)
    np.testing.assert_allclose(at_three, static, rtol=1e-5, atol=1e-7)
    assert np.all(np.abs(at_two - at_three) > 1e-4)
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="temperature must be positive") as caught:
            case.call(student, teacher, temperature=bad)
        assert str(bad) in str(caught.value)


def checks_of(case: Case) -> list[Callable[[Case], None]]:
    """The checks that apply to a case."""
    checks = [
        matches_the_oracle,
        is_exact_in_float64,
        survives_bfloat16,
        is_blind_to_masked_positions,
        is_zero_under_an_empty_mask,
        takes_all_leading_axes,
        is_the_same_without_jit,
        maps_over_a_batch,
        refuses_other_shapes,
        refuses_other_kinds,
    ]
    if not case.labelled:
        checks.append(gives_the_teacher_no_gradient)
        if case.minimal_at_teacher:
            checks.append(is_minimal_at_the_teacher)
    if not case.kind.coupled:
        checks.append(keeps_examples_apart)
    if case.any_width:
        checks.append(takes_another_width)
    if case.has_classes:
        checks.append(ignores_phantom_classes)
    if case.shift_invariant:
        checks.append(ignores_a_shift)
    if case.tempered:
        checks.append(takes_a_traced_temperature)
    if case.gathers:
        checks.append(is_the_same_on_eight_devices)
    if case.unequal_classes:
        checks.append(takes_unequal_classes)
    return checks
