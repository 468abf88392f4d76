"""The step of `lm_gpu.py` in PyTorch, with its own loss or Liger's.

    ENV/bin/python benchmarks/lm_gpu_torch.py VARIANT TOLD.json

Started by `lm_gpu.py`. The bodies are those of `lm_peers.py`, compiled by
`torch.compile`; parameters and the moments of AdamW are in bfloat16, as there.
"""

from __future__ import annotations

import functools
import json
import sys
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lm_peers import CHUNK, Params, hidden_states
from lm_worker import serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PERIOD = 1_048_573  # as lm_gpu_steps


def values(name: str, shape: list[int]) -> torch.Tensor:
    """As `lm_gpu_steps.values`, on the device."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    size = int(np.prod(shape))
    some = 0.02 * rng.standard_normal(min(size, PERIOD), np.float32)
    full = torch.from_numpy(np.resize(some, size).reshape(shape))
    return full.to(torch.bfloat16).to(DEVICE)


def kernel_of(params: Params) -> torch.Tensor:
    """Of the logits, [classes, width]."""
    if "head/kernel" in params:
        return params["head/kernel"].T
    return params["embed/embedding"]


def pytorch(own: Any, theirs: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of both in float32, and PyTorch's KL."""
    log_q, log_p = (
        F.log_softmax(F.linear(hidden, kernel).float(), dim=-1)
        for hidden, kernel in (own, theirs)
    )
    total = F.kl_div(log_q, log_p.detach(), reduction="sum", log_target=True)
    return total / tokens.numel()


def liger(own: Any, theirs: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Liger's fused loss of the heads."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, chunk_size=CHUNK
    )
    (hidden, kernel), (their_hidden, their_kernel) = own, theirs
    hidden, their_hidden = (x.flatten(0, 1) for x in (hidden, their_hidden))
    return loss(hidden, kernel, their_hidden, their_kernel, tokens.flatten())


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"liger": liger, "pytorch": pytorch}


def make(name: str, told: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that makes one step after the other, and what is known of it."""
    found = json.loads(Path(told).read_text())
    tokens = torch.tensor(found["tokens"], device=DEVICE)
    student, teacher = (
        {
            key.removeprefix(f"{who}/"): values(key, shape)
            for key, shape in found["shapes"].items()
            if key.startswith(f"{who}/")
        }
        for who in ("student", "teacher")
    )
    for tensor in student.values():
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(student.values(), lr=1e-4, weight_decay=1e-4)
    body = torch.compile(hidden_states) if DEVICE == "cuda" else hidden_states
    own, theirs = (
        functools.partial(body, head_dim=found["heads"][who])
        for who in ("student", "teacher")
    )
    loss_of = LOSSES[name]

    def step() -> float:
        with torch.no_grad():
            taught = theirs(teacher, tokens), kernel_of(teacher)
        loss = loss_of((own(student, tokens), kernel_of(student)), taught, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device

    sizes = [sum(x.numel() for x in params.values()) for params in (student, teacher)]
    package = "liger-kernel" if name == "liger" else "torch"
    return step, {"parameters": sizes, "version": metadata.version(package)}


def device_peak() -> dict[str, int]:
    """The most that was allocated on the device."""
    if DEVICE == "cpu":
        return {}
    return {"peak_bytes": torch.cuda.max_memory_allocated()}


if __name__ == "__main__":
    serve(lambda: make(sys.argv[1], sys.argv[2]), device_peak)
