from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilljax.data import order as order_module
from distilljax.data.order import Order


@pytest.fixture(params=["table", "computed"])
def both_ways(request, monkeypatch):
    """Small sources keep a table of each epoch, large ones compute each index."""
    if request.param == "computed":
        monkeypatch.setattr(order_module, "LARGEST_TABLE", 0)


@pytest.mark.parametrize("num_examples", [1, 2, 37])
def test_every_epoch_visits_every_example_once(both_ways, num_examples):
    order = Order(num_examples, seed=0, shuffle=True)
    for epoch in range(3):
        seen = order.indices(epoch * num_examples, num_examples)
        assert sorted(seen.tolist()) == list(range(num_examples))


def test_epochs_and_seeds_have_orders_of_their_own(both_ways):
    orders = [
        tuple(Order(50, seed=seed, shuffle=True).indices(epoch * 50, 50).tolist())
        for seed in range(3)
        for epoch in range(3)
    ]
    # A seed of (seed + epoch) would replay epoch 1 of seed 0 as epoch 0 of seed 1.
    assert len(set(orders)) == 9


@given(
    num_examples=st.integers(1, 30),
    start=st.integers(0, 200),
    count=st.integers(1, 70),
    shuffle=st.booleans(),
)
def test_a_run_of_positions_is_its_single_positions(
    num_examples, start, count, shuffle
):
    order = Order(num_examples, seed=5, shuffle=shuffle)
    run = order.indices(start, count)
    single = [int(order.indices(start + i, 1)[0]) for i in range(count)]
    assert run.tolist() == single
    assert run.dtype == np.int64


def test_unshuffled_positions_wrap_around():
    order = Order(3, seed=0, shuffle=False)
    assert order.indices(2, 5).tolist() == [2, 0, 1, 2, 0]


def test_a_batch_cannot_damage_the_order():
    order = Order(10, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="read-only"):
        order.indices(0, 4)[0] = 7


def test_a_pickled_order_is_the_same_order_without_its_tables():
    order = Order(1000, seed=2, shuffle=True)
    first = order.indices(0, 1000)
    pickled = pickle.dumps(order)
    assert len(pickled) < 500
    assert np.array_equal(pickle.loads(pickled).indices(0, 1000), first)


def test_the_order_is_the_same_in_every_version():
    """A change here would give every run that is resumed other data."""
    assert Order(8, seed=0, shuffle=True).indices(0, 8).tolist() == [
        3,
        7,
        0,
        2,
        4,
        1,
        6,
        5,
    ]


def test_an_epoch_of_a_tiny_source_costs_microseconds():
    order = Order(36, seed=0, shuffle=True)
    order.indices(0, 36)
    seconds = []
    for epoch in range(1, 200):
        start = time.perf_counter()
        order.indices(epoch * 36, 36)
        seconds.append(time.perf_counter() - start)
    # Grain's shuffle takes 25 ms for this. The smallest: the machine may be busy.
    assert min(seconds) < 1e-3
