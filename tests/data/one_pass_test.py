from __future__ import annotations

from dataclasses import replace

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilljax.data import Arrays, Loader, RandomShift, eval_batches
from distilljax.data.sources import Records


def arrays(num_examples):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, 3, 3, 1)).astype(np.uint8)
    return Arrays(images, np.arange(num_examples) % 10, 10)


@given(
    num_examples=st.integers(1, 30),
    rows=st.integers(1, 6),
    processes=st.sampled_from([1, 2, 4]),
    lazy=st.booleans(),
)
def test_all_processes_see_every_example_once(num_examples, rows, processes, lazy):
    source = arrays(num_examples)
    batch_size = rows * processes
    passes = [
        list(
            eval_batches(
                Records(source, dict, 10) if lazy else source,
                batch_size,
                process_index=i,
                process_count=processes,
                scale=255.0,
            )
        )
        for i in range(processes)
    ]
    assert {len(p) for p in passes} == {-(-num_examples // batch_size)}
    whole = {
        name: np.concatenate(
            [b[name] for step in zip(*passes, strict=True) for b in step]
        )
        for name in passes[0][0]
    }
    mask = whole["loss_mask"]
    assert mask.dtype == bool
    assert mask.sum() == num_examples
    assert np.array_equal(whole["index"][mask], np.arange(num_examples))
    expected = source.inputs.astype(np.float32) / np.float32(255)
    assert np.array_equal(whole["inputs"][mask], expected)
    assert np.array_equal(whole["labels"][mask], source.labels)
    for name, padding in (("inputs", 0), ("labels", 0), ("index", -1)):
        assert np.all(whole[name][~mask] == padding)
    for batch in [b for p in passes for b in p]:
        assert batch["inputs"].shape == (rows, 3, 3, 1)
        assert batch["inputs"].dtype == np.float32
        assert batch["labels"].dtype == np.int32


def test_a_loader_evaluates_as_it_trains_but_without_augmentation():
    loader = Loader(4, scale=16.0, flatten=True, augment=RandomShift(1))
    batches = list(loader.eval_batches(arrays(6)))
    assert [b["inputs"].shape for b in batches] == [(4, 9), (4, 9)]
    expected = arrays(6).inputs.reshape(6, 9) / np.float32(16)
    assert np.array_equal(np.concatenate([b["inputs"] for b in batches])[:6], expected)
    (batch,) = loader.eval_batches(arrays(6), batch_size=8)
    assert batch["loss_mask"].tolist() == [True] * 6 + [False] * 2


class Middle(grain.transforms.Map):
    def map(self, element):
        middle = np.ascontiguousarray(element["inputs"][1:2])
        return {"inputs": middle, "labels": element["of"]}


class Anywhere(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return {**element, "inputs": element["inputs"][rng.integers(1, 3) :]}


class Position(grain.transforms.MapWithIndex):
    def map_with_index(self, index, element):
        return {**element, "position": np.int32(index)}


def test_a_loader_evaluates_what_its_transforms_make():
    """Of images of several sizes, whose labels lie under another key."""
    source = [{"inputs": np.full((3 + i % 2, 2), float(i)), "of": i} for i in range(5)]
    loader = Loader(4, scale=2.0, transforms=(Middle(), Position()))
    batches = list(loader.eval_batches(source))
    assert [b["inputs"].shape for b in batches] == [(4, 1, 2), (4, 1, 2)]
    for name, expected in (("inputs", 0.5), ("labels", 1), ("position", 1)):
        found = np.concatenate([b[name].reshape(4, -1)[:, 0] for b in batches])[:5]
        assert found.tolist() == [i * expected for i in range(5)]


def test_a_random_transform_needs_another_for_evaluation():
    source = [{"inputs": np.arange(4.0), "of": i, "labels": i} for i in range(5)]
    loader = Loader(4, transforms=(Anywhere(),))
    with pytest.raises(ValueError, match=r"eval_transforms must be given, .*Anywhere"):
        loader.eval_batches(source)
    for transforms, expected in (((Middle(),), 1), ((), 4)):
        fixed = replace(loader, eval_transforms=transforms)
        assert next(fixed.eval_batches(source))["inputs"].shape == (4, expected)


def test_it_can_be_repeated():
    first, second = (list(eval_batches(arrays(5), 2)) for _ in range(2))
    assert all(
        np.array_equal(a["inputs"], b["inputs"])
        for a, b in zip(first, second, strict=True)
    )


def test_mistakes_are_errors_before_the_first_batch():
    with pytest.raises(ValueError, match=r"positive multiple.*2, got 3"):
        eval_batches(arrays(5), 3, process_count=2)
    with pytest.raises(ValueError, match="at least one example"):
        eval_batches(arrays(0), 3)
    with pytest.raises(ValueError, match="process_index must lie in"):
        eval_batches(arrays(5), 4, process_index=2, process_count=2)


def test_a_bad_label_is_named():
    source = Records(Arrays(np.zeros((5, 1)), np.array([0, 1, 2, 7, 0])), dict, 5)
    with pytest.raises(ValueError, match=r"in \[0, 5\), got 7 at example 3"):
        list(eval_batches(source, 2))
