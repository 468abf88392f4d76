from __future__ import annotations

import dataclasses
import json
import time
from functools import partial

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilljax.data import Arrays, Loader, RandomShift, Slice, Stratified
from distilljax.data.sources import Records

N = 22


def arrays(num_examples=N, height=4):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, height, height, 1)).astype(np.uint8)
    return Arrays(images, np.arange(num_examples) % 10, 10)


def records(num_examples=N):
    """The same examples, read one by one."""
    source = arrays(num_examples)
    return Records(source, dict, 10)


def take(iterator, steps):
    return [next(iterator) for _ in range(steps)]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def global_batches(loader, source, processes, steps, state=None, seed=0):
    """What the processes see together, in the order of the global array."""
    iterators = [
        loader(source, seed=seed, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    if state is not None:
        for iterator in iterators:
            iterator.set_state(state)
    batches = []
    for _ in range(steps):
        local = [next(iterator) for iterator in iterators]
        batches.append({k: np.concatenate([b[k] for b in local]) for k in local[0]})
    states = [iterator.get_state() for iterator in iterators]
    assert all(s == states[0] for s in states)
    return batches, states[0]


LOADERS = {
    "plain": Loader(8, scale=255.0),
    "ordered": Loader(8, shuffle=False, flatten=True),
    "augmented": Loader(8, scale=255.0, augment=RandomShift(2)),
    "clean teacher": Loader(8, augment=RandomShift(2), teacher_view="clean"),
    "independent": Loader(
        8, augment=RandomShift(2), teacher_view="independent", flatten=True
    ),
}
each_loader = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)


def by_grain(loader):
    return dataclasses.replace(loader, in_memory=False)


def test_a_batch_is_what_the_source_says():
    source = arrays()
    batch = next(Loader(6, scale=255.0)(source, seed=0))
    assert batch.keys() == {"inputs", "labels", "index"}
    assert batch["inputs"].shape == (6, 4, 4, 1)
    assert [batch[k].dtype for k in batch] == [np.float32, np.int32, np.int64]
    for row, i in enumerate(batch["index"]):
        expected = source.inputs[i].astype(np.float32) / np.float32(255)
        assert np.array_equal(batch["inputs"][row], expected)
        assert batch["labels"][row] == source.labels[i]


def test_flatten_keeps_the_values():
    plain = next(Loader(6)(arrays(), seed=0))
    flat = next(Loader(6, flatten=True)(arrays(), seed=0))
    assert flat["inputs"].shape == (6, 16)
    assert np.array_equal(flat["inputs"], plain["inputs"].reshape(6, 16))


@each_loader
def test_both_readers_give_the_same_bits(loader):
    in_memory = take(loader(arrays(), seed=3), 12)
    assert_same(in_memory, take(by_grain(loader)(arrays(), seed=3), 12))
    assert_same(in_memory, take(by_grain(loader)(records(), seed=3), 12))
    loaded = dataclasses.replace(loader, in_memory=True)
    assert_same(in_memory, take(loaded(records(), seed=3), 12))


@each_loader
def test_the_same_seed_gives_the_same_batches_and_another_seed_others(loader):
    once = take(loader(arrays(), seed=1), 6)
    assert_same(once, take(loader(arrays(), seed=1), 6))
    other = take(loader(arrays(), seed=2), 6)
    differ = not all(
        np.array_equal(a["inputs"], b["inputs"])
        for a, b in zip(once, other, strict=True)
    )
    assert differ == (loader.shuffle or loader.augment is not None)


@pytest.mark.parametrize("prepare", [lambda x: x, by_grain], ids=["memory", "grain"])
def test_an_epoch_covers_every_example_once(prepare):
    batches = take(prepare(Loader(11))(arrays(), seed=0), 6)
    for epoch in range(3):
        seen = np.concatenate([b["index"] for b in batches[2 * epoch : 2 * epoch + 2]])
        assert sorted(seen.tolist()) == list(range(N))


@pytest.mark.parametrize("prepare", [lambda x: x, by_grain], ids=["memory", "grain"])
def test_an_epoch_that_ends_inside_a_batch_loses_and_repeats_nothing(prepare):
    # 22 batches of 8 are 8 epochs of 22.
    batches = take(prepare(Loader(8))(arrays(), seed=0), N)
    seen = np.concatenate([b["index"] for b in batches])
    assert np.bincount(seen).tolist() == [8] * N


@settings(max_examples=30)
@given(
    before=st.integers(0, 12),
    name=st.sampled_from(sorted(LOADERS)),
    grain_first=st.booleans(),
    grain_second=st.booleans(),
)
def test_resuming_anywhere_continues_the_same_stream(
    before, name, grain_first, grain_second
):
    """Also from one reader to the other: they share one state."""
    loader = LOADERS[name]
    whole = take(loader(arrays(), seed=0), before + 4)
    first = (by_grain(loader) if grain_first else loader)(arrays(), seed=0)
    take(first, before)
    state = json.loads(json.dumps(first.get_state()))
    second = (by_grain(loader) if grain_second else loader)(arrays(), seed=0)
    second.set_state(state)
    assert second.get_state() == state
    assert_same(take(second, 4), whole[before:])


@pytest.mark.parametrize("prepare", [lambda x: x, by_grain], ids=["memory", "grain"])
def test_one_iterator_can_be_set_back_and_forth(prepare):
    iterator = prepare(Loader(8))(arrays(), seed=0)
    states, batches = [], []
    for _ in range(5):
        states.append(iterator.get_state())
        batches.append(next(iterator))
    for k in (3, 0, 4, 4):
        iterator.set_state(states[k])
        assert_same([next(iterator)], [batches[k]])


def test_the_state_does_not_run_ahead_with_the_prefetch():
    iterator = by_grain(dataclasses.replace(LOADERS["plain"], prefetch=16))(
        arrays(), seed=0
    )
    next(iterator)
    time.sleep(0.05)  # the threads read on
    assert iterator.get_state()["next_example"] == 8


@each_loader
@pytest.mark.parametrize("prepare", [lambda x: x, by_grain], ids=["memory", "grain"])
def test_the_number_of_processes_changes_nothing(loader, prepare):
    loader = prepare(loader)
    whole, _ = global_batches(loader, arrays(), 1, 9)
    state, resumed = None, []
    for processes, steps in ((1, 2), (2, 2), (4, 3), (2, 1), (1, 1)):
        batches, state = global_batches(loader, arrays(), processes, steps, state)
        resumed += batches
    assert_same(resumed, whole)


def test_a_state_may_be_resumed_with_another_batch_size():
    whole = np.concatenate([b["index"] for b in take(Loader(4)(arrays(), seed=0), 10)])
    first = Loader(4)(arrays(), seed=0)
    seen = [b["index"] for b in take(first, 3)]
    for loader in (Loader(7), by_grain(Loader(7))):
        second = loader(arrays(), seed=0)
        second.set_state(first.get_state())
        more = [b["index"] for b in take(second, 4)]
        assert np.array_equal(np.concatenate(seen + more), whole)


@pytest.mark.parametrize("threads", [1, 7])
def test_the_number_of_threads_changes_nothing(threads):
    loader = dataclasses.replace(
        LOADERS["augmented"], in_memory=False, num_threads=threads, prefetch=threads
    )
    expected = take(LOADERS["augmented"](arrays(), seed=0), 12)
    assert_same(take(loader(records(), seed=0), 12), expected)


@pytest.mark.slow
def test_worker_processes_change_nothing():
    loader = dataclasses.replace(by_grain(LOADERS["augmented"]), num_workers=2)
    iterator = loader(records(), seed=0)
    expected = take(LOADERS["augmented"](arrays(), seed=0), 8)
    assert_same(take(iterator, 5), expected[:5])
    other = loader(records(), seed=0)
    other.set_state(iterator.get_state())
    assert_same(take(other, 3), expected[5:])


def test_the_teacher_sees_what_was_asked_for():
    def views(view):
        loader = Loader(8, augment=RandomShift(2), teacher_view=view)
        return take(loader(arrays(), seed=0), 4)

    clean = take(Loader(8)(arrays(), seed=0), 4)
    same = views("same")
    assert all("teacher_inputs" not in batch for batch in same)
    for plain, student, a, b in zip(
        clean, same, views("clean"), views("independent"), strict=True
    ):
        assert not np.array_equal(student["inputs"], plain["inputs"])
        # The student's view does not depend on what the teacher sees.
        assert np.array_equal(a["inputs"], student["inputs"])
        assert np.array_equal(b["inputs"], student["inputs"])
        assert np.array_equal(a["teacher_inputs"], plain["inputs"])
        assert not np.array_equal(b["teacher_inputs"], plain["inputs"])
        assert not np.array_equal(b["teacher_inputs"], b["inputs"])


def test_an_example_is_augmented_anew_in_each_epoch():
    loader = Loader(N, shuffle=False, augment=RandomShift(2))
    first, second = take(loader(arrays(), seed=0), 2)
    assert np.array_equal(first["index"], second["index"])
    assert not np.array_equal(first["inputs"], second["inputs"])


class Negate(grain.transforms.Map):
    def map(self, element):
        return element | {"inputs": 255 - element["inputs"]}


class Crop(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        y, x = rng.integers(0, 3, 2)
        return element | {"inputs": element["inputs"][y : y + 2, x : x + 2]}


class Position(grain.transforms.MapWithIndex):
    def map_with_index(self, index, element):
        return element | {"inputs": np.full(2, index, np.float32)}


def test_transforms_of_grain_work_on_single_examples():
    source = arrays()
    batch = next(Loader(6, transforms=(Negate(),))(source, seed=0))
    assert np.array_equal(batch["inputs"], 255.0 - source.inputs[batch["index"]])
    ordered = Loader(6, shuffle=False, transforms=(Position(),))(source, seed=0)
    positions = np.concatenate([b["inputs"][:, 0] for b in take(ordered, 5)])
    assert positions.tolist() == list(range(30))


def test_random_transforms_belong_to_the_position_in_the_stream():
    loader = Loader(8, transforms=(Crop(), Negate()))
    whole, _ = global_batches(loader, arrays(), 1, 6)
    assert whole[0]["inputs"].shape == (8, 2, 2, 1)
    first, state = global_batches(loader, arrays(), 2, 3)
    second, _ = global_batches(loader, arrays(), 4, 3, state)
    assert_same(first + second, whole)
    crops = {tuple(row.ravel().tolist()) for b in whole for row in b["inputs"]}
    assert len(crops) > 1.2 * N  # and not one crop for each example


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"batch_size": 6, "process_count": 4},
            "multiple of the number of proc.*got 6",
        ),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"batch_size": 23}, "at most the size of the source, 22, got 23"),
        (
            {"batch_size": 8, "process_index": 2, "process_count": 2},
            "process_index must",
        ),
        ({"batch_size": 8, "scale": 0.0}, "scale must be positive, got 0.0"),
        (
            {"batch_size": 8, "teacher_view": "clean"},
            "'clean'. Without an augmentation",
        ),
        ({"batch_size": 8, "transforms": (Negate(),), "in_memory": True}, "in_memory"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_batch(fields, message):
    call = {k: v for k, v in fields.items() if k.startswith("process_")}
    make = {k: v for k, v in fields.items() if not k.startswith("process_")}
    with pytest.raises(ValueError, match=message):
        Loader(**make)(arrays(), seed=0, **call)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_empty_source_is_an_error(dtype):
    empty = Arrays(np.zeros((0, 4), dtype), np.zeros(0, int))
    whole = Arrays(np.zeros((4, 2, 2), dtype), np.zeros(4, int))
    rest = Stratified(whole, 4, complement=True)()
    for source in (empty, Slice(whole, 3, 2)(), rest):
        for read in (partial(Loader(1), seed=0), Loader(1).eval_batches):
            with pytest.raises(ValueError, match="at least one example, got 0"):
                read(source)


def test_a_transform_that_drops_examples_is_an_error():
    class Odd(grain.transforms.Filter):
        def filter(self, element):
            return element["labels"] % 2 == 1

    with pytest.raises(TypeError, match=r"transforms must be .* got Odd"):
        Loader(8, transforms=(Odd(),))(arrays(), seed=0)


def bad_records(label=1, value=0.0, shape=(2,)):
    good = {"inputs": np.zeros(2, np.float32), "labels": 1}
    bad = {"inputs": np.full(shape, value, np.float32), "labels": label}
    return Records([good] * 5 + [bad] + [good] * 4, dict, 10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (bad_records(label=10), r"labels must lie in \[0, 10\), got 10 at example 5"),
        (bad_records(label=-1), r"labels must lie in \[0, 10\), got -1 at example 5"),
        (bad_records(value=np.nan), "finite, got nan or inf at example 5"),
        (bad_records(value=np.inf), "finite, got nan or inf at example 5"),
        (bad_records(shape=(3,)), r"got \(3,\) float32 at example 5"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_examples_are_named(source, message, in_memory):
    with pytest.raises(ValueError, match=message):
        take(Loader(5, in_memory=in_memory)(source, seed=0), 2)


def test_after_a_failed_read_the_state_is_that_of_the_last_good_batch():
    class Storage:
        broken = True

        def __len__(self):
            return N

        def __getitem__(self, index):
            if self.broken and index == 17:
                raise OSError("the disk is gone")
            return arrays()[index]

    storage = Storage()
    iterator = by_grain(Loader(5, shuffle=False))(storage, seed=0)
    take(iterator, 3)
    for _ in range(2):  # also when it is asked again
        with pytest.raises(OSError, match="the disk is gone"):
            next(iterator)
    assert iterator.get_state()["next_example"] == 15
    storage.broken = False
    assert next(iterator)["index"].tolist() == [15, 16, 17, 18, 19]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"next_example": 8}, "keys"),
        ({"next_example": 8, "seed": 1, "num_examples": N}, "whose seed is 0, got 1"),
        (
            {"next_example": 8, "seed": 0, "num_examples": 5},
            "num_examples is 22, got 5",
        ),
        ({"next_example": -1, "seed": 0, "num_examples": N}, "next_example >= 0"),
    ],
)
def test_a_foreign_state_is_an_error_and_changes_nothing(state, message):
    iterator = Loader(8)(arrays(), seed=0)
    next(iterator)
    with pytest.raises(ValueError, match=message):
        iterator.set_state(state)
    assert iterator.get_state()["next_example"] == 8


def test_small_sources_are_loaded_and_large_ones_are_not():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            type(self).reads += 1
            return super().__getitem__(index)

    example = {"inputs": np.zeros(4, np.uint8), "labels": 0}
    iterator = Loader(2)(Counted([example] * 10), seed=0)
    assert Counted.reads >= 10
    Counted.reads = 0
    take(iterator, 10)
    assert Counted.reads == 0
    huge = {"inputs": np.broadcast_to(np.uint8(0), (2**29,)), "labels": 0}
    Loader(2)(Counted([huge] * 3), seed=0)
    assert Counted.reads == 1


def test_batches_are_new_arrays_that_a_device_may_keep():
    source = Arrays(np.zeros((4, 2), np.float32), np.zeros(4, int))
    for shuffle in (True, False):
        batch = next(Loader(4, shuffle=shuffle)(source, seed=0))
        assert not np.shares_memory(batch["inputs"], source.inputs)
        assert not np.shares_memory(batch["labels"], source.labels)
