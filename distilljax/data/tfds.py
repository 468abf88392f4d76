"""Sources from TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int

from distilljax._checks import fail
from distilljax.data.sources import Example, Records, Source, read_examples


@dataclass(frozen=True)
class Tfds:
    """A data set of TFDS in its array_record form, through `tfds.data_source`'s reader.

    ``digits`` (1,797 handwritten digits of 8x8 pixels, values 0 to 16; splits train
    1,200, validation 197, test 400) is ours: it is prepared on first use, offline. Any
    other data set must have been prepared before, or needs ``download=True``.

    Attributes:
      name: Name, with config and version where wanted: "mnist", "cifar10:3.0.2".
      split: A split or a slice of one, in TFDS's language: "train[:90%]".
      data_dir: Folder of all data sets; None is TFDS_DATA_DIR, or what TFDS chooses.
      inputs: Feature that becomes ``inputs``.
      labels: Feature that becomes ``labels``.
      download: Download and prepare the data set if it is not there. To encode images,
        this one step of TFDS needs TensorFlow.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     source = Tfds("digits", "train[:50%]", data_dir=folder)()
      ...     len(source), source.num_classes, source[0]["inputs"].shape
      (600, 10, (8, 8, 1))

    Reference: TensorFlow Datasets, "TFDS for Jax and PyTorch" (its guide to random
    access without TensorFlow).
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    inputs: str = "image"
    labels: str = "label"
    download: bool = False

    def __call__(self) -> Source:
        """Open the data set; examples are read when they are asked for."""
        builder, records = self.records("Tfds", (self.inputs, self.labels))
        label = builder.info.features[self.labels]
        num_classes = getattr(label, "num_classes", None)
        names = getattr(label, "names", None) or ()
        return Records(
            records,
            partial(_example, inputs=self.inputs, labels=self.labels),
            num_classes,
            tuple(names),
            partial(self._read_labels, builder),
        )

    def records(self, function: str, fields: tuple[str, ...]) -> tuple[Any, Any]:
        """The builder, and random access to records that have ``fields``.

        Args:
          function: Who asks, for messages.
          fields: Features that every record must have.
        """
        builder = self._prepared()
        features = builder.info.features
        for name in fields:
            if name not in features:
                fail(
                    function,
                    "inputs, labels and field",
                    f"be features of {self.name}, {sorted(features)}",
                    repr(name),
                    'For text classification, for example, inputs="text".',
                )
        records = builder.as_data_source(self._checked_split(builder))
        return builder, OneByOne(records) if _is_mocked(builder) else records

    def _prepared(self) -> Any:
        """A builder whose data is there; of many processes, one prepares it."""
        tfds = _tfds()
        builder = self._builder()
        if builder.info.splits or _is_mocked(builder):
            return builder
        offline = getattr(builder, "PREPARES_OFFLINE", False)
        if not (offline or self.download):
            fail(
                "Tfds",
                "name",
                "be prepared in array_record under data_dir",
                f"{self.name} in {builder.data_path}",
                "Set download=True, run `tfds build NAME --file_format=array_record`, "
                "or, for MNIST, use Idx and scripts/fetch_assets.sh.",
            )
        quiet = contextlib.ExitStack()
        if offline:  # two seconds of work do not need three progress bars
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        with _lock(str(builder.data_path.parent)), quiet:
            builder = self._builder()  # another process may have prepared it meanwhile
            if not builder.info.splits:
                config = tfds.download.DownloadConfig(try_download_gcs=False)
                builder.download_and_prepare(download_config=config)
        return self._builder()

    def _builder(self) -> Any:
        tfds = _tfds()
        # Importing the module of a builder is what makes its name known.
        importlib.import_module("distilljax.data.digits.digits_dataset_builder")
        try:
            return tfds.builder(
                self.name, data_dir=self.data_dir, file_format="array_record"
            )
        except tfds.core.DatasetNotFoundError as error:
            return fail(
                "Tfds",
                "name",
                "be a data set that TFDS knows",
                repr(self.name),
                f"{str(error).splitlines()[0]} Import the module of your own builder "
                "before the source is opened.",
            )

    def _checked_split(self, builder: Any) -> str:
        splits = builder.info.splits
        name = self.split.split("[")[0].split("+")[0]
        if splits and name not in splits:
            fail(
                "Tfds",
                "split",
                f"be a split of {self.name}, {sorted(splits)}, or a slice of one",
                repr(self.split),
                "Slices are written train[:5000] or train[90%:].",
            )
        if splits and splits[self.split].num_examples == 0:
            fail(
                "Tfds",
                "split",
                "have at least one example",
                repr(self.split),
                f"All of {name} are {splits[name].num_examples}.",
            )
        return self.split

    def _read_labels(self, builder: Any) -> Int[np.ndarray, " examples"]:
        """All labels; the inputs, most of the work, stay encoded."""
        skip = {self.inputs: _tfds().decode.SkipDecoding()}
        records = builder.as_data_source(self.split, decoders=skip)
        examples = read_examples(records, range(len(records)))
        return np.array([int(example[self.labels]) for example in examples], np.int32)


def _tfds() -> Any:
    """TFDS, imported when a source is opened and not when a config is read."""
    return importlib.import_module("tensorflow_datasets")


def _is_mocked(builder: Any) -> bool:
    """`tfds.testing.mock_data` replaces preparing by nothing, and reading by noise."""
    return not builder.download_and_prepare.__module__.startswith(
        "tensorflow_datasets.core"
    )


@dataclass(frozen=True)
class OneByOne:
    """Hides `__getitems__`, which `tfds.testing.mock_data` replaces by a broken one."""

    records: Any

    def __len__(self) -> int:
        """How many records there are."""
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        """Record ``index``."""
        return self.records[index]


def _example(record: Any, *, inputs: str, labels: str) -> Example:
    return {"inputs": record[inputs], "labels": record[labels]}


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[None]:
    """One process at a time prepares; the system frees the lock of one that dies.

    Remote folders have no locks. Prepare such a data set once, before a job of many
    processes.
    """
    if "://" in folder:
        yield
        return
    import fcntl
    from pathlib import Path

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = (Path(folder) / ".prepare.lock").open("w")
    except OSError as error:
        fail(
            "Tfds",
            "data_dir",
            "be a folder that can be written, to prepare the data",
            f"{folder} ({error.strerror})",
            "Choose another data_dir, or set TFDS_DATA_DIR.",
        )
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
