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


def central_differences(values, x, step=1e-5):
    """Gradient of the sum of ``values(x)``, one coordinate at a time."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        rise = np.sum(values(x + shift)) - np.sum(values(x - shift))
        gradient[index] = rise / (2 * step)
    return gradient
