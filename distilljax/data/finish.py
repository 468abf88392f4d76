"""What every reader does with the rows it has read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int, Shaped

from distilljax._checks import fail
from distilljax.data.augment import Augment
from distilljax.data.hashing import derive_key, random_bits
from distilljax.data.rows import Rows

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """Which rows of a batch belong to this process: one contiguous run of them."""

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    @property
    def rows(self) -> int:
        """Rows of each batch that this process has."""
        return self.batch_size // self.process_count


@dataclass(frozen=True)
class Finish:
    """From raw rows to a batch: scale, augment, the teacher's view, flatten.

    Both readers end in this function; that is why they agree.
    """

    scale: float
    augment: Augment | None
    teacher_view: Literal["same", "clean", "independent"]
    flatten: bool
    seed: int

    def __call__(
        self,
        start: int,
        rows: Rows,
        index: Int[np.ndarray, " batch"],
    ) -> Batch:
        """The batch whose rows are the stream positions ``start``, start + 1, ..."""
        two_views = self.augment is not None and self.teacher_view != "same"
        made = ("index", "teacher_inputs") if two_views else ("index",)
        check_reserved("Loader", rows, made)
        if "inputs" not in rows:
            self._check_tokens()
            return {**rows, "index": index}
        clean = scaled(rows["inputs"], self.scale)
        batch = {**rows, "inputs": clean, "index": index}
        if self.augment is not None:
            positions = np.arange(start, start + len(index))
            batch["inputs"] = self._view(self.augment, clean, positions, "augment")
            if self.teacher_view == "clean":
                batch["teacher_inputs"] = clean
            elif self.teacher_view == "independent":
                teacher = self._view(self.augment, clean, positions, "augment teacher")
                batch["teacher_inputs"] = teacher
        if self.flatten:
            # what the source has stored stays as it is
            for name in ("inputs", "teacher_inputs") if two_views else ("inputs",):
                batch[name] = batch[name].reshape(len(index), -1)
        return batch

    def _check_tokens(self) -> None:
        if self.scale != 1.0 or self.augment is not None or self.flatten:
            fail(
                "Loader",
                "scale, augment and flatten",
                "be left out where examples have tokens and no inputs",
                f"{self.scale}, {self.augment} and {self.flatten}",
                "They are for images and other numbers.",
            )

    def _view(
        self,
        augment: Augment,
        clean: Float32[np.ndarray, "batch *features"],
        positions: Int[np.ndarray, " batch"],
        purpose: str,
    ) -> Float32[np.ndarray, "batch *features"]:
        seeds = random_bits(derive_key(self.seed, purpose), positions)
        return augment(clean, seeds)


def scaled(
    inputs: Shaped[np.ndarray, "batch *features"], scale: float
) -> Float32[np.ndarray, "batch *features"]:
    """``inputs / scale`` as a new float32 array.

    Always new: the device may borrow the memory of what it is given.
    """
    if scale == 1.0:
        return inputs.astype(np.float32)
    return np.divide(inputs, np.float32(scale), dtype=np.float32)


def check_reserved(function: str, rows: Rows, made: tuple[str, ...]) -> None:
    """The examples have no key that is made here, for nothing is replaced silently."""
    for name in made:
        if name in rows:
            fail(
                function,
                "examples",
                f"have no key {name!r}, which is made here",
                sorted(rows),
                "Give this key another name in the source.",
            )


def check_shards(
    function: str, batch_size: int, process_index: int, process_count: int
) -> None:
    """A batch divides evenly over the processes, and this is one of them."""
    if batch_size < 1 or batch_size % process_count:
        fail(
            function,
            "batch_size",
            f"be a positive multiple of the number of processes, {process_count}",
            batch_size,
            "It counts the examples of all processes together.",
        )
    if not 0 <= process_index < process_count:
        fail(
            function,
            "process_index",
            f"lie in [0, {process_count})",
            process_index,
            "Pass jax.process_index() and jax.process_count().",
        )
