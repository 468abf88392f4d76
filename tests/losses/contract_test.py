"""Every loss keeps the contract, and the contract catches the losses that do not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from distilljax._checks import check_logits, check_where
from distilljax.losses import _shards as shards
from distilljax.losses._numerics import compute_dtype
from tests.losses import contract, oracles
from tests.losses import feature_oracles as of
from tests.losses import relation_oracles as relations
from tests.losses.contract import (
    BATCH,
    EXAMPLE,
    IMAGE,
    LOGITS,
    POINTS,
    POSITION,
    ROWS,
    SEQUENCE,
    UNOPTIMIZED,
    Case,
    Kind,
)

# Options of a loss, and flags of the suite, that several lines use or that are long.
NORMALIZED = {"beta": 0.9, "normalized": True}
SMOOTH = {"label_smoothing": 0.2}
CENTERED = {"centered": True}
ABOVE = {"zero_at_teacher": False}
LABELS = {"labelled": True, "tempered": False}
RAW = {"tempered": False, "shift_invariant": False}
FEATURES = RAW | {"has_classes": False, "compiler_options": UNOPTIMIZED}
MAPS = FEATURES | {"kind": IMAGE}
ANY_MAPS = MAPS | {"any_width": True}
CHANNELS = FEATURES | ABOVE | {"kind": Kind(leads=((6,), (2, 3)), item=(4,))}
FLOW = MAPS | {"pack": lambda x: (x[..., :2], x[..., 2:])}
BOUNDARY = MAPS | {"minimal_at_teacher": False}
ALIGNED = FEATURES | {"kind": ROWS, "any_width": True}
CROWD = FEATURES | {"kind": ROWS, "tempered": True, "minimal_at_teacher": False}
ATTENTION = FEATURES | {"kind": SEQUENCE, "spread": 0.5}
RELATION = ATTENTION | {"any_width": True, "options": {"num_relation_heads": 2}}
SCORES = ATTENTION | {"pack": of.scores_of}
SCALES = {"raw_scale": jnp.array(of.RAW_SCALES, jnp.float32)}
CLOUD = FEATURES | {"kind": POINTS, "any_width": True}
SHARP = {"gamma": 1.0, "order": 3}
CONTRASTIVE = {"temperature": 0.5}
WEIGHTS = {"inter_weight": 0.5, "intra_weight": 3.0}
WEIGHED = {"surrogate": True}
ORDER = {"options": {"margin": 0.0}, "tempered": False}
UNEQUAL = {"unequal_classes": True}


def labelled_by_the_teacher(student, teacher, *, temperature=1.0, where=None):
    """`decoupled_kd` with labels made here: the likeliest of the first five classes."""
    check_logits("labelled_by_the_teacher", student=student, teacher=teacher)
    check_where("labelled_by_the_teacher", where, student.shape[:-1])
    labels = jnp.argmax(teacher[..., :5], axis=-1)
    return losses.decoupled_kd(
        student, teacher, labels=labels, temperature=temperature, where=where
    )


def dkd_oracle(student, teacher, temperature=1.0):
    labels = np.argmax(teacher[..., :5], axis=-1)
    return oracles.dkd(student, teacher, labels, temperature)


def dkd_gradient(student, teacher, temperature=1.0):
    labels = np.argmax(teacher[..., :5], axis=-1)
    return oracles.dkd_gradient(student, teacher, labels, temperature)


def standardized_kl(student, teacher, *, temperature=1.0, where=None):
    """What `standardize_logits` is for."""
    check_logits("standardized_kl", student=student, teacher=teacher)
    check_where("standardized_kl", where, student.shape[:-1])
    z, v = (losses.standardize_logits(x, where=where) for x in (student, teacher))
    return losses.forward_kl(z, v, temperature=temperature, where=where)


def sparse_kl(student, teacher, *, temperature=1.0, where=None):
    """`forward_kl` of the teacher's eight best classes and the tail bucket."""
    check_logits("sparse_kl", student=student, teacher=teacher)
    check_where("sparse_kl", where, student.shape[:-1])
    sparse = losses.SparseLogits.top_k(teacher, 8, (1.0, 1.7, 2.0, 2.5, 3.0))
    return losses.forward_kl(student, sparse, temperature=temperature, where=where)


# One line for each loss, and for options that change the mathematics.
# fmt: off
CASES = [
    Case(losses.forward_kl, oracles.forward_kl, oracles.forward_kl_gradient),
    Case(losses.reverse_kl, oracles.reverse_kl, oracles.reverse_kl_gradient),
    Case(losses.jensen_shannon, oracles.js, oracles.js_gradient),
    Case(losses.jensen_shannon, oracles.js, oracles.js_gradient, NORMALIZED),
    Case(losses.skew_forward_kl, oracles.skew_fkl, oracles.skew_fkl_gradient),
    Case(losses.skew_reverse_kl, oracles.skew_rkl, oracles.skew_rkl_gradient),
    Case(losses.total_variation, oracles.tv, oracles.tv_gradient),
    Case(losses.soft_cross_entropy, oracles.soft_ce, oracles.soft_ce_gradient, **ABOVE),
    Case(losses.cross_entropy, oracles.ce, oracles.ce_gradient, **LABELS),
    Case(losses.cross_entropy, oracles.ce, oracles.ce_gradient, SMOOTH, **LABELS),
    Case(losses.logit_mse, oracles.mse, oracles.mse_gradient, **RAW),
    Case(losses.logit_mse, oracles.mse, oracles.mse_gradient, CENTERED, tempered=False),
    Case(losses.hidden_mse, of.hidden_mse, of.hidden_mse_gradient, **FEATURES),
    Case(losses.hidden_cosine, of.hidden_cosine, of.hidden_cosine_gradient, **FEATURES),
    Case(losses.attention_transfer, of.attention_transfer, **ANY_MAPS),
    Case(losses.neuron_selectivity, of.neuron_selectivity, **ANY_MAPS),
    Case(losses.flow_of_solution, of.flow_of_solution, **FLOW),
    Case(losses.activation_boundary, of.activation_boundary, **BOUNDARY),
    Case(losses.variational_information, of.vid, of.vid_gradient, SCALES, **CHANNELS),
    Case(losses.linear_cka, of.linear_cka, **ALIGNED),
    Case(losses.contrastive, of.contrastive, **CROWD),
    Case(losses.attention_relation, of.attention_relation, **RELATION),
    Case(losses.attention_map_kl, of.attention_map_kl, **SCORES),
    Case(losses.margin_mse, relations.margin, relations.margin_slope, tempered=False),
    Case(losses.dist, relations.dist, options=WEIGHTS, kind=LOGITS),
    Case(losses.rkd_distance, relations.rkd_distance, **CLOUD),
    Case(losses.rkd_angle, relations.rkd_angle, **CLOUD),
    Case(losses.similarity_preserving, relations.similarity_preserving, **CLOUD),
    Case(losses.probabilistic_transfer, relations.pkt, **CLOUD),
    Case(losses.correlation_congruence, relations.congruence, options=SHARP, **CLOUD),
    Case(losses.embedding_relation, relations.embedding, **CLOUD),
    Case(losses.embedding_relation, relations.embedding, options=CONTRASTIVE, **CLOUD),
    Case(losses.interchannel_correlation, relations.icc, kind=EXAMPLE, **FEATURES),
    Case(losses.adaptive_kl, oracles.akl, oracles.akl_gradient, **WEIGHED),
    Case(losses.alpha_beta, oracles.ab, oracles.ab_gradient),
    Case(losses.hinge_ranking, oracles.hinge, oracles.hinge_gradient, **ORDER),
    Case(losses.universal_logit, oracles.uld, oracles.uld_gradient, **UNEQUAL),
    Case(labelled_by_the_teacher, dkd_oracle, dkd_gradient),
    Case(standardized_kl, oracles.standard_kl, oracles.standard_kl_gradient),
    Case(sparse_kl, oracles.bucket_kl, oracles.bucket_kl_gradient),
]
# fmt: on


def feature_distance(student, teacher, *, where=None):
    """An honest example-wise loss: mean squared difference over all but the batch."""
    check_where("feature_distance", where, student.shape[:1])
    check_logits("feature_distance", student=student, teacher=teacher)
    student, teacher = masked_features(student, teacher, where)
    return jnp.mean((student - jax.lax.stop_gradient(teacher)) ** 2, axis=(1, 2))


def gram_distance(student, teacher, *, where=None, axis_name=None):
    """An honest batch-coupled loss: how much the inner products differ."""
    check_where("gram_distance", where, student.shape[:1])
    check_logits("gram_distance", student=student, teacher=teacher)
    where = jnp.ones(len(student), bool) if where is None else where
    z, v = masked_features(student, jax.lax.stop_gradient(teacher), where)
    z, v, where = (shards.gather(x, axis_name) for x in (z, v, where))
    total = jnp.sum((z @ z.T - v @ v.T) ** 2)
    return total / jnp.maximum(where.sum() ** 2, 1).astype(total.dtype)


def masked_features(student, teacher, where):
    dtype = compute_dtype(student)
    arrays = (student.astype(dtype), teacher.astype(dtype))
    if where is None:
        return arrays
    where = where.reshape(where.shape + (1,) * (student.ndim - 1))
    return tuple(jnp.where(where, x, jnp.zeros((), dtype)) for x in arrays)


def feature_distance_oracle(student, teacher):
    return ((student - teacher) ** 2).mean(axis=(-2, -1))


def gram_distance_oracle(student, teacher):
    return ((student @ student.T - teacher @ teacher.T) ** 2).mean()


# The other two kinds of loss, so that the suite is known to carry them.
MODELS = [
    Case(feature_distance, feature_distance_oracle, kind=EXAMPLE, **FEATURES),
    Case(gram_distance, gram_distance_oracle, kind=BATCH, **FEATURES),
]


def parameters(cases):
    return [
        pytest.param(check, case, id=f"{case}-{check.__name__}")
        for case in cases
        for check in contract.checks_of(case)
    ]


@pytest.mark.parametrize(("check", "case"), parameters(CASES + MODELS))
def test_keeps_the_contract(check, case):
    check(case)


# --- Losses that are wrong on purpose ------------------------------------------------
# Each mistake was found in a released library, and each must fail the check named here.


def log_probs(student, teacher, temperature=1.0):
    log_q = jax.nn.log_softmax(student / jnp.asarray(temperature).astype(student.dtype))
    log_p = jax.nn.log_softmax(teacher / jnp.asarray(temperature).astype(student.dtype))
    return log_q, jax.lax.stop_gradient(log_p)


def naive_kl(student, teacher, *, temperature=1.0, where=None):
    log_q, log_p = log_probs(student, teacher, temperature)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def multiplies_by_the_mask(student, teacher, *, temperature=1.0, where=None):
    values = naive_kl(student, teacher, temperature=temperature)
    return values if where is None else values * where.astype(values.dtype)


def masks_only_the_values(student, teacher, *, temperature=1.0, where=None):
    values = naive_kl(student, teacher, temperature=temperature)
    return values if where is None else jnp.where(where, values, jnp.zeros_like(values))


def teaches_the_teacher(student, teacher, *, temperature=1.0, where=None):
    q, p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def cools_one_side_only(student, teacher, *, temperature=1.0, where=None):
    temperature = jnp.asarray(temperature).astype(student.dtype)
    return losses.forward_kl(student / temperature, teacher, where=where)


def hides_the_factor(student, teacher, *, temperature=1.0, where=None):
    values = losses.forward_kl(student, teacher, temperature=temperature, where=where)
    return values * jnp.asarray(temperature).astype(values.dtype) ** 2


def has_the_sign_flipped(student, teacher, *, temperature=1.0, where=None):
    return -losses.forward_kl(student, teacher, temperature=temperature, where=where)


def is_a_cross_entropy(student, teacher, *, temperature=1.0, where=None):
    return losses.soft_cross_entropy(
        student, teacher, temperature=temperature, where=where
    )


def recompiles(student, teacher, *, temperature=1.0, where=None):
    return losses.forward_kl(student, teacher, temperature=float(temperature))


def compares_raw_logits(student, teacher, *, temperature=1.0, where=None):
    return losses.logit_mse(student, teacher, where=where)


def forgets_the_empty_batch(student, teacher, *, where=None):
    student, teacher = masked_features(student, teacher, where)
    total = jnp.sum((student - jax.lax.stop_gradient(teacher)) ** 2)
    return total if where is None else total / where.sum().astype(total.dtype)


def mixes_examples(student, teacher, *, where=None):
    """Right for a mask of all or none, and the mean over the batch is right as well."""
    values = feature_distance(student, teacher, where=where)
    return jnp.roll(values, 1)


def counts_the_padding(student, teacher, *, where=None):
    """The padding makes no difference, but pairs with it are in the mean."""
    student, teacher = masked_features(student, teacher, where)
    return gram_distance(student, teacher)


def relation(student, teacher, num_relation_heads, where=None):
    return losses.attention_relation(
        student, teacher, num_relation_heads=num_relation_heads, where=where
    )


def attends_to_padding(student, teacher, *, num_relation_heads, where=None):
    """The padding is zero, and gets no gradient, but it stands in every softmax."""
    student, teacher = (
        x if where is None else jnp.where(where[..., None], x, jnp.zeros((), x.dtype))
        for x in (student, teacher)
    )
    values = relation(student, teacher, num_relation_heads)
    return values if where is None else jnp.where(where, values, 0.0)


def mixes_batch_and_time(student, teacher, *, num_relation_heads, where=None):
    """A projection that flattens the wrong axes, and another batch size fails."""
    batch, time, width = student.shape
    student = student.reshape(time, batch, width).swapaxes(0, 1)
    return relation(student, teacher, num_relation_heads, where)


def crops_the_wider_teacher(student, teacher, *, num_relation_heads, where=None):
    teacher = teacher[..., : student.shape[-1]]
    return relation(student, teacher, num_relation_heads, where)


def detaches_the_other_shards(student, teacher, *, where=None, axis_name=None):
    """The value is right; a shard learns from the pairs that it starts only."""
    others = shards.gather(jax.lax.stop_gradient(student), axis_name)
    first = shards.first_row(len(student), axis_name)
    everyone = jax.lax.dynamic_update_slice(others, student, (first, 0))
    return jnp.mean((student @ everyone.T) ** 2, axis=-1)


def forgets_the_other_shards(student, teacher, *, where=None, axis_name=None):
    return gram_distance(student, teacher, where=where)


BROKEN = [
    (multiplies_by_the_mask, contract.is_blind_to_masked_positions, POSITION),
    (masks_only_the_values, contract.is_blind_to_masked_positions, POSITION),
    (naive_kl, contract.is_blind_to_masked_positions, POSITION),
    (naive_kl, contract.is_zero_under_an_empty_mask, POSITION),
    (naive_kl, contract.ignores_phantom_classes, POSITION),
    (naive_kl, contract.survives_bfloat16, POSITION),
    (naive_kl, contract.takes_all_leading_axes, POSITION),
    (naive_kl, contract.refuses_other_shapes, POSITION),
    (naive_kl, contract.refuses_other_kinds, POSITION),
    (teaches_the_teacher, contract.gives_the_teacher_no_gradient, POSITION),
    (cools_one_side_only, contract.matches_the_oracle, POSITION),
    (hides_the_factor, contract.matches_the_oracle, POSITION),
    (hides_the_factor, contract.is_exact_in_float64, POSITION),
    (has_the_sign_flipped, contract.is_minimal_at_the_teacher, POSITION),
    (is_a_cross_entropy, contract.is_minimal_at_the_teacher, POSITION),
    (recompiles, contract.takes_a_traced_temperature, POSITION),
    (compares_raw_logits, contract.ignores_a_shift, POSITION),
    (forgets_the_empty_batch, contract.is_zero_under_an_empty_mask, EXAMPLE),
    (mixes_examples, contract.matches_the_oracle, EXAMPLE),
    (counts_the_padding, contract.matches_the_oracle, BATCH),
    (mixes_examples, contract.keeps_examples_apart, EXAMPLE),
    (mixes_batch_and_time, contract.keeps_examples_apart, SEQUENCE),
    (attends_to_padding, contract.matches_the_oracle, SEQUENCE),
    (crops_the_wider_teacher, contract.takes_another_width, SEQUENCE),
    (forgets_the_other_shards, contract.is_the_same_on_eight_devices, BATCH),
    (detaches_the_other_shards, contract.is_the_same_on_eight_devices, BATCH),
]


@functools.cache
def broken_case(loss, kind=POSITION):
    """One case for each, so that it is compiled once."""
    if kind is POSITION:
        return Case(loss, oracles.forward_kl, compiler_options=UNOPTIMIZED)
    if kind is SEQUENCE:
        return Case(loss, of.attention_relation, **RELATION)
    oracle = gram_distance_oracle if kind is BATCH else feature_distance_oracle
    return Case(loss, oracle, **FEATURES | {"kind": kind})


@pytest.mark.parametrize(
    ("loss", "check", "kind"),
    [pytest.param(*row, id=f"{row[0].__name__}-{row[1].__name__}") for row in BROKEN],
)
def test_the_contract_catches(loss, check, kind):
    failures = (
        AssertionError,
        pytest.fail.Exception,
        jax.errors.ConcretizationTypeError,  # asks a traced value for its number
        jax.dtypes.TypePromotionError,  # computes with whatever it was given
    )
    with pytest.raises(failures):
        check(broken_case(loss, kind))


def pads_with_zero_logits(student, teacher, *, temperature=1.0, where=None):
    """A logit of 0 is a class, and a likely one: what is not there is at -inf."""
    classes = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, classes - x.shape[-1])])
        for x in (student, teacher)
    )
    return losses.universal_logit(
        student, teacher, temperature=temperature, where=where
    )


def test_the_contract_catches_zeros_in_the_place_of_missing_classes():
    case = Case(pads_with_zero_logits, oracles.uld, **UNEQUAL)
    with pytest.raises(AssertionError):
        contract.takes_unequal_classes(case)


def test_float64_oracle_of_the_contract_is_the_formula():
    """One number by hand under all the comparisons: .5 log 2 + .5 log(2/3)."""
    student, teacher = np.log([0.25, 0.75]), np.log([0.5, 0.5])
    by_hand = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert oracles.forward_kl(student, teacher) == pytest.approx(by_hand, rel=1e-12)
