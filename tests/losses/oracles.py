"""Every loss again, in NumPy float64, written plainly from its formula.

Nothing here is shared with the package, no care is taken about cancellation (float64
has digits to spare), and no gradient comes from automatic differentiation. A class at
-inf is dropped from the sums by `np.where`; masks are the contract's own business.
"""

from __future__ import annotations

import numpy as np


def softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return np.exp(scaled) / np.exp(scaled).sum(axis=-1, keepdims=True)


def distributions(student, teacher, temperature):
    return softmax(student, temperature), softmax(teacher, temperature)


def kl(a, b):
    return np.where(a > 0, a * np.log(np.where(a > 0, a / b, 1.0)), 0.0).sum(axis=-1)


def through_softmax(q, g, temperature):
    """dL/dz from g = dL/dq: q (g - sum of q g) / T."""
    return q * (g - (q * g).sum(axis=-1, keepdims=True)) / temperature


def forward_kl(student, teacher, temperature=1.0):
    q, p = distributions(student, teacher, temperature)
    return kl(p, q)


def forward_kl_gradient(student, teacher, temperature=1.0):
    q, p = distributions(student, teacher, temperature)
    return (q - p) / temperature


def reverse_kl(student, teacher, temperature=1.0):
    q, p = distributions(student, teacher, temperature)
    return kl(q, p)


def reverse_kl_gradient(student, teacher, temperature=1.0):
    q, p = distributions(student, teacher, temperature)
    return q * (np.log(q / p) - kl(q, p)[..., None]) / temperature


def js(student, teacher, temperature=1.0, beta=0.5, normalized=False):
    q, p = distributions(student, teacher, temperature)
    m = beta * p + (1 - beta) * q
    divergence = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return divergence / (beta * (1 - beta)) if normalized else divergence


def js_gradient(student, teacher, temperature=1.0, beta=0.5, normalized=False):
    q, p = distributions(student, teacher, temperature)
    m = beta * p + (1 - beta) * q
    gradient = (1 - beta) * q * (np.log(q / m) - kl(q, m)[..., None]) / temperature
    return gradient / (beta * (1 - beta)) if normalized else gradient


def skew_fkl(student, teacher, temperature=1.0, skew=0.1):
    q, p = distributions(student, teacher, temperature)
    return kl(p, skew * p + (1 - skew) * q)


def skew_fkl_gradient(student, teacher, temperature=1.0, skew=0.1):
    q, p = distributions(student, teacher, temperature)
    m = skew * p + (1 - skew) * q
    return through_softmax(q, -(1 - skew) * p / m, temperature)


def skew_rkl(student, teacher, temperature=1.0, skew=0.1):
    q, p = distributions(student, teacher, temperature)
    return kl(q, (1 - skew) * p + skew * q)


def skew_rkl_gradient(student, teacher, temperature=1.0, skew=0.1):
    q, p = distributions(student, teacher, temperature)
    m = (1 - skew) * p + skew * q
    return through_softmax(q, np.log(q / m) - skew * q / m, temperature)


def tv(student, teacher, temperature=1.0):
    q, p = distributions(student, teacher, temperature)
    return 0.5 * np.abs(p - q).sum(axis=-1)


def tv_gradient(student, teacher, temperature=1.0):
    q, p = distributions(student, teacher, temperature)
    return through_softmax(q, 0.5 * np.sign(q - p), temperature)


def soft_ce(student, teacher, temperature=1.0):
    q, p = distributions(student, teacher, temperature)
    return -np.where(p > 0, p * np.log(np.where(p > 0, q, 1.0)), 0.0).sum(axis=-1)


soft_ce_gradient = forward_kl_gradient  # they differ by the teacher's entropy


def ce(logits, labels, label_smoothing=0.0):
    log_q = np.log(softmax(logits))
    hard = np.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
    return -(1 - label_smoothing) * hard - label_smoothing * log_q.mean(axis=-1)


def ce_gradient(logits, labels, label_smoothing=0.0):
    q = softmax(logits)
    classes = q.shape[-1]
    onehot = np.eye(classes)[labels]
    return q - (1 - label_smoothing) * onehot - label_smoothing / classes


def mse(student, teacher, centered=False):
    difference = np.asarray(student, np.float64) - np.asarray(teacher, np.float64)
    if centered:
        difference = difference - difference.mean(axis=-1, keepdims=True)
    return (difference**2).mean(axis=-1)


def mse_gradient(student, teacher, centered=False):
    difference = np.asarray(student, np.float64) - np.asarray(teacher, np.float64)
    if centered:
        difference = difference - difference.mean(axis=-1, keepdims=True)
    return 2 * difference / difference.shape[-1]


def ab(student, teacher, temperature=1.0, teacher_power=0.2, student_power=0.7):
    """The formula of the paper, so for powers whose product and sum are not 0."""
    q, p = distributions(student, teacher, temperature)
    a, b = teacher_power, student_power
    inside = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -inside.sum(axis=-1) / (a * b)


def ab_gradient(
    student, teacher, temperature=1.0, teacher_power=0.2, student_power=0.7
):
    q, p = distributions(student, teacher, temperature)
    a, b = teacher_power, student_power
    g = -(p**a * q ** (b - 1) - q ** (a + b - 1)) / a
    return through_softmax(q, g, temperature)


def akl_weight(q, p, mu):
    """Row by row, in the words of the paper."""
    weights = np.zeros(p.shape[:-1])
    for row in np.ndindex(weights.shape):
        order = sorted(range(p.shape[-1]), key=lambda i: -p[row][i])
        mass, head, tail = 0.0, 0.0, 0.0
        for rank, i in enumerate(order):
            mass += p[row][i]
            gap = abs(p[row][i] - q[row][i])
            if rank == 0 or mass <= mu:
                head += gap
            else:
                tail += gap
        weights[row] = head / (head + tail) if head + tail > 0 else 0.5
    return weights


def akl(student, teacher, temperature=1.0, mu=0.5):
    q, p = distributions(student, teacher, temperature)
    w = akl_weight(q, p, mu)
    return w * kl(p, q) + (1 - w) * kl(q, p)


def akl_gradient(student, teacher, temperature=1.0, mu=0.5):
    q, p = distributions(student, teacher, temperature)
    w = akl_weight(q, p, mu)[..., None]
    reverse = reverse_kl_gradient(student, teacher, temperature)
    return w * (q - p) / temperature + (1 - w) * reverse


def dkd(student, teacher, labels, temperature=1.0, weights=(1.0, 8.0)):
    q, p = distributions(student, teacher, temperature)
    target = np.eye(q.shape[-1], dtype=bool)[labels]
    q_y, p_y = q[target].reshape(labels.shape), p[target].reshape(labels.shape)
    binary = kl(np.stack([p_y, 1 - p_y], -1), np.stack([q_y, 1 - q_y], -1))
    p_hat = np.where(target, 0, p) / (1 - p_y)[..., None]
    q_hat = np.where(target, 1, q / (1 - q_y)[..., None])
    return weights[0] * binary + weights[1] * kl(p_hat, q_hat)


def dkd_gradient(student, teacher, labels, temperature=1.0, weights=(1.0, 8.0)):
    q, p = distributions(student, teacher, temperature)
    target = np.eye(q.shape[-1], dtype=bool)[labels]
    q_y, p_y = (a[target].reshape(labels.shape)[..., None] for a in (q, p))
    q_hat, p_hat = q / (1 - q_y), p / (1 - p_y)
    at_others = -weights[0] * (q_y - p_y) * q_hat + weights[1] * (q_hat - p_hat)
    return np.where(target, weights[0] * (q_y - p_y), at_others) / temperature


def standard(logits, ddof=1):
    logits = np.asarray(logits, np.float64)
    std = logits.std(axis=-1, ddof=ddof, keepdims=True)
    return (logits - logits.mean(axis=-1, keepdims=True)) / std


def standard_kl(student, teacher, temperature=1.0, ddof=1):
    return forward_kl(standard(student, ddof), standard(teacher, ddof), temperature)


def standard_kl_gradient(student, teacher, temperature=1.0, ddof=1):
    z, std = standard(student, ddof), np.std(student, axis=-1, ddof=ddof, keepdims=True)
    g = forward_kl_gradient(z, standard(teacher, ddof), temperature)
    along = (g * z).sum(axis=-1, keepdims=True) / (z.shape[-1] - ddof)
    return (g - g.mean(axis=-1, keepdims=True) - z * along) / std


def ranked_pairs(teacher, k):
    """(row, i, j) for i among the k best of the row and every j below it."""
    for row in np.ndindex(teacher.shape[:-1]):
        v = teacher[row]
        for i in np.argsort(-v, kind="stable")[:k]:
            for j in range(v.size):
                if v[j] < v[i]:
                    yield row, i, j


def hinge(student, teacher, k=5, margin=1.0):
    total, count = np.zeros(student.shape[:-1]), np.zeros(student.shape[:-1])
    for row, i, j in ranked_pairs(teacher, k):
        total[row] += max(0.0, margin - (student[row][i] - student[row][j]))
        count[row] += 1
    return total / np.maximum(count, 1)


def hinge_gradient(student, teacher, k=5, margin=1.0):
    gradient, count = np.zeros_like(student), np.zeros(student.shape[:-1])
    for row, i, j in ranked_pairs(teacher, k):
        count[row] += 1
        if margin - (student[row][i] - student[row][j]) > 0:
            gradient[row][i] -= 1
            gradient[row][j] += 1
    return gradient / np.maximum(count, 1)[..., None]


def sorted_pair(student, teacher, temperature):
    """Both sorted, likeliest first, the shorter one with zeros after it."""
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    size = max(q.shape[-1], p.shape[-1])
    rows = []
    for a in (q, p):
        padded = np.zeros((*a.shape[:-1], size))
        padded[..., : a.shape[-1]] = -np.sort(-a, axis=-1)
        rows.append(padded)
    return q, *rows


def uld(student, teacher, temperature=1.0):
    _, q_sorted, p_sorted = sorted_pair(student, teacher, temperature)
    return np.abs(q_sorted - p_sorted).sum(axis=-1)


def uld_gradient(student, teacher, temperature=1.0):
    q, q_sorted, p_sorted = sorted_pair(student, teacher, temperature)
    rank = np.argsort(np.argsort(-q, axis=-1, kind="stable"), axis=-1)
    g = np.take_along_axis(np.sign(q_sorted - p_sorted), rank, axis=-1)
    return through_softmax(q, g, temperature)


def tail_bucket(student, teacher, temperature, k):
    """Both distributions over the teacher's k best classes and all the others."""
    q, p = distributions(student, teacher, temperature)
    best = np.argsort(-np.asarray(teacher), axis=-1, kind="stable")[..., :k]
    rows = []
    for a in (q, p):
        kept = np.take_along_axis(a, best, axis=-1)
        rest = a.copy()
        np.put_along_axis(rest, best, 0.0, axis=-1)
        rows.append(np.concatenate([kept, rest.sum(-1, keepdims=True)], -1))
    return *rows, best


def bucket_kl(student, teacher, temperature=1.0, k=8):
    q, p, _ = tail_bucket(student, teacher, temperature, k)
    return kl(p, q)


def bucket_kl_gradient(student, teacher, temperature=1.0, k=8):
    """q - p at the ids, q (1 - tail of p / tail of q) elsewhere."""
    q, p, best = tail_bucket(student, teacher, temperature, k)
    gradient = softmax(student, temperature) * (1 - p[..., -1:] / q[..., -1:])
    np.put_along_axis(gradient, best, (q - p)[..., :-1], axis=-1)
    return gradient / temperature


def central_differences(values, x, step=1e-5):
    """Gradient of the sum of ``values(x)``, one coordinate at a time."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        rise = np.sum(values(x + shift)) - np.sum(values(x - shift))
        gradient[index] = rise / (2 * step)
    return gradient
