"""What the loop asks of whoever makes the teacher's outputs outside of the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Provider(Protocol):
    """Outputs of a teacher for the batches of a run.

    Attributes:
      head: What the step is made with, ``teacher_head=``: the teacher's heads without
        hidden states, on the student's devices; None if there is no head.
      fingerprint: A digest of what the outputs depend on; a run that goes on has the
        one with which it began.
    """

    head: Any
    fingerprint: str

    def on_host(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches of NumPy arrays with what is read for them.

        Args:
          batches: A resumable iterator of a loader's batches.

        Returns:
          A resumable iterator, whose state is that of ``batches`` after the batch last
          yielded; the same one, if nothing is read.
        """
        ...

    def on_devices(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pairs of a batch on the devices and its index, with what is computed for it.

        Args:
          batches: What `data.prefetch_to_device` returned.

        Returns:
          As `on_host`.
        """
        ...

    def shapes(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The shapes of a batch on the devices with those of the teacher's outputs."""
        ...


__all__ = ["Provider"]
