"""A reader in another language. What these tests protect:

docs/store_format.md is enough to read a store: a program for Node that was written from
it, and has nothing of ours, decodes every kind as we do, and names a damaged file.
"""

from __future__ import annotations

import base64
import importlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from distilljax.caching import cache
from distilljax.data.array_record import open_records
from distilljax.data.text import ByteTokenizer, Texts, Tokenized
from distilljax.objectives import LogitKD
from distilljax.teachers import Hidden, Sampled, SignalStore, TopK
from distilljax.teachers.store import digest_of, read_manifest, sha256_of
from tests.teachers.tiny import image_config, rows, text_config

STORES = Path(__file__).parent / "stores"
READER = Path(__file__).with_name("reader.mjs")
KNOWN = [path.stem for path in sorted(STORES.glob("*.npz"))]
# What has to be written as an escape in the text that the digest is of.
ODD = 'Ærø\t"\\ \x7f \U0001f703'
Run = Callable[[Path], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed")
    said = subprocess.run([found, "--version"], capture_output=True, text=True)
    version = re.match(r"v(\d+)\.(\d+)", said.stdout)
    if version is None or int(version[1]) < 18:
        pytest.skip(f"node is {said.stdout.strip()!r}: the reader needs 18 or later")
    return found


@pytest.fixture
def run(node) -> Run:
    def run_reader(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [node, str(READER), str(folder)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run_reader


@pytest.fixture
def read(run) -> Callable[[Path], Any]:
    """What the reader says of a store."""

    def read_store(folder: Path) -> Any:
        found = run(folder)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    return read_store


def uncompressed(store: Path, folder: Path) -> Path:
    """A copy of a store whose shards have the same records, not compressed."""
    writers: Any = importlib.import_module("array_record.python.array_record_module")
    shutil.copytree(store, folder)
    manifest = read_manifest(store)
    for shard in manifest["shards"]:
        records = open_records(store / shard["file"])
        path = folder / shard["file"]
        writer = writers.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records.__getitems__(range(len(records))):
            writer.write(record)
        writer.close()
        shard |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return with_manifest(folder, manifest)


def with_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    """A store with another manifest, whose digest is right."""
    manifest["digest"] = digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


# --- the same signal ------------------------------------------------------------------


def array(said: dict[str, Any]) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(said["data"]), np.dtype(said["dtype"]))
    return data.reshape(said["shape"])


def signals_of(said: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """The arrays of all units together, as our reader has them."""
    found = {}
    described = manifest["signal"]["features"]
    for part in ("arrays", "features"):
        for name in said["units"][0][part]:
            pieces = [array(unit[part][name]) for unit in said["units"]]
            if part == "features" and not described[name]["per_position"]:
                pieces = [piece[None] for piece in pieces]
            found[name] = np.concatenate(pieces)
    if "counts" in found:
        with np.errstate(divide="ignore"):
            num_samples = manifest["signal"]["logits"]["options"]["num_samples"]
            weights = np.log(found.pop("counts") / num_samples)
        found["log_weights"] = weights.astype(np.float32)
    return found


def assert_same_signal(said: dict[str, Any], want: Any, manifest: Any) -> None:
    """Exact, but for what was divided by a sum that each language rounds in its way."""
    got = signals_of(said, manifest)
    assert sorted(got) == sorted(want)
    options = (manifest["signal"]["logits"] or {"options": {}})["options"]
    rounded = options.get("values", "float32") != "float32"
    divided = rounded and 1.0 in options["temperatures"]
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        if divided and name in ("log_probs", "log_tail"):
            # Ours is in float32: an exponential is within 2.5 units in the last place,
            # nine are added, and the logarithm of what is nearly 1 is as far off as
            # that: 2^-20. Then what is divided is rounded, here and there.
            np.testing.assert_allclose(got[name], x, rtol=2**-23, atol=2**-20)
        else:
            np.testing.assert_array_equal(got[name], x, err_msg=name)


def assert_read_as_by_us(said: dict[str, Any], folder: Path) -> None:
    store = SignalStore(folder)
    units = store.units(np.arange(store.manifest["counts"]["units"]))
    assert [(u["key"], u["check"], u["positions"]) for u in said["units"]] == [
        (unit.key, unit.check, unit.positions) for unit in units
    ]
    arrays, features = store.decode(units)
    want = arrays | {name: found[name] for name, found in features.items()}
    assert_same_signal(said, want, store.manifest)
    if store.head is None:
        assert said["head"] is None
        return
    head = {name: array(x) for name, x in said["head"].items()} | said["numbers"]
    assert sorted(head) == sorted(store.head)
    for name, x in store.head.items():
        np.testing.assert_array_equal(head[name], x, err_msg=name)


def test_files_that_are_not_compressed_are_read_too(read, tmp_path):
    """ArrayRecord's option, which ours do not use."""
    folder = uncompressed(STORES / "top_k", tmp_path / "copy")
    assert_read_as_by_us(read(folder), folder)


@pytest.mark.parametrize("name", KNOWN)
def test_a_store_of_version_1_is_read_from_the_page_alone(read, name):
    said = read(STORES / name)
    known = dict(np.load(STORES / f"{name}.npz"))
    kernel = known.pop("kernel", None)
    if kernel is not None:
        np.testing.assert_array_equal(array(said["head"]["kernel"]), kernel)
    known = {name.replace("layers_", "layers/"): x for name, x in known.items()}
    assert_same_signal(said, known, read_manifest(STORES / name))
    assert_read_as_by_us(said, STORES / name)


def peaked(model: Any, batch: Any) -> Any:
    """Logits far below each other, and of one class that cannot be."""
    return 40 * model(batch["inputs"]).at[:, 3].set(-jnp.inf)


ODD_TEXTS = Tokenized(Texts((f"{ODD} by the sea.", "Emma. " * 20)), ByteTokenizer())
WRITTEN = {
    "int8, features of positions": (
        text_config(), Hidden("int8"), {"features": ["layers/1"], "shard_rows": 8}
    ),
    "bfloat16 states": (text_config(compute_dtype="bfloat16"), Hidden(), {}),
    "bfloat16 values": (text_config(), TopK(8, (1.0, 2.0), "bfloat16"), {}),
    "float32 values": (text_config(), TopK(8, (2.0, 1.0), "float32"), {}),
    "not divided": (
        text_config(objective=LogitKD(2.0)), TopK(5, (0.5, 2.0)), {}
    ),
    "far below": (image_config(teacher_forward=peaked), TopK(10, (2.0,)), {}),
    "many draws": (text_config(data=rows(ODD_TEXTS)), Sampled(300), {}),
    "features of examples": (image_config(), None, {"features": ["layers/0"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_is_read_from_the_page_alone(read, tmp_path, name):
    config, kind, how = WRITTEN[name]
    cache(config, tmp_path / "store", logits=kind, **how)
    assert_read_as_by_us(read(tmp_path / "store"), tmp_path / "store")


# --- what is wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["manifest.json", "head.bin", "shard-00000.array_record"]
)
def test_a_flipped_byte_is_refused_and_the_file_named(run, tmp_path, file):
    copy = shutil.copytree(STORES / "hidden", tmp_path / "copy")
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 3] ^= 1
    (copy / file).write_bytes(content)
    found = run(copy)
    assert found.returncode != 0
    assert found.stderr.startswith(f"{file}: ")
    assert not found.stdout


def test_the_digest_is_of_whatever_a_manifest_says(run, read, tmp_path):
    copy = shutil.copytree(STORES / "dense", tmp_path / "copy")
    manifest = read_manifest(copy)
    manifest[ODD] = [
        1e-6,
        1e22,
        1.0,
        1,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        ODD,
        {},
        [],
    ]
    with_manifest(copy, manifest)
    said = read(copy)
    assert_read_as_by_us(said, STORES / "dense")
    (copy / "manifest.json").write_text(json.dumps(manifest | {"date": ODD}))
    assert "manifest.json: must have the digest" in run(copy).stderr
