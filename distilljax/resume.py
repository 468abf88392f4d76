"""In what two configs differ, and which of it a run that goes on may change."""

from __future__ import annotations

from typing import Any

from distilljax.config import _FILE

# Fields that a resumed run may change: none of them changes what is computed.
RESUMABLE = frozenset(
    {
        "steps",
        "mesh",
        "student_rules",
        "teacher_rules",
        "teacher",  # the checkpoint knows its fingerprint, wherever it lies
        "loader.in_memory",
        "loader.num_threads",
        "loader.num_workers",
        "loader.prefetch",
        "log_every_steps",
        "diagnostics",
        "checkpoint_every_steps",
        "checkpoint_every_secs",
        "eval_batch_size",
        "keep_last",
        "other_tests",
        "probes",
        "baseline",
        "description",
        "expected",
        "focus_classes",
        "headline",
        "licenses",
    }
)


def differences(old: Any, new: Any, path: str = "") -> dict[str, str]:
    """Where two JSON configs differ, as ``{path: "old -> new"}``.

    Example:
      >>> differences({"a": 1, "loader": {"scale": 2}}, {"a": 1, "loader": {}})
      {'loader.scale': '2 -> None'}
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if path else key
            found |= differences(old.get(key), new.get(key), inner)
        return found
    same = _without_folder(old) == _without_folder(new)
    return {} if same else {path: f"{old!r} -> {new!r}"}


def _without_folder(x: Any) -> Any:
    """A reference into a config file without the folder: a file may be moved."""
    if isinstance(x, str) and x.startswith(_FILE):
        return _FILE + x.rpartition("/")[2]
    return x


def resumable(path: str) -> bool:
    """True if a resumed run may change this field.

    Example:
      >>> resumable("steps"), resumable("teacher.workdir"), resumable("loader.scale")
      (True, True, False)
      >>> resumable("data.text.cache_dir")    # what lies there has a fingerprint
      True
    """
    parts = path.split(".")
    return path in RESUMABLE or parts[0] in RESUMABLE or parts[-1] == "cache_dir"
