"""Why a loss was not finite, as far as the examples of its batch tell."""

from __future__ import annotations

from typing import Any

import numpy as np

from distilljax.metrics import NonFiniteError


def why_not_finite(error: NonFiniteError, source: Any, num_classes: int | None) -> str:
    """Which examples it was, whether they are the cause, and what to do.

    Args:
      error: What names the rows of the batch.
      source: Where they are from.
      num_classes: How many classes the student has; None: unknown.
    """
    index = [] if error.index is None else error.index.tolist()
    examples = {i: source[i] for i in index}
    bad = [
        i
        for i, example in examples.items()
        if not np.all(np.isfinite(np.asarray(example.get("inputs", 0), np.float64)))
    ]
    # a loader that reads ahead does not know the student's classes; those of tokens
    # were compared with the tokenizer's before the run
    classes = np.inf if num_classes is None else num_classes
    outside = [i for i, e in examples.items() if np.any(e.get("labels", 0) >= classes)]
    shown = ", ".join(map(str, index[:20])) + (", ..." if len(index) > 20 else "")
    if bad:
        cause = f"The inputs of examples {bad[:20]} are not finite: leave them out."
    elif outside:
        cause = (
            f"The labels of examples {outside[:20]} are not in [0, {classes}), the "
            "classes of the student: leave them out."
        )
    else:
        cause = (
            "Their inputs are finite: lower the learning rate, clip the gradient "
            "(--optimizer.clip-norm=1), or check the loss."
        )
    keys = ", ".join(sorted(examples[index[0]])) if index else "none"
    return f"Its batch (keys: {keys}) has the {len(index)} examples {shown}. {cause}"


__all__ = ["why_not_finite"]
