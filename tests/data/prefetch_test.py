from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import traceback
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distilljax.data import Arrays, Loader, eval_batches, prefetch_to_device
from distilljax.data.prefetch import as_read, this_process

SOURCE = Arrays(np.arange(40, dtype=np.uint8).reshape(20, 2), np.arange(20) % 10, 10)
LOADER = Loader(8, scale=2.0)


def sharding(devices=8):
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    return NamedSharding(mesh, PartitionSpec("data"))


def batches(loader=LOADER, seed=0):
    return loader(SOURCE, seed=seed)


@pytest.mark.parametrize("devices", [1, 8])
def test_batches_arrive_whole_in_order_and_on_their_devices(devices):
    expected = batches()
    for _, (batch, index) in zip(
        range(6), prefetch_to_device(batches(), sharding(devices)), strict=False
    ):
        local = next(expected)
        assert np.array_equal(index, local.pop("index"))
        assert isinstance(index, np.ndarray)
        assert batch.keys() == local.keys()
        for name, array in batch.items():
            assert isinstance(array, jax.Array)
            assert array.sharding == sharding(devices)
            assert array.dtype == local[name].dtype
            assert np.array_equal(array, local[name])


def test_no_transfer_is_implicit():
    with jax.transfer_guard("disallow"):
        batch, _ = next(prefetch_to_device(batches(), sharding()))
        jax.block_until_ready(batch)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_state_is_that_of_the_batch_last_yielded(depth):
    plain, ahead = batches(), prefetch_to_device(batches(), sharding(), depth)
    assert ahead.get_state() == plain.get_state()
    for _ in range(4):
        next(plain)
        next(ahead)
        assert ahead.get_state() == plain.get_state()


@pytest.mark.parametrize("depth", [1, 3])
def test_it_resumes_where_the_state_was_taken(depth):
    first = prefetch_to_device(batches(), sharding(), depth)
    for _ in range(3):
        next(first)
    state = first.get_state()
    expected = [next(first)[1] for _ in range(4)]
    second = prefetch_to_device(batches(), sharding(), depth)
    next(second)  # what is on its way is dropped
    second.set_state(state)
    assert second.get_state() == state
    for index in expected:
        assert np.array_equal(next(second)[1], index)


def test_exactly_depth_batches_are_read_ahead():
    read = []

    def counted():
        for k in range(10):
            read.append(k)
            yield {"inputs": np.zeros((8, 2), np.float32), "index": np.arange(8)}

    ahead = prefetch_to_device(counted(), sharding(), depth=3)
    assert read == []
    for k in range(1, 4):
        next(ahead)
        assert len(read) == k + 2


def test_a_pass_of_evaluation_ends():
    ahead = prefetch_to_device(eval_batches(SOURCE, 8), sharding())
    seen = [(batch, index) for batch, index in ahead]
    assert len(seen) == 3
    assert int(sum(batch["loss_mask"].sum() for batch, _ in seen)) == 20
    with pytest.raises(StopIteration):
        next(ahead)
    with pytest.raises(TypeError, match="get_state of their own"):
        ahead.get_state()


def test_an_error_in_the_data_keeps_its_traceback_and_the_last_good_state():
    def reading_a_record():
        raise OSError("the disk is gone")

    class Failing:
        def __init__(self):
            self.inner = batches()

        def __iter__(self):
            return self

        def __next__(self):
            if self.inner.get_state()["next_example"] == 24:
                reading_a_record()
            return next(self.inner)

        def get_state(self):
            return self.inner.get_state()

        def set_state(self, state):
            self.inner.set_state(state)

    ahead = prefetch_to_device(Failing(), sharding(), depth=1)
    for _ in range(3):
        next(ahead)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(ahead)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "reading_a_record"
    assert ahead.get_state()["next_example"] == 24


def test_a_batch_that_does_not_split_over_the_devices_is_an_error():
    ahead = prefetch_to_device(batches(Loader(12)), sharding())
    with pytest.raises(ValueError, match=r"split the 12 rows of a batch evenly"):
        next(ahead)


def test_depth_zero_is_an_error():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        prefetch_to_device(batches(), sharding(), depth=0)


def test_the_host_may_reuse_nothing_that_the_device_holds():
    """jax borrows the memory of arrays on the CPU: later batches must not write it."""
    ahead = prefetch_to_device(batches(), sharding(1), depth=2)
    held = [next(ahead) for _ in range(5)]
    again = prefetch_to_device(batches(), sharding(1), depth=2)
    for batch, index in held:
        fresh, fresh_index = next(again)
        assert np.array_equal(index, fresh_index)
        assert np.array_equal(batch["inputs"], fresh["inputs"])


TWO_PROCESSES = """
    import sys
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    address, process = sys.argv[1], int(sys.argv[2])
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    from distilljax.data import Arrays, Loader, prefetch_to_device

    inputs = np.arange(40, dtype=np.uint8).reshape(20, 2)
    source = Arrays(inputs, np.arange(20) % 10, 10)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    local = Loader(8)(source, seed=0, process_index=process, process_count=2)
    whole = Loader(8)(source, seed=0)
    ahead = prefetch_to_device(local, sharding)
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            batch, index = next(ahead)
            expected = next(whole)
            assert batch["inputs"].shape == (8, 2)
            assert np.array_equal(index, expected["index"][4 * process :][:4])
            for name in ("inputs", "labels"):
                shards = batch[name].addressable_shards
                assert len(shards) == 2
                for shard in shards:
                    rows = expected[name][shard.index]
                    assert np.array_equal(np.asarray(shard.data), rows)
    assert ahead.get_state() == whole.get_state()
    print("the same")
"""


class _Device(NamedTuple):
    process_index: int
    number: int


class _Held(jax.sharding.Sharding):
    """Of one axis: the first row of two that each device of each process holds."""

    def __init__(self, *starts):
        self.starts = starts

    @property
    def num_devices(self):
        return sum(map(len, self.starts))

    def devices_indices_map(self, global_shape):
        return {
            _Device(process, number): (slice(start, start + 2),)
            for process, starts in enumerate(self.starts)
            for number, start in enumerate(starts)
        }


@pytest.mark.parametrize(
    ("held", "own", "count", "order"),
    [
        (_Held((0, 2), (4, 6)), 0, 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        (_Held((0, 4), (2, 6)), 0, 2, [0, 1, 4, 5, 2, 3, 6, 7]),  # fsdp outside
        (_Held((2, 6), (0, 4)), 1, 2, [0, 1, 4, 5, 2, 3, 6, 7]),
        (_Held((0, 0), (2, 2), (0, 0), (2, 2)), 0, 2, [0, 1, 2, 3]),
        (_Held((0, 2), (0, 2)), 0, 1, [0, 1, 2, 3]),  # tensor across processes
    ],
)
def test_processes_read_the_rows_that_their_devices_hold(held, own, count, order):
    """Those that hold the same read the same, and rows come back as they were read."""
    found = this_process(held)
    assert found == {"process_index": own, "process_count": count}
    np.testing.assert_array_equal(as_read(held, (len(order),)), order)


@pytest.mark.slow
def test_two_processes_hold_one_global_batch_with_its_rows_in_order():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), address, str(i)],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("the same" in output for output in outputs)


def test_a_batch_is_checked_before_it_is_sent():
    """So what is wrong with it is said, and the state is that of the last good one."""

    def refuse(batch):
        if batch["index"][0] >= 4:
            raise ValueError("bad batch")

    source = Arrays(np.zeros((8, 1), np.uint8), np.zeros(8, int))
    loader = Loader(batch_size=2, shuffle=False)(source, seed=0)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ahead = prefetch_to_device(loader, one, depth=1, check=refuse)
    assert [next(ahead)[1].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="bad batch"):
        next(ahead)
    assert ahead.get_state()["next_example"] == 4
