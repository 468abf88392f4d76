"""Examples without labels, and examples with more keys than inputs and labels."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import grain
import ml_dtypes
import numpy as np
import pytest

from distilljax import data, models, objectives
from distilljax.config import Config
from distilljax.data import (
    ArrayRecord,
    Arrays,
    Few,
    Loader,
    RandomShift,
    Slice,
    Stratified,
    WithoutClasses,
    eval_batches,
    labels_of,
    load_in_memory,
    write_array_record,
)
from distilljax.data.sources import Records, subset
from distilljax.train import train

N = 22
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, 4, 4, 1)).astype(np.uint8)
LABELS = np.arange(N) % 3
EXTRA = {
    "loss_mask": np.arange(N) % 4 > 0,
    "teacher_logits": RNG.normal(size=(N, 3)).astype(np.float16),
    "tokens": RNG.integers(0, 9, (N, 2, 5)).astype(np.int16),
    "weight": RNG.random(N),
}
UNLABELLED = Arrays(IMAGES)
FULL = Arrays(IMAGES, LABELS, 3, extra=EXTRA)
MEMORY, GRAIN = Loader(8), Loader(8, in_memory=False)


def listed(source):
    """The same examples in a list, with Python's own booleans and floats."""
    examples = [dict(example) for example in source]
    for example in examples:
        for name in example.keys() & {"loss_mask", "weight"}:
            example[name] = example[name].item()
    return examples


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        assert batch[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


# --- without labels -------------------------------------------------------------------


@pytest.mark.parametrize("loader", [MEMORY, GRAIN], ids=["memory", "grain"])
@pytest.mark.parametrize(
    "source",
    [UNLABELLED, Records(UNLABELLED, dict), listed(UNLABELLED)],
    ids=["arrays", "records", "list"],
)
def test_without_labels_the_batches_have_none(source, loader):
    batches = loader(source, seed=0)
    for _ in range(4):  # over the end of an epoch
        batch = next(batches)
        assert batch.keys() == {"inputs", "index"}
        assert np.array_equal(batch["inputs"], IMAGES[batch["index"]])


def test_labels_may_be_dropped_by_a_transform():
    class Unlabelled(grain.transforms.Map):
        def map(self, element):
            return {"inputs": element["inputs"]}

    batch = next(Loader(8, transforms=(Unlabelled(),))(FULL, seed=0))
    assert batch.keys() == {"inputs", "index"}


def test_arrays_stay_unlabelled_through_slices_and_loading():
    part = Slice(UNLABELLED, 5, 9)()
    assert isinstance(part, Arrays)
    assert part.labels is None
    assert np.array_equal(part.inputs, IMAGES[5:9])
    loaded = load_in_memory(listed(UNLABELLED))
    assert loaded.labels is None
    assert np.array_equal(loaded.inputs, IMAGES)
    assert len(UNLABELLED) == N
    assert UNLABELLED[3].keys() == {"inputs"}


def test_inputs_are_checked_without_labels_too():
    with pytest.raises(ValueError, match="nan or inf at example 1"):
        Arrays(np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match=r"first axis of examples, got shape \(\)"):
        Arrays(np.array(3.0))
    source = [{"inputs": np.float32([0, np.inf if i == 3 else 1])} for i in range(8)]
    for loader in (MEMORY, GRAIN):
        with pytest.raises(ValueError, match="finite, got nan or inf at example 3"):
            next(loader(source, seed=0))


@pytest.mark.parametrize(
    "source",
    [
        UNLABELLED,
        subset(UNLABELLED, np.array([4, 2])),
        Records(UNLABELLED, dict),
        subset(Records(UNLABELLED, dict), np.array([4, 2])),
        listed(UNLABELLED),
    ],
    ids=["arrays", "part of arrays", "records", "part of records", "list"],
)
def test_what_needs_labels_says_so_and_names_the_source(source):
    got = r"source must have labels, got (Arrays|Records|list) of \d+ examples with "
    got += r"the keys \['inputs'\]"
    with pytest.raises(ValueError, match=f"eval_batches: {got}.*is on labelled data"):
        eval_batches(source, 2)
    with pytest.raises(ValueError, match=f"labels_of: {got}"):
        labels_of(source)
    for selection in (
        Few(lambda: source, 2),
        Stratified(lambda: source, 2),
        WithoutClasses(lambda: source, (1,)),
    ):
        name = type(selection).__name__
        with pytest.raises(ValueError, match=f"{name}: {got}.*Slice chooses by pos"):
            selection()


def test_labels_that_are_read_apart_do_not_need_an_example():
    class Locked(list):
        def __getitem__(self, index):
            raise AssertionError("read an example")

    source = Records(Locked([0] * 4), dict, read_labels=lambda: np.array([0, 1, 0, 1]))
    assert len(WithoutClasses(lambda: source, (1,))()) == 2


# --- other keys -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "loader",
    [
        MEMORY,
        Loader(8, scale=255.0, flatten=True),
        Loader(8, augment=RandomShift(2), teacher_view="independent"),
    ],
    ids=["plain", "flat", "augmented"],
)
@pytest.mark.parametrize("source", [FULL, Arrays(IMAGES, extra=EXTRA)])
def test_other_keys_are_passed_on_as_they_are_stored_by_both_readers(source, loader):
    by_grain = dataclasses.replace(loader, in_memory=False)
    by_memory = dataclasses.replace(loader, in_memory=True)
    streams = [
        loader(source, seed=3),
        by_grain(source, seed=3),
        by_grain(Records(source, dict), seed=3),
        by_grain(listed(source), seed=3),
        by_memory(listed(source), seed=3),
    ]
    for _ in range(4):
        first, *others = map(next, streams)
        for other in others:
            assert_same(first, other)
        for name, stored in EXTRA.items():
            assert first[name].dtype == stored.dtype
            assert np.array_equal(first[name], stored[first["index"]])
            assert not np.shares_memory(first[name], stored)
        assert ("labels" in first) == (source.labels is not None)


def test_other_keys_stay_through_slices_and_files(tmp_path):
    assert np.array_equal(Slice(FULL, 5, 9)().extra["tokens"], EXTRA["tokens"][5:9])
    path = tmp_path / "full.array_record"
    write_array_record(path, FULL)
    batch = next(GRAIN(ArrayRecord((str(path),), 3)(), seed=0))
    assert_same(batch, next(MEMORY(FULL, seed=0)))


def test_bfloat16_is_passed_on():
    logits = EXTRA["teacher_logits"].astype(ml_dtypes.bfloat16)
    source = Arrays(IMAGES, extra={"teacher_logits": logits})
    batch = next(MEMORY(source, seed=0))
    assert batch["teacher_logits"].dtype == ml_dtypes.bfloat16
    assert_same(batch, next(GRAIN(listed(source), seed=0)))


def test_an_evaluation_passes_other_keys_on_and_pads_them():
    extra = {name: x for name, x in EXTRA.items() if name != "loss_mask"}
    source = Arrays(IMAGES, LABELS, 3, extra=extra)
    for same in (source, listed(source)):
        batches = list(eval_batches(same, 8, flatten=True))
        assert len(batches) == 3
        for name, stored in extra.items():
            whole = np.concatenate([batch[name] for batch in batches])
            assert whole.dtype == stored.dtype
            assert np.array_equal(whole[:N], stored)
            assert whole.shape == (24, *stored.shape[1:])
            assert not whole[N:].any()


def test_the_teachers_inputs_may_be_stored_where_the_loader_makes_none():
    stored = RNG.random((N, 2, 2))
    source = Arrays(IMAGES, extra={"teacher_inputs": stored})
    for loader in (
        Loader(8, scale=255.0, flatten=True, augment=RandomShift(1)),
        Loader(8, scale=255.0, flatten=True, in_memory=False),
    ):
        batch = next(loader(source, seed=0))
        assert np.array_equal(batch["teacher_inputs"], stored[batch["index"]])
        assert batch["inputs"].shape == (8, 16)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("view", ["clean", "independent"])
def test_keys_that_the_loader_makes_are_refused(view, in_memory):
    def batch_with(name, **fields):
        source = Arrays(IMAGES, extra={name: np.zeros(N)})
        return next(Loader(8, in_memory=in_memory, **fields)(source, seed=0))

    with pytest.raises(ValueError, match="Loader: examples must have no key 'index'"):
        batch_with("index")
    with pytest.raises(ValueError, match="no key 'teacher_inputs', which is made here"):
        batch_with("teacher_inputs", augment=RandomShift(1), teacher_view=view)


def test_keys_that_the_evaluation_makes_are_refused():
    with pytest.raises(ValueError, match=r"eval_batches: .* no key 'loss_mask'"):
        next(eval_batches(FULL, 8))


@pytest.mark.parametrize(
    ("name", "array", "kind", "message"),
    [
        ("labels", LABELS, ValueError, "other keys than inputs and labels, got 'la"),
        ("weight", np.zeros(N - 1), ValueError, r"each of the 22 .* got shape \(21,\)"),
        (
            "weight",
            np.array(0.5),
            ValueError,
            r"one entry for each of the 22 .* shape \(\)",
        ),
        ("name", np.array(["a"] * N), TypeError, "name must be numbers or booleans"),
        ("name", np.full(N, None), TypeError, "numbers or booleans, got object"),
    ],
)
def test_extra_arrays_that_do_not_fit_are_an_error(name, array, kind, message):
    with pytest.raises(kind, match=f"Arrays: .*{message}"):
        Arrays(IMAGES, extra={name: array})


def odd_one(**fields):
    """Eight examples, of which the sixth is different."""
    examples = [{"inputs": np.zeros(2, np.uint8), "weight": 0.5} for _ in range(8)]
    examples[5] = {k: v for k, v in {**examples[5], **fields}.items() if v is not None}
    return examples


@pytest.mark.parametrize("loader", [MEMORY, GRAIN], ids=["memory", "grain"])
@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (odd_one(labels=1), ValueError, r"'labels', 'weight'\] at example 5"),
        (odd_one(weight=None), ValueError, r"got \['inputs'\] at example 5"),
        (odd_one(weight=[1.0]), ValueError, r"weight .* got \(1,\) float64 at exa.* 5"),
        (odd_one(weight=1), ValueError, r"weight .* got \(\) int64 at example 5"),
        ([{"inputs": np.zeros(2), "id": "a"}] * 8, TypeError, "id must be numbers"),
        ([{"image": np.zeros(2)}] * 8, ValueError, r"have inputs, .* \['image'\]"),
    ],
)
def test_examples_that_do_not_fit_together_are_named(loader, source, kind, message):
    ordered = dataclasses.replace(loader, shuffle=False)
    with pytest.raises(kind, match=f"Loader: .*{message}"):
        next(ordered(source, seed=0))


def test_a_source_that_is_labelled_in_part_is_an_error():
    with pytest.raises(ValueError, match="all have labels, got none at example 1"):
        labels_of([{"inputs": np.zeros(2), "labels": 1}, {"inputs": np.zeros(2)}])
    # 1,024 examples are read at a time: each part fits, but not the two together
    labelled = [{"inputs": np.zeros(1, np.uint8), "labels": 0}] * 1024
    with pytest.raises(ValueError, match="from example 1024 on"):
        load_in_memory(labelled + [{"inputs": np.zeros(1, np.uint8)}] * 3)


def test_stored_logits_count_towards_what_fits_in_memory():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    huge = np.broadcast_to(np.float16(0), (2**28,))
    source = Counted([{"inputs": np.zeros(1, np.uint8), "teacher_logits": huge}] * 3)
    Loader(2)(source, seed=0)
    assert source.reads == 1


# --- training on them -----------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """Inputs alone; or with a mask that leaves half of them out."""

    masked: bool = False

    def __call__(self) -> data.Arrays:
        inputs = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
        if not self.masked:
            return data.Arrays(inputs)
        return data.Arrays(inputs, extra={"loss_mask": np.arange(32) % 2 == 0})


@dataclass(frozen=True)
class Teacher:
    """Random weights are enough of a teacher to be imitated."""

    def __call__(self, mesh, rules):
        from flax import nnx

        return models.MLP(num_features=8, hidden=(12,), num_classes=3)(nnx.Rngs(7))


@pytest.mark.parametrize("masked", [False, True], ids=["inputs alone", "masked"])
@pytest.mark.parametrize("in_memory", [None, False], ids=["memory", "grain"])
def test_a_student_is_trained_without_labels(tmp_path, masked, in_memory):
    config = Config(
        name="unlabelled",
        student=models.MLP(num_features=8, hidden=(16,), num_classes=3),
        teacher=Teacher(),
        objective=objectives.LogitKD(temperature=2.0, ce_weight=0.0),
        data=Transfer(masked),
        loader=Loader(batch_size=32, in_memory=in_memory),
        steps=5,
        log_every_steps=1,
        mesh="data=-1",
    )
    results = train(config, tmp_path)
    assert results["steps"] == 5
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["split"] == "train"]
    losses = [r["loss"] for r in records]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert all("accuracy" not in r for r in records)
    assert "test" not in results.values()
