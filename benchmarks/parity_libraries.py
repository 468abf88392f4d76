"""Losses of torchdistill and TRL, called as their users do; see `parity_peers`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from parity_torch import Arrays, variance
from torchdistill.losses import mid_level
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.sdft import loss_utils as sdft
from trl.trainer import distillation_trainer

# Modules of torchdistill look their inputs up by path, and by input or output.
AT = {"path": "x", "io": "output"}
BOTH = {"student_module_path": "x", "student_module_io": "output"}
BOTH |= {"teacher_module_path": "x", "teacher_module_io": "output"}
OUTPUTS = {"student_output_path": "x", "teacher_output_path": "x"}
PAIR = {"pair": {"student": AT, "teacher": AT}}


def called(
    module: Any, student: Any, teacher: Any, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """A loss of torchdistill on two tensors."""
    return module({"x": {"output": student}}, {"x": {"output": teacher}}, labels)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """[batch, height, width, channels] as PyTorch has it."""
    return x.permute(0, 3, 1, 2).contiguous()


def images(module: Any, x: Arrays) -> torch.Tensor:
    """A loss of torchdistill on feature maps."""
    return called(module, *(channels_first(x[s]) for s in ("student", "teacher")))


def td_kd(x: Arrays, *, temperature: float, alpha: float | None) -> torch.Tensor:
    module = mid_level.KDLoss(**BOTH, temperature=temperature, alpha=alpha)
    return called(module, x["student"], x["teacher"], x["labels"])


def td_kd_sequences(x: Arrays, *, temperature: float) -> torch.Tensor:
    module = mid_level.KDLoss(**BOTH, temperature=temperature, alpha=0.0)
    return called(module, x["student"], x["teacher"])


def td_standardized(
    x: Arrays, *, temperature: float, alpha: float, eps: float
) -> torch.Tensor:
    module = mid_level.LogitStdKDLoss(
        **BOTH, temperature=temperature, alpha=alpha, eps=eps
    )
    return called(module, x["student"], x["teacher"])


def td_dist(
    x: Arrays, *, temperature: float, inter_weight: float, intra_weight: float
) -> torch.Tensor:
    module = mid_level.DISTLoss(
        **BOTH, tau=temperature, beta=inter_weight, gamma=intra_weight
    )
    return called(module, x["student"], x["teacher"])


def td_attention(x: Arrays, *, mode: str) -> torch.Tensor:
    return images(mid_level.ATLoss(PAIR, mode=mode), x)


def td_boundary(x: Arrays, *, margin: float) -> torch.Tensor:
    return images(mid_level.AltActTransferLoss(PAIR, margin, "mean"), x)


def td_information(x: Arrays) -> torch.Tensor:
    predicted = channels_first(x["student"]), variance(x)[:, None, None]
    return called(mid_level.VIDLoss(PAIR), predicted, channels_first(x["teacher"]))


def td_flow(x: Arrays) -> torch.Tensor:
    maps = {
        f"{side}_{new}": {"path": old, "io": "output"}
        for side in ("student", "teacher")
        for new, old in (("first", "early"), ("second", "late"))
    }
    student, teacher = (
        {n: {"output": channels_first(x[f"{side}_{n}"])} for n in ("early", "late")}
        for side in ("student", "teacher")
    )
    return mid_level.FSPLoss({"pair": maps})(student, teacher)


def td_rkd(x: Arrays, *, dist_factor: float, angle_factor: float) -> torch.Tensor:
    module = mid_level.RKDLoss("x", "x", dist_factor, angle_factor, "mean")
    return called(module, x["student"], x["teacher"])


def td_similarity(x: Arrays) -> torch.Tensor:
    module = mid_level.SPKDLoss(**OUTPUTS, reduction="batchmean")
    return called(module, x["student"], x["teacher"])


def td_probabilistic(x: Arrays, *, eps: float) -> torch.Tensor:
    return called(mid_level.PKTLoss(**BOTH, eps=eps), x["student"], x["teacher"])


def td_congruence(x: Arrays, *, gamma: float, order: int) -> torch.Tensor:
    kernel = {"type": "gaussian", "gamma": gamma, "max_p": order}
    module = mid_level.CCKDLoss("x", "x", kernel, "batchmean")
    return called(module, F.normalize(x["student"]), F.normalize(x["teacher"]))


def td_channels(x: Arrays) -> torch.Tensor:
    return images(mid_level.ChSimLoss(PAIR), x)


def trl_gkd(x: Arrays, *, beta: float, temperature: float = 1.0) -> torch.Tensor:
    labels = torch.where(x["mask"], x["labels"], -100)
    return GKDTrainer.generalized_jsd_loss(
        x["student"], x["teacher"], labels, beta=beta, temperature=temperature
    )


def trl_sdft(x: Arrays, *, beta: float) -> torch.Tensor:
    values = sdft.compute_full_logit_self_distillation_loss(
        x["student"], x["teacher"], distillation_alpha=beta
    )
    return values[x["mask"]].mean()


def trl_tail_bucket(x: Arrays, *, k: int, beta: float) -> torch.Tensor:
    ids = x["teacher"].topk(k, dim=-1).indices
    kept = (
        sdft.add_tail_bucket(F.log_softmax(x[side], dim=-1).gather(-1, ids))
        for side in ("student", "teacher")
    )
    return sdft.compute_divergence(*kept, beta)[x["mask"]].mean()


def trl_uld(x: Arrays, *, temperature: float) -> torch.Tensor:
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=temperature,
        uld_teacher_temperature=temperature,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="observed",
    )
    labels = torch.zeros(x["student"].shape[:-1], dtype=torch.long)
    loss = ULDLoss(config)
    return loss(x["student"], x["teacher"], labels, labels, labels, labels)


def trl_chunked(
    x: Arrays, *, temperature: float, scale: float, softcap: float, beta: float
) -> torch.Tensor:
    loss, _, _ = distillation_trainer._chunked_divergence_loss(
        x["student_hidden"],
        x["teacher_hidden"],
        x["student_kernel"].mT,
        x["teacher_kernel"].mT,
        x["mask"],
        beta,
        student_lm_head_bias=x["student_bias"],
        teacher_lm_head_bias=x["teacher_bias"],
        student_logit_scale=scale,
        teacher_logit_scale=scale,
        student_final_logit_softcapping=softcap,
        teacher_final_logit_softcapping=softcap,
        temperature=temperature,
    )
    return loss


PEERS = {
    "torchdistill KDLoss": td_kd,
    "torchdistill KDLoss on sequences": td_kd_sequences,
    "torchdistill LogitStdKDLoss": td_standardized,
    "torchdistill DISTLoss": td_dist,
    "torchdistill ATLoss": td_attention,
    "torchdistill AltActTransferLoss": td_boundary,
    "torchdistill VIDLoss": td_information,
    "torchdistill FSPLoss": td_flow,
    "torchdistill RKDLoss": td_rkd,
    "torchdistill SPKDLoss": td_similarity,
    "torchdistill PKTLoss": td_probabilistic,
    "torchdistill CCKDLoss": td_congruence,
    "torchdistill ChSimLoss": td_channels,
    "TRL GKDTrainer.generalized_jsd_loss": trl_gkd,
    "TRL SDFT, compute_divergence": trl_sdft,
    "TRL SDFT, tail bucket": trl_tail_bucket,
    "TRL GOLD, ULDLoss": trl_uld,
    "TRL DistillationTrainer, chunked divergence": trl_chunked,
}
