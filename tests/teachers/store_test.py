"""Reading a store. What these tests protect:

a store that was written once is read for ever; damage to any byte is noticed, and the
file is named; every unit comes back with its own signal.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilljax.caching import cache
from distilljax.data.units import Units
from distilljax.teachers import CachedTeacher, Dense, Hidden, Sampled, SignalStore, TopK
from distilljax.teachers import _records as rec
from tests.teachers.tiny import text_config

STORES = Path(__file__).parent / "stores"
KINDS = {
    "sampled": Sampled(20),
    "top_k": TopK(8, (1.0, 2.0)),
    "hidden": Hidden(),
    "dense": Dense(),
}
KEPT = [*KINDS, "hidden_int8", "top_k_bfloat16", "top_k_float32", "features"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for name in ("sampled", "hidden"):
        cache(text_config(), folder / name, logits=KINDS[name], shard_rows=8)
    return folder


# --- the format -----------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_a_store_of_version_1_is_read(name):
    """Committed once, and never written again: a later format reads old stores."""
    store = SignalStore(STORES / name)
    known = np.load(STORES / f"{name}.npz")
    units = store.units(np.arange(store.manifest["counts"]["units"]))
    arrays, features = store.decode(units)
    for key, array in (arrays | {k: v[k] for k, v in features.items()}).items():
        want = known[key.replace("/", "_")]
        if key in ("log_probs", "log_tail"):  # divided by a sum of exponentials, which
            # NumPy computes by the instructions that a CPU has
            np.testing.assert_allclose(array, want, rtol=2**-22, atol=2**-20)
        else:
            np.testing.assert_array_equal(array, want)
    if name.startswith("hidden"):
        np.testing.assert_array_equal(store.head["kernel"], known["kernel"])


entries = st.lists(
    st.tuples(
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=40),
    ),
    max_size=6,
)


@given(entries)
def test_a_row_comes_back(found):
    units = [rec.Unit(*entry) for entry in found]
    assert rec.unpack(rec.pack(units)) == units


@given(st.lists(st.lists(st.integers(0, 2**62), max_size=5), max_size=5))
def test_the_keys_of_a_shard_come_back(found):
    rows = [np.array(keys, np.int64) for keys in found]
    counts, keys = rec.unpack_keys(rec.pack_keys(rows))
    assert counts.tolist() == [len(row) for row in rows]
    assert keys.tolist() == [key for row in found for key in row]


@given(entries, st.data())
def test_a_record_of_another_length_is_refused(found, data):
    record = rec.pack([rec.Unit(*entry) for entry in found])
    cut = data.draw(st.integers(0, len(record) - 1))
    with pytest.raises(ValueError, match="a record must"):
        rec.unpack(record[:cut])
    with pytest.raises(ValueError, match="a record must"):
        rec.unpack(record + b"\0")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_positions_of_units_are_those_that_count(places, data):
    size = sum(places) + data.draw(st.integers(0, 4))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    mask[sum(places) :] = False  # padding
    units = Units(np.arange(len(places)), np.array(places))
    parts = rec.parts_of(units, mask)
    np.testing.assert_array_equal(np.concatenate(parts), np.flatnonzero(mask))
    tokens = np.arange(size)
    before = rec.checks_of(units, {"tokens": tokens}, mask)
    tokens[places[0] - 1] += 1
    after = rec.checks_of(units, {"tokens": tokens}, mask)
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        False, *[True] * (len(places) - 1),
    ]  # fmt: skip


# --- damage ---------------------------------------------------------------------------


def damaged(store: Path, folder: Path) -> Path:
    shutil.copytree(store, folder)
    return folder


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["sampled", "hidden"])
def test_a_flipped_bit_anywhere_is_noticed_and_the_file_named(
    tmp_path, stores, name, seed
):
    for path in sorted(stores.joinpath(name).iterdir()):
        if path.name == ".lock":
            continue
        copy = damaged(stores / name, tmp_path / f"{path.name}{seed}")
        content = bytearray((copy / path.name).read_bytes())
        bit = np.random.default_rng(seed).integers(8 * len(content))
        content[bit // 8] ^= 1 << (bit % 8)
        (copy / path.name).write_bytes(content)
        with pytest.raises(ValueError, match=path.name):
            CachedTeacher(str(copy))()
        if path.name.startswith("shard"):
            assert_same_or_refused(copy, stores / name, path.name)


def assert_same_or_refused(copy: Path, store: Path, name: str) -> None:
    """Without checksums ArrayRecord notices what it reads: never another signal."""
    whole = SignalStore(store)
    keys = np.arange(whole.manifest["counts"]["units"])
    found = None
    with contextlib.suppress(ValueError):
        found = SignalStore(copy, verify=False).units(keys)
    if found is None:
        with pytest.raises(ValueError, match=name):
            SignalStore(copy, verify=False).units(keys)
    else:
        assert found == whole.units(keys)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shard-00001.array_record", None, "no such file"),
        ("shard-00001.array_record", 5000, "5000 bytes, not"),
        ("head.bin", None, "no such file"),
        ("manifest.json", 300, "be the manifest of a store"),
        ("manifest.json", 0, "be the manifest of a store"),
        ("manifest.json", None, r"be a folder with a manifest.json"),
    ],
)
def test_a_file_that_is_missing_or_cut_is_named(
    tmp_path, stores, name, change, message
):
    copy = damaged(stores / "hidden", tmp_path / "copy")
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if change is not None:
        (copy / name).write_bytes(content[:change])
    with pytest.raises(ValueError, match=message) as refused:
        CachedTeacher(str(copy), verify=False)()
    assert name in str(refused.value)


def test_a_manifest_that_was_edited_is_refused(tmp_path, stores):
    copy = damaged(stores / "hidden", tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data"]["fingerprint"] = None
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="have the digest that it carries"):
        CachedTeacher(str(copy))()


def test_a_key_that_no_shard_has_is_refused(stores):
    store = SignalStore(stores / "hidden")
    store._index[0][3] = -1
    with pytest.raises(ValueError, match="none for unit 3"):
        store.units(np.array([2, 3]))


# --- reading --------------------------------------------------------------------------


def test_rows_are_read_once_and_kept_up_to_a_limit(stores, monkeypatch):
    store = SignalStore(stores / "hidden")
    keys = np.arange(store.manifest["counts"]["units"])
    first = store.units(keys)
    read = []
    monkeypatch.setattr(store, "_read", lambda *args: read.append(args))
    assert store.units(keys[::-1]) == first[::-1]
    assert not read
    monkeypatch.undo()
    monkeypatch.setattr("distilljax.teachers.store.KEPT_BYTES", 0)
    fresh = SignalStore(stores / "hidden")
    assert fresh.units(keys) == first
    assert not fresh._kept


def test_the_head_lies_where_the_rules_say(stores):
    from distilljax.sharding import Rule, mesh_from_string

    mesh = mesh_from_string("data=4,tensor=2")
    config = text_config()
    opened = CachedTeacher(str(stores / "hidden"))()
    rules = (Rule("kernel", (None, "tensor")),)
    head = opened.of(config.data(), mesh, rules).head
    assert head.hidden is None
    assert head.kernel.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
    np.testing.assert_array_equal(head.kernel, opened.of(config.data()).head.kernel)


def test_a_joined_iterator_goes_back_to_a_state(stores):
    config = text_config()
    source = config.data()
    signals = CachedTeacher(str(stores / "sampled"))().of(source)
    batches = signals.on_host(replace(config.loader, shuffle=False)(source, seed=0))
    before = batches.get_state()
    first = next(batches)
    batches.set_state(before)
    again = next(batches)
    np.testing.assert_array_equal(
        again["teacher"].logits.ids, first["teacher"].logits.ids
    )
