"""Every prediction once, no label from a neighbour, full rows, the same each time."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilljax.data.text.packing import (
    Plan,
    best_fit_decreasing,
    cut,
    positions,
    shift,
)

lengths = st.lists(st.integers(2, 70), min_size=1, max_size=60).map(np.array)


def one_by_one(lengths, capacity):
    """Best-fit decreasing as the textbook has it."""
    rooms, rows = [], []
    for length in lengths:
        fits = [(room, r) for r, room in enumerate(rooms) if room >= length]
        if not fits:
            rooms.append(capacity)
            fits = [(capacity, len(rooms) - 1)]
        row = min(fits)[1]
        rooms[row] -= length
        rows.append(row)
    return rows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_whole_groups_are_placed_as_single_pieces_would_be(pieces):
    falling = np.sort(pieces)[::-1]
    found = best_fit_decreasing(falling, capacity=20)
    expected = one_by_one(falling.tolist(), 20)

    def contents(rows):
        return sorted(
            sorted(falling[np.array(rows) == row].tolist()) for row in set(rows)
        )

    assert contents(found.tolist()) == contents(expected)


@given(lengths, st.integers(1, 40))
def test_every_prediction_of_every_document_is_in_one_piece(lengths, context):
    pieces = cut(np.arange(len(lengths)), lengths, context)
    assert pieces.places.min() >= 1
    assert pieces.places.max() <= context
    predicted = sorted(
        (document, start + t + 1)
        for document, start, places in zip(
            pieces.document.tolist(),
            pieces.start.tolist(),
            pieces.places.tolist(),
            strict=True,
        )
        for t in range(places)
    )
    assert predicted == [(d, t) for d, n in enumerate(lengths) for t in range(1, n)]


@settings(max_examples=30)
@given(lengths, st.integers(1, 40), st.integers(0, 3))
def test_a_plan_has_every_piece_once_in_every_epoch(lengths, context, epoch):
    pieces = cut(np.arange(len(lengths)), lengths, context)
    plan = Plan(pieces, context=context, seed=1)
    rows = [plan.row(epoch, row) for row in range(plan.num_rows)]
    assert all(pieces.places[row].sum() <= context for row in rows)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(pieces)))


def test_epochs_and_seeds_give_documents_other_neighbours():
    pieces = cut(np.arange(400), np.random.default_rng(0).integers(5, 12, 400), 64)

    def neighbours(plan, epoch):
        rows = (plan.row(epoch, row).tolist() for row in range(plan.num_rows))
        return {frozenset(row) for row in rows}

    plan = Plan(pieces, context=64, seed=0)
    first = neighbours(plan, 0)
    assert len(first & neighbours(plan, 1)) <= 1
    assert len(first & neighbours(Plan(pieces, context=64, seed=1), 0)) <= 1
    assert first == neighbours(Plan(pieces, context=64, seed=0), 0)
    assert first == neighbours(pickle.loads(pickle.dumps(plan)), 0)


def test_rows_are_nearly_full():
    rng = np.random.default_rng(0)
    places = np.minimum(rng.lognormal(4, 1, 5000).astype(np.int64) + 1, 512)
    rows = best_fit_decreasing(np.sort(places)[::-1], 512)
    assert places.sum() / ((rows.max() + 1) * 512) > 0.995


@pytest.mark.slow
def test_ten_million_pieces_are_packed_in_seconds():
    import time

    rng = np.random.default_rng(0)
    places = np.minimum(rng.lognormal(5, 1, 10_000_000).astype(np.int64) + 1, 8192)
    falling = np.sort(places)[::-1]
    start = time.process_time()
    best_fit_decreasing(falling, 8192)
    assert time.process_time() - start < 30


def test_labels_are_shifted_once_and_their_mask_with_them():
    tokens, learnt = np.uint16([3, 1, 4, 1, 5]), np.array([1, 0, 0, 1, 1], np.uint8)
    inputs, labels, mask = shift(tokens, learnt, np.array([0]), np.array([4]))
    assert inputs.tolist() == [3, 1, 4, 1]
    assert labels.tolist() == [1, 4, 1, 5]
    assert mask.tolist() == [False, False, True, True]
    assert (inputs.dtype, labels.dtype, mask.dtype) == (np.int32, np.int32, bool)


def test_a_piece_knows_nothing_of_the_one_before_it():
    tokens = np.arange(100)
    starts, places = np.array([90, 10, 0]), np.array([2, 3, 1])
    inputs, labels, mask = shift(tokens, None, starts, places)
    assert inputs.tolist() == [90, 91, 10, 11, 12, 0]
    assert labels.tolist() == [91, 92, 11, 12, 13, 1]
    assert mask.all()
    assert positions(places).tolist() == [0, 1, 0, 1, 2, 0]
