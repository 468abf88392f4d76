"""Grain's packers: the same batches and masks, and a state that is not elastic."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distilljax.data import Loader
from distilljax.data.text import StreamLoader
from tests.data.text.packed_test import assert_same
from tests.data.text.tiny import documents, packed

METHODS = pytest.mark.parametrize("method", ["first_fit", "concatenate"])


@pytest.fixture
def rows(model):
    return packed(model, documents(60))()


def take(batches, count):
    return [next(batches) for _ in range(count)]


@METHODS
def test_batches_are_those_of_the_loader_without_an_index(rows, method):
    (streamed,) = take(StreamLoader(4, method)(rows, seed=0), 1)
    (planned,) = take(Loader(4)(rows, seed=0), 1)
    assert {*streamed, "index"} == set(planned)
    for name, array in streamed.items():
        assert array.shape == planned[name].shape == (4, 64)
        assert array.dtype == planned[name].dtype


@METHODS
def test_no_label_comes_from_a_neighbour(rows, method):
    """A label is the next input, or the last token of its piece."""
    lasts = set()
    pieces, store = rows.plan.pieces, rows.store
    for document, start, places in zip(
        pieces.document.tolist(),
        pieces.start.tolist(),
        pieces.places.tolist(),
        strict=True,
    ):
        lasts.add(tuple(store.tokens(document, start, start + places + 1)[-2:]))
    for batch in take(StreamLoader(4, method)(rows, seed=0), 10):
        for row in range(4):
            ids = batch["segment_ids"][row]
            assert not batch["loss_mask"][row][ids == 0].any()
            for segment in range(1, ids.max() + 1):
                here = ids == segment
                tokens, labels = (batch[k][row][here] for k in ("tokens", "labels"))
                assert batch["positions"][row][here].tolist() == list(range(here.sum()))
                assert tokens[1:].tolist() == labels[:-1].tolist()
                whole = method == "first_fit" or here[-1] == 0
                assert not whole or (tokens[-1], labels[-1]) in lasts


def test_concatenating_leaves_no_place_empty(rows):
    for batch in take(StreamLoader(4, "concatenate")(rows, seed=0), 10):
        assert (batch["segment_ids"] > 0).all()


@METHODS
def test_a_stream_resumes_as_the_same_process(rows, method):
    loader = StreamLoader(4, method)
    whole = take(loader(rows, seed=1, process_index=1, process_count=2), 12)
    first = loader(rows, seed=1, process_index=1, process_count=2)
    take(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    rest = loader(rows, seed=1, process_index=1, process_count=2)
    rest.set_state(state)
    assert_same(take(rest, 5), whole[7:])


def test_a_stream_is_not_elastic_and_says_so(rows):
    state = StreamLoader(4)(rows, seed=1).get_state()
    for process_index in (0, 1):
        other = StreamLoader(4)(
            rows, seed=1, process_index=process_index, process_count=2
        )
        with pytest.raises(ValueError, match=r"is not elastic: resume with as many"):
            other.set_state(state)


def test_the_order_is_that_of_the_seed(rows):
    assert_same(*(take(StreamLoader(4)(rows, seed=0), 3) for _ in range(2)))
    first, other = (take(StreamLoader(4)(rows, seed=s), 1)[0] for s in (0, 1))
    assert not np.array_equal(first["tokens"], other["tokens"])


def test_arguments_are_checked(model, rows):
    with pytest.raises(ValueError, match="batch_size must be a positive multiple"):
        StreamLoader(3)(rows, seed=0, process_count=2)
    with pytest.raises(ValueError, match="num_bins must be"):
        StreamLoader(4, num_bins=0)
