"""The comparisons of losses between logits."""

from __future__ import annotations

from typing import Any

import parity_papers as papers
from parity_cases import BATCH, CLASSES, Arrays, Case, Factor, of

from distilljax import losses

T = 4.0
T_SQUARED = Factor("T²", T**2)
TWICE_THE_SUM = Factor("2 batch", 2 * BATCH)
ENDS = "TRL turns to the forward KL at β = 0 and to the reverse KL at β = 1; no T²."


def hard_and_soft(x: Arrays, *, temperature: float) -> Any:
    """The objective of Hinton et al., from two losses of ours: 0.3 of it is hard."""
    soft = of(losses.forward_kl)(x, temperature=temperature)
    return 0.3 * cross_entropy(x) + 0.7 * temperature**2 * soft


def cross_entropy(x: Arrays, **options: Any) -> Any:
    """Of the student's logits and the labels."""
    values = losses.cross_entropy(x["student"], x["labels"], **options)
    return losses.masked_mean(values)


def standardized(x: Arrays, *, temperature: float) -> Any:
    """The forward KL of logits that are standardised on both sides."""
    z, v = (losses.standardize_logits(x[side]) for side in ("student", "teacher"))
    return losses.masked_mean(losses.forward_kl(z, v, temperature=temperature))


def decoupled(x: Arrays, **options: Any) -> Any:
    """Of the labels' classes, and of the others."""
    labels = {"labels": x["labels"]}
    return of(losses.decoupled_kd)(x, **labels, **options)


def top_k(loss: Any) -> Any:
    """A divergence from the teacher's k likeliest classes and a tail bucket."""

    def ours(x: Arrays, *, k: int, **options: Any) -> Any:
        teacher = losses.SparseLogits.top_k(x["teacher"], k)
        return of(loss)({**x, "teacher": teacher}, **options)

    return ours


def fused(divergence: Any) -> Any:
    """A divergence from hidden states, in one pass, scaled and soft-capped."""

    def ours(x: Arrays, *, temperature: float, scale: float, softcap: float) -> Any:
        student, teacher = (
            losses.LinearHead(
                *(x[f"{side}_{part}"] for part in ("hidden", "kernel", "bias")),
                softcap=softcap,
                scale=scale,
            )
            for side in ("student", "teacher")
        )
        total, _ = losses.fused_divergence(
            student,
            teacher,
            divergence=divergence,
            temperature=temperature,
            where=x["mask"],
        )
        return total.sum / total.count

    return ours


def kl_case(**fields: Any) -> Case:
    """A comparison of the forward KL of plain logits at temperature 4."""
    defaults: dict[str, Any] = {
        "ours": of(losses.forward_kl),
        "inputs": "logits",
        "options": {"temperature": T},
    }
    return Case("forward_kl", **defaults | fields)


KL = (
    kl_case(
        peer="torch kl_div, batchmean",
        why="A sum over classes and a mean over the batch; no T².",
    ),
    kl_case(
        peer="torch kl_div, mean",
        factor=Factor("1 / classes", 1 / CLASSES),
        why="Torch's default reduction (until its next major release) is a mean over "
        "classes too: the loss shrinks as the vocabulary grows.",
    ),
    kl_case(
        ours=hard_and_soft,
        peer="torchdistill KDLoss",
        theirs={"alpha": 0.3},
        why="Ours is 0.3 `cross_entropy` + 0.7 T² `forward_kl` here.",
    ),
    kl_case(
        peer="torchdistill KDLoss",
        theirs={"alpha": 0.0},
        factor=T_SQUARED,
        why="α CE + (1 - α) T² KL: T² KL at α = 0.",
        differs="At α = 0, and without labels, T² is left out.",
        paper=papers.squared_temperature_kl,
    ),
    kl_case(
        peer="torchdistill KDLoss",
        theirs={"alpha": None},
        factor=T_SQUARED,
        why="The same.",
        differs="Its default, `alpha=None` with `beta=None`, cannot be constructed.",
        paper=papers.squared_temperature_kl,
        raises=True,
    ),
    kl_case(
        inputs="tokens",
        peer="torchdistill KDLoss on sequences",
        why="KL over the classes, averaged over the tokens that count.",
        differs="Its softmax runs over axis 1, the time of [batch, time, classes]; "
        "padding counts, and the sum over positions is divided by the batch alone.",
        paper=papers.masked_kl,
    ),
    kl_case(
        inputs="tokens",
        peer="TRL GKDTrainer.generalized_jsd_loss",
        theirs={"beta": 0.0},
        why=ENDS,
    ),
    kl_case(
        ours=top_k(losses.forward_kl),
        inputs="tokens",
        peer="TRL SDFT, tail bucket",
        options={"k": 4},
        theirs={"beta": 0.0},
        why="TRL's `add_tail_bucket` and `compute_divergence` at the teacher's best k; "
        "its trainer takes the student's.",
    ),
    Case(
        "soft_cross_entropy",
        of(losses.soft_cross_entropy),
        "logits",
        "torch cross_entropy",
        {"temperature": T},
        why="Of z / T, with softmax(v / T) for labels.",
    ),
    Case("cross_entropy", cross_entropy, "logits", "torch cross_entropy, labels"),
    Case(
        "cross_entropy",
        cross_entropy,
        "logits",
        "torch cross_entropy, labels",
        {"label_smoothing": 0.1},
        why="Both spread ε over all classes, that of the label included.",
    ),
    Case(
        "reverse_kl",
        of(losses.reverse_kl),
        "tokens",
        "TRL GKDTrainer.generalized_jsd_loss",
        {"temperature": T},
        {"beta": 1.0},
        why=ENDS,
    ),
)

GKD = [
    Case(
        "jensen_shannon",
        of(losses.jensen_shannon),
        "tokens",
        peer,
        {"beta": beta},
        why="β is the weight of the teacher in both.",
    )
    for beta in (0.1, 0.5, 0.9)
    for peer in ("TRL GKDTrainer.generalized_jsd_loss", "TRL SDFT, compute_divergence")
]
GKD += [
    Case(
        "jensen_shannon",
        of(losses.jensen_shannon),
        "tokens",
        "TRL GKDTrainer.generalized_jsd_loss",
        {"beta": beta},
        own={"normalized": True},
        why="The limit of JSD / (β (1 - β)), which is that KL.",
    )
    for beta in (0.0, 1.0)
]
GKD += [
    Case(
        "jensen_shannon",
        of(losses.jensen_shannon),
        "tokens",
        "TRL GKDTrainer.generalized_jsd_loss",
        {"beta": beta},
        why="JSD is 0 at both ends, and so is its gradient.",
        differs=f"A KL at β = {beta:g}, as its config says: a jump from divergences "
        "near 0.",
        paper=papers.jensen_shannon,
    )
    for beta in (0.0, 1.0)
]
GKD += [
    Case(
        "jensen_shannon",
        top_k(losses.jensen_shannon),
        "tokens",
        "TRL SDFT, tail bucket",
        {"k": 4, "beta": 0.5},
        why="As for `forward_kl`: the tail is one class of both sides.",
    )
]

OTHERS = (
    Case(
        "skew_forward_kl",
        of(losses.skew_forward_kl),
        "logits",
        "torch kl_div, skewed",
        {"skew": 0.1},
        why="kl_div of log(s p + (1 - s) q) and p.",
    ),
    Case(
        "skew_reverse_kl",
        of(losses.skew_reverse_kl),
        "logits",
        "torch kl_div, skewed reverse",
        {"skew": 0.1},
        why="kl_div of log((1 - s) p + s q) and q.",
    ),
    Case(
        "total_variation",
        of(losses.total_variation),
        "logits",
        "torch l1_loss, sum",
        factor=TWICE_THE_SUM,
        why="A sum over the batch of twice the distance.",
    ),
    Case(
        "logit_mse",
        of(losses.logit_mse),
        "logits",
        "torch mse_loss",
        why="A mean over classes in both.",
    ),
    Case(
        "standardize_logits",
        standardized,
        "logits",
        "torchdistill LogitStdKDLoss",
        {"temperature": 2.0},
        {"alpha": 0.0, "eps": 0.0},
        why="Then `forward_kl`, no T². ε = 0: its default adds 1e-7 to the deviation, "
        "more than the limit allows.",
    ),
    Case(
        "dist",
        of(losses.dist),
        "logits",
        "torchdistill DISTLoss",
        {"temperature": T, "inter_weight": 2.0, "intra_weight": 1.0},
        factor=T_SQUARED,
        why="It multiplies both terms by T², which correlations do not need.",
    ),
    Case(
        "universal_logit",
        of(losses.universal_logit),
        "vocabularies",
        "TRL GOLD, ULDLoss",
        {"temperature": 2.0},
        why="Over equal numbers of tokens a mean over positions, of 13 and 19 classes.",
    ),
    Case(
        "hinge_ranking",
        of(losses.hinge_ranking),
        "logits",
        "torch margin_ranking_loss",
        {"k": 3, "margin": 1.0},
        why="Over the same pairs.",
    ),
    Case(
        "alpha_beta",
        of(losses.alpha_beta),
        "logits",
        "torch mse_loss of probabilities, sum",
        {"teacher_power": 1.0, "student_power": 1.0},
        factor=TWICE_THE_SUM,
        why="At powers (1, 1) ours is half the squared distance.",
    ),
    Case(
        "alpha_beta",
        of(losses.alpha_beta),
        "logits",
        options={"teacher_power": 0.2, "student_power": 0.7},
        why="Published as the repository of a paper, not as a package.",
        paper=papers.alpha_beta,
    ),
    Case(
        "adaptive_kl",
        of(losses.adaptive_kl),
        "logits",
        options={"mu": 0.5},
        why="Published as the repository of a paper, not as a package.",
        paper=papers.adaptive_kl,
        paper_gradient=papers.adaptive_kl_gradient,
    ),
    Case(
        "decoupled_kd",
        decoupled,
        "logits",
        options={"temperature": T, "target_weight": 1.0, "non_target_weight": 8.0},
        why="Published as the repository of a paper, not as a package.",
        paper=papers.decoupled_kd,
    ),
)

FUSED = tuple(
    Case(
        "fused_divergence",
        fused(divergence),
        "heads",
        "TRL DistillationTrainer, chunked divergence",
        {"temperature": 2.0, "scale": 0.5, "softcap": 3.0},
        {"beta": beta},
        why="It computes in float32 whatever the inputs are, so that the limit of "
        "float32 holds for both columns.",
        single=True,
    )
    for beta, divergence in (
        (0.0, losses.forward_kl),
        (0.5, losses.jensen_shannon),
        (1.0, losses.reverse_kl),
    )
)

CASES = (*KL, *GKD, *OTHERS, *FUSED)
