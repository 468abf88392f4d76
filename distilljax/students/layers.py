"""Which layer of the teacher a layer of the student learns from."""

from __future__ import annotations

import numpy as np

from distilljax._checks import fail


def evenly_spaced(
    num_student: int, num_teacher: int, *, keep_first: bool = True
) -> tuple[int, ...]:
    """The teacher's layers for the student's, in order, at even distances.

    The last is always the teacher's last. With `keep_first` the first is the teacher's
    first, as distil-whisper spaces the layers that it keeps (one layer alone is the
    last); without it each learns from the end of its own share of the teacher,
    g(m) = m num_teacher / num_student, as in TinyBERT.

    Args:
      num_student: Layers of the student.
      num_teacher: Layers of the teacher, at least as many.
      keep_first: Whether the first layers are a pair.

    Returns:
      For each layer of the student an index into the layers of the teacher, from 0.

    Example:
      >>> evenly_spaced(4, 12), evenly_spaced(4, 12, keep_first=False)
      ((0, 3, 7, 11), (2, 5, 8, 11))
      >>> pairs = enumerate(evenly_spaced(2, 24))
      >>> {f"blocks/{i}": f"blocks/{j}" for i, j in pairs}
      {'blocks/0': 'blocks/0', 'blocks/1': 'blocks/23'}
    """
    if not 1 <= num_student <= num_teacher:
        fail(
            "evenly_spaced",
            "num_student",
            f"lie in [1, {num_teacher}], the layers of the teacher",
            num_student,
            "Count the layers of both models.",
        )
    if keep_first:
        spaced = np.linspace(0, num_teacher - 1, num_student, dtype=int)
        spaced[-1] = num_teacher - 1
    else:
        ends = np.arange(1, num_student + 1) * num_teacher
        spaced = ends // num_student - 1
    return tuple(int(i) for i in spaced)


__all__ = ["evenly_spaced"]
