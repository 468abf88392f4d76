"""What other packages compute; run by the interpreter of an environment that has them.

    ENV/bin/python benchmarks/parity_peers.py FOLDER

Reads `inputs.npz` and `requests.json` in the folder, evaluates each request with its
gradient by PyTorch's autograd, and writes `gradients.npz` and `answers.json`: a value
for each, or the error that the package raised. `parity.py` starts it; nothing of ours
is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Before TRL is imported, which reads them.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import parity_libraries
import parity_torch
import torch

PEERS = parity_torch.PEERS | parity_libraries.PEERS
PACKAGES = ("torch", "torchdistill", "trl", "transformers")


def tensors_of(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Any]:
    """Tensors of which those whose name begins "student" want a gradient."""
    found = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        found[name] = tensor.requires_grad_(name.startswith("student"))
    return found


def answer(
    request: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The value that a peer gives, and its gradients by name."""
    x = tensors_of(arrays, getattr(torch, request["dtype"]))
    students = {name: tensor for name, tensor in x.items() if tensor.requires_grad}
    try:
        value = PEERS[request["peer"]](x, **request["options"])
    except TypeError as error:  # a defect, which a case may name
        return {"error": f"{type(error).__name__}: {error}"}, {}
    found = torch.autograd.grad(value, list(students.values()))
    gradients = zip(students, found, strict=True)
    return {"value": value.item()}, {name: grad.numpy() for name, grad in gradients}


def main(folder: Path) -> None:
    """Answer all requests of a folder."""
    requests = json.loads((folder / "requests.json").read_text())
    answers, gradients = [], {}
    with np.load(folder / "inputs.npz") as inputs:
        for number, request in enumerate(requests):
            start = f"{request['inputs']}/"
            keys = [key for key in inputs.files if key.startswith(start)]
            arrays = {key.removeprefix(start): inputs[key] for key in keys}
            found, grads = answer(request, arrays)
            answers.append(found)
            gradients |= {f"{number}/{name}": grad for name, grad in grads.items()}
    np.savez(folder / "gradients.npz", **gradients)
    versions = {name: metadata.version(name) for name in PACKAGES}
    result = {"versions": versions, "answers": answers}
    (folder / "answers.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
