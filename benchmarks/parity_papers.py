"""Formulas of papers, in NumPy float64, where no peer has them or the peer differs.

Each takes the arrays of a case and its options, and returns the mean over the batch.
Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Over the last axis."""
    scaled = logits / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Sum over the last axis of p log(p / q), where 0 log 0 is 0."""
    ratio = np.where(p > 0, p, 1.0) / np.where(p > 0, q, 1.0)
    return (p * np.log(ratio)).sum(axis=-1)


def both(x: Arrays, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The distributions of teacher and student: p, q."""
    return softmax(x["teacher"], temperature), softmax(x["student"], temperature)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def squared_temperature_kl(x: Arrays, *, temperature: float) -> float:
    """Hinton, Vinyals, Dean, arXiv 1503.02531, section 2: T² KL(p || q)."""
    return temperature**2 * float(kl(*both(x, temperature)).mean())


def masked_kl(x: Arrays, *, temperature: float) -> float:
    """KL(p || q) over classes, averaged over the tokens that count."""
    return float(kl(*both(x, temperature))[x["mask"]].mean())


def jensen_shannon(x: Arrays, *, beta: float) -> float:
    """Agarwal et al., arXiv 2306.13649, equation 1."""
    p, q = both(x)
    m = beta * p + (1 - beta) * q
    values = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return float(values[x["mask"]].mean())


def alpha_beta(x: Arrays, *, teacher_power: float, student_power: float) -> float:
    """Wang et al., arXiv 2505.04560, the definition of the divergence."""
    (p, q), (a, b) = both(x), (teacher_power, student_power)
    inside = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return float(-inside.sum(axis=-1).mean() / (a * b))


def head_weight(p: np.ndarray, q: np.ndarray, mu: float) -> np.ndarray:
    """Share of the head in the sum of |p - q|: Wu et al., arXiv 2404.02657."""
    shares = []
    for p_row, q_row in zip(p, q, strict=True):
        order = np.argsort(-p_row)
        head = np.cumsum(p_row[order]) <= mu
        head[0] = True
        gaps = np.abs(p_row - q_row)[order]
        shares.append(gaps[head].sum() / gaps.sum())
    return np.array(shares)


def adaptive_kl(x: Arrays, *, mu: float) -> float:
    """Wu et al., arXiv 2404.02657: both KLs, weighed by the gaps of head and tail."""
    p, q = both(x)
    weight = head_weight(p, q, mu)
    return float((weight * kl(p, q) + (1 - weight) * kl(q, p)).mean())


def adaptive_kl_gradient(x: Arrays, *, mu: float) -> dict[str, np.ndarray]:
    """Of it, with the weight as a constant, as in the authors' code."""
    p, q = both(x)
    weight = head_weight(p, q, mu)[:, None]
    reverse = q * (np.log(q / p) - kl(q, p)[:, None])
    return {"student": (weight * (q - p) + (1 - weight) * reverse) / len(p)}


def decoupled_kd(
    x: Arrays, *, temperature: float, target_weight: float, non_target_weight: float
) -> float:
    """Zhao et al., arXiv 2203.08679, equation 7, without T²."""
    total = 0.0
    for p, q, label in zip(*both(x, temperature), x["labels"], strict=True):
        binary = (np.array([a[label], 1 - a[label]]) for a in (p, q))
        others = (np.delete(a, label) / (1 - a[label]) for a in (p, q))
        total += target_weight * float(kl(*binary))
        total += non_target_weight * float(kl(*others))
    return total / len(x["labels"])


def flow_of_solution(x: Arrays) -> float:
    """Yim et al., CVPR 2017, equation 2: the squared length of the difference."""
    matrices = []
    for side in ("student", "teacher"):
        early, late = x[f"{side}_early"], x[f"{side}_late"]
        products = np.einsum("bhwm,bhwn->bmn", early, late)
        matrices.append(products / (early.shape[1] * early.shape[2]))
    return float(((matrices[0] - matrices[1]) ** 2).sum(axis=(1, 2)).mean())


def neuron_selectivity(x: Arrays) -> float:
    """Huang, Wang, arXiv 1707.01219: squared MMD, with the kernel <a, b>^2."""
    total = 0.0
    for image in zip(x["student"], x["teacher"], strict=True):
        s, t = (unit(a.reshape(-1, a.shape[-1]).T) for a in image)
        total += ((s @ s.T) ** 2).mean() + ((t @ t.T) ** 2).mean()
        total -= 2 * ((s @ t.T) ** 2).mean()
    return total / len(x["student"])


def linear_cka(x: Arrays) -> float:
    """Kornblith et al., arXiv 1905.00414: 1 - |Y' X|^2 / (|X' X| |Y' Y|)."""
    s, t = (a - a.mean(axis=0) for a in (x["student"], x["teacher"]))
    norm = np.linalg.norm
    return float(1 - norm(t.T @ s) ** 2 / (norm(s.T @ s) * norm(t.T @ t)))


def similarity_preserving(x: Arrays) -> float:
    """Tung, Mori, arXiv 1907.09682, equations 1 to 4: rows of length 1."""
    s, t = (unit(x[side] @ x[side].T) for side in ("student", "teacher"))
    return float(((s - t) ** 2).mean())


def probabilistic_transfer(x: Arrays) -> float:
    """Passalis, Tefas, arXiv 1803.10837: neighbours other than the anchor itself.

    The mean over anchors and neighbours, as the peer has it, of the paper's terms.
    """
    rows = []
    for side in ("student", "teacher"):
        kernel = (unit(x[side]) @ unit(x[side]).T + 1) / 2
        others = [np.delete(row, i) for i, row in enumerate(kernel)]
        rows.append(np.array([row / row.sum() for row in others]))
    q, p = rows
    return float(kl(p, q).sum() / len(p) ** 2)


def correlation_congruence(x: Arrays, *, gamma: float, order: int) -> float:
    """Peng et al., arXiv 1904.01802: the squared distance of the tables / batch²."""
    tables = []
    for side in ("student", "teacher"):
        cosines = unit(x[side]) @ unit(x[side]).T
        powers = (
            math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosines**p
            for p in range(order + 1)
        )
        tables.append(sum(powers))
    return float(((tables[0] - tables[1]) ** 2).mean())


def central_differences(
    formula: Callable[[Arrays], float], x: Arrays, step: float = 4e-3
) -> dict[str, np.ndarray]:
    """The gradient of a formula, from six values for each entry.

    Its error falls with step^6 and grows with rounding / step; at this step both are
    near 1e-11 of the gradient.
    """
    weights = {1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
    gradients = {}
    for name in (name for name in x if name.startswith("student")):
        gradients[name] = np.zeros_like(x[name])
        for index in np.ndindex(x[name].shape):
            total, shift = 0.0, np.zeros_like(x[name])
            for steps, weight in weights.items():
                shift[index] = steps * step
                total += weight * formula({**x, name: x[name] + shift})
                total -= weight * formula({**x, name: x[name] - shift})
            gradients[name][index] = total / step
    return gradients
