"""Disks with something the matter: small ones, and ones whose operations fail."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(
    mount: Path, size: str
) -> Iterator[tuple[Path, Callable[[str], object]]]:
    """A file system in memory; the second, ``remount("size=8m")``, changes it."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(mount)], check=True)

    try:
        yield mount, remount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def faulty_library(folder: Path) -> Path:
    """`faulty.c`, compiled; variables FAULTY_... say what it does."""
    if shutil.which("gcc") is None:
        pytest.skip("it takes a C compiler")
    path = folder / "faulty.so"
    source = str(Path(__file__).with_name("faulty.c"))
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(path), source, "-ldl"], check=True
    )
    return path
