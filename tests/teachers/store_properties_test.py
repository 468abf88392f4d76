"""Stores of whatever texts, rows and kinds. What these tests protect:

whoever writes a store and whoever reads it, in whatever order, packing and epoch, from
wherever a run goes on, each position gets what the teacher said of it; a byte that is
another one is noticed, in every file of every kind.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distilljax import objectives
from distilljax.caching import cache
from distilljax.data import Loader
from distilljax.data.text import ByteTokenizer, Mixture, Texts, Tokenized
from distilljax.data.units import num_units
from distilljax.teachers import (
    CachedTeacher,
    Dense,
    Hidden,
    Sampled,
    SignalStore,
    TopK,
)
from tests.teachers.tiny import Telling, digits, image_config, rows, tell, text_config

# Threads that still read for the example before use `random` while this one is drawn.
pytestmark = pytest.mark.filterwarnings(
    "ignore::hypothesis.errors.HypothesisDeprecationWarning"
)

KINDS = {
    "sampled": Sampled(20),
    "top_k": TopK(8, (1.0, 2.0)),
    "bfloat16": TopK(8, (1.0,), "bfloat16"),
    "hidden": Hidden(),
    "int8": Hidden("int8"),
    "dense": Dense(),
}


# --- each position with its own signal ------------------------------------------------

texts = st.lists(st.text("abc é", max_size=70), min_size=1, max_size=9)


@st.composite
def packings(draw: Any) -> Any:
    """One packed source, or a mixture of two; not all of their texts are empty."""

    def packed(found: list[str], context: int, repack: bool) -> Any:
        found = [*found, "by the sea"]
        tokenized = Tokenized(Texts(tuple(found)), ByteTokenizer())
        return rows(tokenized, context=context, repack=repack)

    context, repack = draw(st.sampled_from([12, 32])), draw(st.booleans())
    one = packed(draw(texts), context, repack)
    if not draw(st.booleans()):
        return one
    other = packed(draw(texts), context, repack)
    return Mixture({"one": one, "other": other}, {"one": 2, "other": 1})


def read_on(batches: Any, count: int, at: int, anew: Any) -> list[Any]:
    """Some batches, of which all after `at` come from another iterator, gone on."""
    found = [next(batches) for _ in range(at)]
    later = anew()
    later.set_state(batches.get_state())
    return found + [next(later) for _ in range(count - at)]


def assert_each_has_its_own(batch: Any) -> None:
    """Of a teacher that says the token and its position."""
    mask, logits = batch["loss_mask"] != 0, batch["teacher"].logits
    np.testing.assert_array_equal(logits[mask][:, 0], batch["tokens"][mask])
    np.testing.assert_array_equal(logits[mask][:, 1], batch["positions"][mask])
    assert not logits[~mask].any()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    packings(),
    st.sampled_from([8, 24]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**31 - 1),
    st.data(),
)
def test_whatever_the_texts_the_shards_and_the_readers(
    data, eval_batch_size, shard_batches, shuffle, seed, drawn
):
    """Over two epochs and more, each reader going on from somewhere in between."""
    config = text_config(
        teacher=Telling(), teacher_forward=tell, data=data,
        eval_batch_size=eval_batch_size,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        shard_rows = shard_batches * eval_batch_size
        manifest = cache(config, folder, logits=Dense(), shard_rows=shard_rows)
        source = config.data()
        assert manifest["counts"]["units"] == num_units(source)
        signals = CachedTeacher(folder)().of(source)
        sizes = [size for size in (1, 2, 4, 8) if size <= len(source)]
        batch_size = drawn.draw(st.sampled_from(sizes))
        readers = drawn.draw(st.sampled_from([n for n in sizes if n <= batch_size]))
        loader = Loader(batch_size=batch_size, shuffle=shuffle)
        count = min(2 + -(-2 * len(source) // batch_size), 12)
        at = drawn.draw(st.integers(0, count))
        for process in range(readers):
            shard = {"process_index": process, "process_count": readers}

            def anew(shard: dict[str, int] = shard) -> Any:
                return signals.on_host(loader(source, seed=seed, **shard))

            whole = list(itertools.islice(anew(), count))
            for batch, same in zip(
                whole, read_on(anew(), count, at, anew), strict=True
            ):
                np.testing.assert_array_equal(batch["tokens"], same["tokens"])
                np.testing.assert_array_equal(
                    batch["teacher"].logits, same["teacher"].logits
                )
                assert_each_has_its_own(batch)


def pixels(model: Any, batch: Any) -> Any:
    del model
    return batch["inputs"]


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 60), st.integers(1, 3), st.booleans(), st.integers(0, 2**31 - 1))
def test_every_image_has_its_own_once_in_an_epoch(count, shards, shuffle, seed):
    """Its logits are its pixels."""
    config = image_config(data=digits(count), teacher_forward=pixels, eval_batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        cache(config, folder, logits=Dense(), shard_rows=8 * shards)
        source = config.data()
        loader = replace(config.loader, batch_size=1, shuffle=shuffle)
        batches = CachedTeacher(folder)().of(source).on_host(loader(source, seed=seed))
        epochs: list[list[int]] = [[], []]
        for epoch, _ in itertools.product(epochs, range(count)):
            batch = next(batches)
            (index,) = batch["index"].tolist()
            epoch.append(index)
            np.testing.assert_array_equal(batch["teacher"].logits, batch["inputs"])
            np.testing.assert_array_equal(
                batch["inputs"][0] * 16, source[index]["inputs"].reshape(-1)
            )
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


# --- a byte that is another one -------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for name, kind in KINDS.items():
        cache(text_config(), folder / name, logits=kind, shard_rows=8)
    features = text_config(objective=objectives.FeatureKD({"layers/0": "layers/1"}))
    cache(features, folder / "features", logits=None, features=["layers/1"])
    return folder


def units_in(store: SignalStore) -> Any:
    return store.units(np.arange(store.manifest["counts"]["units"]))


@pytest.mark.parametrize("name", [*KINDS, "features"])
@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.data())
def test_a_byte_that_is_another_one_is_noticed(stores, name, data):
    """With checksums, in whichever file; of a shard also when it is only read."""
    store = stores / name
    paths = sorted(path for path in store.iterdir() if path.name != ".lock")
    path = data.draw(st.sampled_from(paths))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    other = bytearray(whole)
    other[at] ^= data.draw(st.integers(1, 255))
    want = units_in(SignalStore(store))
    try:
        path.write_bytes(other)
        with pytest.raises(ValueError, match=path.name):
            CachedTeacher(str(store))()
        if path.suffix == ".array_record":
            found = None
            with contextlib.suppress(ValueError):
                found = units_in(SignalStore(store, verify=False))
            if found is None:
                with pytest.raises(ValueError, match=path.name):
                    units_in(SignalStore(store, verify=False))
            else:  # padding between blocks, which nobody reads
                assert found == want
    finally:
        path.write_bytes(whole)
