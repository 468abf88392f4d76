"""Losses of PyTorch itself, on inputs that a line prepares; see `parity_peers`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Arrays = dict[str, torch.Tensor]


def distributions(x: Arrays, temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
    """log q and p, over the last axis."""
    log_q = F.log_softmax(x["student"] / temperature, dim=-1)
    return log_q, F.softmax(x["teacher"] / temperature, dim=-1)


def kl_div(reduction: str) -> Any:
    """KL(p || q), reduced as PyTorch does."""

    def peer(x: Arrays, *, temperature: float) -> torch.Tensor:
        log_q, p = distributions(x, temperature)
        return F.kl_div(log_q, p, reduction=reduction)

    return peer


def soft_labels(x: Arrays, *, temperature: float) -> torch.Tensor:
    _, p = distributions(x, temperature)
    return F.cross_entropy(x["student"] / temperature, p)


def hard_labels(x: Arrays, *, label_smoothing: float = 0.0) -> torch.Tensor:
    return F.cross_entropy(x["student"], x["labels"], label_smoothing=label_smoothing)


def skewed(x: Arrays, *, skew: float) -> torch.Tensor:
    log_q, p = distributions(x)
    return F.kl_div(
        (skew * p + (1 - skew) * log_q.exp()).log(), p, reduction="batchmean"
    )


def skewed_reverse(x: Arrays, *, skew: float) -> torch.Tensor:
    log_q, p = distributions(x)
    log_m = ((1 - skew) * p + skew * log_q.exp()).log()
    return F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)


def l1_of_probabilities(x: Arrays) -> torch.Tensor:
    log_q, p = distributions(x)
    return F.l1_loss(log_q.exp(), p, reduction="sum")


def mse_of_probabilities(
    x: Arrays, *, teacher_power: float, student_power: float
) -> torch.Tensor:
    assert teacher_power == student_power == 1
    log_q, p = distributions(x)
    return F.mse_loss(log_q.exp(), p, reduction="sum")


def margin_ranking(x: Arrays, *, k: int, margin: float) -> torch.Tensor:
    order = x["teacher"].argsort(dim=-1, descending=True)
    z = x["student"].gather(-1, order)
    ranks = [(i, j) for i in range(k) for j in range(i + 1, z.shape[-1])]
    higher, lower = (z[:, list(side)] for side in zip(*ranks, strict=True))
    return F.margin_ranking_loss(higher, lower, torch.ones_like(lower), margin=margin)


def variance(x: Arrays) -> torch.Tensor:
    """One for each channel, from the raw scale, as all implementations have it."""
    return F.softplus(x["student_scale"]) + 1e-5


def gaussian_nll(x: Arrays) -> torch.Tensor:
    spread = variance(x).expand_as(x["student"])
    return F.gaussian_nll_loss(x["student"], x["teacher"], spread, eps=0.0)


def cosines_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each row of x with each row of y."""
    return F.cosine_similarity(x[:, None], y[None], dim=-1)


def cosine_embedding(x: Arrays) -> torch.Tensor:
    ones = torch.ones(len(x["student"]))
    return F.cosine_embedding_loss(x["student"], x["teacher"], ones)


def info_nce(x: Arrays, *, temperature: float) -> torch.Tensor:
    cosines = cosines_of(x["student"], x["teacher"])
    return F.cross_entropy(cosines / temperature, torch.arange(len(cosines)))


def kl_of_scores(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over rows of KL between the softmax of rows of scores."""
    rows = {"student": student, "teacher": teacher}
    rows = {side: scores.flatten(0, -2) for side, scores in rows.items()}
    log_q, p = distributions(rows)
    return F.kl_div(log_q, p, reduction="batchmean")


def attention_maps(x: Arrays) -> torch.Tensor:
    return kl_of_scores(x["student"], x["teacher"])


def attention_relations(x: Arrays, *, num_relation_heads: int) -> torch.Tensor:
    scores = []
    for side in ("student", "teacher"):
        heads = x[side].unflatten(-1, (num_relation_heads, -1)).transpose(1, 2)
        scores.append(heads @ heads.mT / heads.shape[-1] ** 0.5)
    return kl_of_scores(*scores)


def mse_of_cosines(x: Arrays) -> torch.Tensor:
    student, teacher = (cosines_of(x[s], x[s]) for s in ("student", "teacher"))
    return F.mse_loss(student, teacher)


def kl_of_cosines(x: Arrays, *, temperature: float) -> torch.Tensor:
    others = ~torch.eye(len(x["student"]), dtype=torch.bool)
    student, teacher = (
        cosines_of(x[s], x[s])[others].reshape(len(others), -1) / temperature
        for s in ("student", "teacher")
    )
    return kl_of_scores(student, teacher)


def mse_of_margins(x: Arrays) -> torch.Tensor:
    student, teacher = (x[s][:, :1] - x[s][:, 1:] for s in ("student", "teacher"))
    return F.mse_loss(student, teacher)


def mse(x: Arrays) -> torch.Tensor:
    return F.mse_loss(x["student"], x["teacher"])


PEERS = {
    "torch kl_div, batchmean": kl_div("batchmean"),
    "torch kl_div, mean": kl_div("mean"),
    "torch kl_div, skewed": skewed,
    "torch kl_div, skewed reverse": skewed_reverse,
    "torch kl_div of attention": attention_maps,
    "torch kl_div of relations": attention_relations,
    "torch kl_div of cosines": kl_of_cosines,
    "torch cross_entropy": soft_labels,
    "torch cross_entropy, labels": hard_labels,
    "torch cross_entropy of cosines": info_nce,
    "torch l1_loss, sum": l1_of_probabilities,
    "torch mse_loss": mse,
    "torch mse_loss of probabilities, sum": mse_of_probabilities,
    "torch mse_loss of cosines": mse_of_cosines,
    "torch mse_loss of margins": mse_of_margins,
    "torch margin_ranking_loss": margin_ranking,
    "torch cosine_embedding_loss": cosine_embedding,
    "torch gaussian_nll_loss": gaussian_nll,
}
