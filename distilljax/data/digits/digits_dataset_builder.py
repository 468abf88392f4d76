"""The digits as a TFDS data set: downloads nothing, and never needs TensorFlow.

TFDS names a data set after the folder of its builder, so this file is where it must be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from distilljax.data.selections import stratified_indices

_SPLIT_SEED = 0
_NUM_TEST, _NUM_VALIDATION = 400, 197


class Builder(tfds.core.GeneratorBasedBuilder):
    """1,797 handwritten digits of 8x8 pixels with 17 grey levels, ships with sklearn.

    The splits are stratified and fixed: train 1,200, validation 197, test 400.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "Initial release."}
    # Nothing is downloaded, so there are no checksums to look for beside this file. (To
    # find the file, TFDS would import importlib_resources, which it does not declare.)
    url_infos = None
    PREPARES_OFFLINE = True  # in seconds, so `Tfds` does it without being asked

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8x8 pixels, values 0 to 16.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=(
                "Alpaydin, E. and Kaynak, C.: Optical Recognition of Handwritten "
                "Digits. UCI Machine Learning Repository, 1998."
            ),
            features=tfds.features.FeaturesDict(
                {
                    # A Tensor and not an Image: to encode an Image as PNG, TFDS needs
                    # TensorFlow, and 64 bytes gain nothing from it.
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "id": tfds.features.Scalar(dtype=np.int32),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        from sklearn.datasets import load_digits  # heavy

        digits: Any = load_digits()
        images = digits.images.astype(np.uint8)[..., None]
        labels = digits.target.astype(np.int64)
        test = stratified_indices(labels, _NUM_TEST, _SPLIT_SEED)
        rest = np.setdiff1d(np.arange(len(labels)), test)
        validation = rest[
            stratified_indices(labels[rest], _NUM_VALIDATION, _SPLIT_SEED)
        ]
        train = np.setdiff1d(rest, validation)
        parts = {"train": train, "validation": validation, "test": test}
        return {
            name: self._generate_examples(images, labels, part)
            for name, part in parts.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, part: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in part.tolist():
            yield i, {"image": images[i], "label": int(labels[i]), "id": i}
