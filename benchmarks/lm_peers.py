"""The step of `lm.py` in PyTorch, with what Liger and TRL add to it.

    ENV/bin/python benchmarks/lm_peers.py VARIANT WEIGHTS.npz

Started by `lm.py` with the interpreter of an environment that has the packages; nothing
of ours is imported here but the protocol. The model is a Llama as one writes it in
PyTorch, with its own attention and its own RMSNorm, of the weights that are given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

# Before TRL is imported, which reads them.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
from lm_worker import serve

HEAD_DIM, EPS, BASE = 64, 1e-6, 10_000.0
Params = dict[str, torch.Tensor]


def hidden_states(
    params: Params, tokens: torch.Tensor, head_dim: int = HEAD_DIM
) -> torch.Tensor:
    """A Llama of [batch, time] tokens, without its head."""
    x = F.embedding(tokens, params["embed/embedding"])
    batch, time, width = x.shape
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.arange(time)[:, None] * (BASE**-exponents).float()
    cos, sin = angles.cos().to(x), angles.sin().to(x)

    def rotated(y):
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    for index in range(sum(key.endswith("mlp_norm/scale") for key in params)):

        def at(name, index=index):
            return params[f"layers/{index}/{name}"]

        y = F.rms_norm(x, (width,), at("attention_norm/scale"), EPS)
        q, k, v = (
            (y @ at(f"attention/{name}/kernel"))
            .view(batch, time, -1, head_dim)
            .transpose(1, 2)
            for name in ("query", "key", "value")
        )
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            rotated(q), rotated(k), v, is_causal=True, enable_gqa=grouped
        )
        out = out.transpose(1, 2).reshape(batch, time, -1)
        x = x + out @ at("attention/out/kernel")
        y = F.rms_norm(x, (width,), at("mlp_norm/scale"), EPS)
        gate, up = (y @ at(f"mlp/{name}/kernel") for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ at("mlp/down/kernel")
    return F.rms_norm(x, (width,), params["final_norm/scale"], EPS)


def logits(params: Params, tokens: torch.Tensor) -> torch.Tensor:
    """With the embedding as the head."""
    return hidden_states(params, tokens) @ params["embed/embedding"].T


def kl(student: Params, teacher: Params, tokens: torch.Tensor) -> torch.Tensor:
    """As PyTorch's documentation has it."""
    with torch.no_grad():
        log_p = F.log_softmax(logits(teacher, tokens), dim=-1)
    log_q = F.log_softmax(logits(student, tokens), dim=-1)
    total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total / tokens.numel()


def liger(student: Params, teacher: Params, tokens: torch.Tensor) -> torch.Tensor:
    """Liger's fused loss of the heads: compiled PyTorch, without Triton on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, chunk_size=CHUNK
    )
    with torch.no_grad():
        theirs = hidden_states(teacher, tokens).flatten(0, 1)
    own = hidden_states(student, tokens).flatten(0, 1)
    kernels = (params["embed/embedding"] for params in (student, teacher))
    own_kernel, their_kernel = kernels
    return loss(own, own_kernel, theirs, their_kernel, tokens.flatten())


def trl(student: Params, teacher: Params, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of TRL's GKD trainer, with labels for all positions as it has them."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        v = logits(teacher, tokens)
    z = logits(student, tokens)
    return GKDTrainer.generalized_jsd_loss(z, v, labels=tokens, beta=0.0)


def trl_chunked(student: Params, teacher: Params, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of TRL's distillation trainer, which makes logits in chunks."""
    from trl.trainer import distillation_trainer

    with torch.no_grad():
        theirs = hidden_states(teacher, tokens)
    own = hidden_states(student, tokens)
    kernels = (params["embed/embedding"] for params in (student, teacher))
    mask = torch.ones_like(tokens)
    loss, _, _ = distillation_trainer._chunked_divergence_loss(
        own, theirs, *kernels, mask, 0.0
    )
    return loss


# Liger's own choice is 1,024, all of these positions at once; so is a quarter of it.
CHUNK = 256
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "pytorch": kl,
    "torch_compile": kl,
    "liger": liger,
    "trl_gkd": trl,
    "trl_chunked": trl_chunked,
}
PACKAGES = {"liger": "liger-kernel", "trl_gkd": "trl", "trl_chunked": "trl"}


def make(name: str, weights: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that makes one step after the other, and what is known of it."""
    loaded = np.load(weights)
    tokens = torch.from_numpy(loaded["tokens"]).long()
    student, teacher = (
        {
            key.removeprefix(f"{model}/"): torch.from_numpy(loaded[key])
            for key in loaded.files
            if key.startswith(f"{model}/")
        }
        for model in ("student", "teacher")
    )
    for tensor in student.values():
        tensor.requires_grad_()
    loss_of = LOSSES[name]
    loss_of = torch.compile(loss_of) if name == "torch_compile" else loss_of
    optimizer = torch.optim.AdamW(student.values(), lr=1e-3, weight_decay=1e-4)

    def step() -> float:
        loss = loss_of(student, teacher, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    sizes = [sum(x.numel() for x in params.values()) for params in (student, teacher)]
    package = PACKAGES.get(name, "torch")
    return step, {"parameters": sizes, "version": metadata.version(package)}


if __name__ == "__main__":
    serve(lambda: make(sys.argv[1], sys.argv[2]))
