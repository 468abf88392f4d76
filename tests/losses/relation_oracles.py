"""The relation losses again, in NumPy float64, by loops over pairs and triples.

The points are the rows of features, whatever axes they have before the last. Masks are
the contract's own business.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from tests.losses.oracles import kl, softmax


def rows(x):
    x = np.asarray(x, np.float64)
    return x.reshape(-1, x.shape[-1])


def huber(x):
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def cosine(a, b):
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / lengths if lengths > 0 else 0.0


def matrix(x, similarity):
    return np.array([[similarity(a, b) for b in x] for a in x])


def relative_distances(x):
    distances = matrix(x, lambda a, b: np.linalg.norm(a - b))
    apart = distances[distances > 0]
    return distances / apart.mean() if len(apart) else distances


def rkd_distance(student, teacher):
    gaps = relative_distances(rows(student)) - relative_distances(rows(teacher))
    return np.vectorize(huber)(gaps).mean()


def rkd_angle(student, teacher):
    s, t = rows(student), rows(teacher)
    total = 0.0
    for i, j, k in itertools.permutations(range(len(s)), 3):
        ours, theirs = (cosine(x[i] - x[j], x[k] - x[j]) for x in (s, t))
        total += huber(ours - theirs)
    return total / len(s) ** 3


def unit_rows(gram):
    return np.array([row / np.linalg.norm(row) for row in gram])


def similarity_preserving(student, teacher):
    s, t = rows(student), rows(teacher)
    return ((unit_rows(s @ s.T) - unit_rows(t @ t.T)) ** 2).mean()


def pkt(student, teacher, include_self=True):
    s, t = rows(student), rows(teacher)
    values = []
    for i in range(len(s)):
        near = [j for j in range(len(s)) if include_self or j != i]
        q, p = (np.array([(cosine(x[i], x[j]) + 1) / 2 for j in near]) for x in (s, t))
        values.append(kl(p / p.sum(), q / q.sum()))
    return np.mean(values)


def congruence(student, teacher, gamma=0.4, order=2):
    def kernel(a, b):
        terms = [
            math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * c**p
            for c in [cosine(a, b)]
            for p in range(order + 1)
        ]
        return sum(terms)

    return ((matrix(rows(student), kernel) - matrix(rows(teacher), kernel)) ** 2).mean()


def embedding(student, teacher, temperature=None):
    ours, theirs = matrix(rows(student), cosine), matrix(rows(teacher), cosine)
    if temperature is None:
        return ((ours - theirs) ** 2).mean()
    values = []
    for i in range(len(ours)):
        q = softmax(np.delete(ours[i], i), temperature)
        p = softmax(np.delete(theirs[i], i), temperature)
        values.append(kl(p, q))
    return np.mean(values)


def icc(student, teacher):
    values = []
    for s, t in zip(student, teacher, strict=True):
        s, t = rows(s), rows(t)
        values.append(((unit_rows(s.T @ s) - unit_rows(t.T @ t)) ** 2).mean())
    return np.array(values)


def margin(student, teacher):
    ours = student[..., :1] - student[..., 1:]
    theirs = teacher[..., :1] - teacher[..., 1:]
    return ((ours - theirs) ** 2).mean(axis=-1)


def margin_slope(student, teacher):
    negatives = student.shape[-1] - 1
    gaps = student[..., :1] - student[..., 1:] - (teacher[..., :1] - teacher[..., 1:])
    return np.concatenate([gaps.sum(-1, keepdims=True), -gaps], -1) * 2 / negatives


def dist(student, teacher, temperature=1.0, inter_weight=1.0, intra_weight=1.0):
    q, p = (softmax(rows(x), temperature) for x in (student, teacher))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean(
        [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
    )
    return inter_weight * inter + intra_weight * intra
