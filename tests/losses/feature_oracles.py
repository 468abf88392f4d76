"""The losses between features again, in NumPy float64, with loops where they are plain.

As in ``oracles.py``: nothing is shared with the package, and no gradient comes from
automatic differentiation. `attention_*` are told the mask, because in them the tokens
of a sequence see each other; all others get the rows that count.
"""

from __future__ import annotations

import numpy as np

from tests.losses.oracles import kl, softmax

# In the tests: raw scales of four channels, of variances from .7 to 10.
RAW_SCALES = np.array([0.0, 1.0, 4.0, 10.0])


def unit(x):
    return x / np.linalg.norm(x)


def hidden_mse(student, teacher):
    return ((student - teacher) ** 2).mean(axis=-1)


def hidden_mse_gradient(student, teacher):
    return 2 * (student - teacher) / student.shape[-1]


def hidden_cosine(student, teacher):
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(axis=-1) / lengths


def hidden_cosine_gradient(student, teacher):
    length = np.linalg.norm(student, axis=-1, keepdims=True)
    s = student / length
    t = teacher / np.linalg.norm(teacher, axis=-1, keepdims=True)
    return -(t - (s * t).sum(axis=-1, keepdims=True) * s) / length


def attention_transfer(student, teacher, power=2.0):
    def look(image):
        return unit((np.abs(image) ** power).sum(axis=-1).ravel())

    pairs = zip(student, teacher, strict=True)
    return np.array([((look(s) - look(t)) ** 2).sum() for s, t in pairs])


def neuron_selectivity(student, teacher):
    def mean_kernel(a, b):
        return np.mean([[np.dot(x, y) ** 2 for y in b] for x in a])

    def channels(image):
        return [unit(image[..., c].ravel()) for c in range(image.shape[-1])]

    values = []
    for s, t in zip(map(channels, student), map(channels, teacher), strict=True):
        values.append(mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t))
    return np.array(values)


def flow_of_solution(student, teacher):
    def flow(image):
        early, late = image[..., :2], image[..., 2:]
        flow = np.zeros((early.shape[-1], late.shape[-1]))
        for row, column in np.ndindex(image.shape[:2]):
            flow += np.outer(early[row, column], late[row, column])
        return flow / (image.shape[0] * image.shape[1])

    pairs = zip(student, teacher, strict=True)
    return np.array([((flow(s) - flow(t)) ** 2).mean() for s, t in pairs])


def activation_boundary(student, teacher, margin=1.0):
    s, t, m = student, teacher, margin
    below = np.where((s > -m) & (t <= 0), (s + m) ** 2, 0.0)
    above = np.where((s <= m) & (t > 0), (s - m) ** 2, 0.0)
    return (below + above).mean(axis=(1, 2, 3))


def vid(student, teacher, raw_scale, epsilon=1e-5):
    variance = np.log1p(np.exp(np.asarray(raw_scale, np.float64))) + epsilon
    terms = (teacher - student) ** 2 / variance + np.log(variance)
    return 0.5 * terms.mean(axis=-1)


def vid_gradient(student, teacher, raw_scale, epsilon=1e-5):
    variance = np.log1p(np.exp(np.asarray(raw_scale, np.float64))) + epsilon
    return (student - teacher) / variance / student.shape[-1]


def linear_cka(student, teacher):
    x, y = (a.reshape(-1, a.shape[-1]) for a in (student, teacher))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.linalg.norm
    return 1 - norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def contrastive(student, teacher, temperature=0.07, queue=None):
    rows = student.reshape(-1, student.shape[-1])
    others = teacher.reshape(-1, teacher.shape[-1])
    values = []
    for i, s in enumerate(rows):
        cosines = [unit(s) @ unit(t) for t in others]
        if queue is not None:
            filled = np.asarray(queue.features, np.float64)[: int(queue.count)]
            cosines += [unit(s) @ t for t in filled]
        values.append(-np.log(softmax(np.array(cosines), temperature)[i]))
    return np.reshape(values, student.shape[:-1])


def attention_relation(student, teacher, num_relation_heads, where=None):
    def relation(tokens, head):
        width = tokens.shape[-1] // num_relation_heads
        part = tokens[:, head * width : (head + 1) * width]
        return softmax(part @ part.T / np.sqrt(width))

    values = np.zeros(student.shape[:2])
    for b in range(len(student)):
        keep = np.ones(student.shape[1], bool) if where is None else where[b]
        if not keep.any():
            continue
        for h in range(num_relation_heads):
            r_s, r_t = (relation(x[b][keep], h) for x in (student, teacher))
            values[b, keep] += kl(r_t, r_s) / num_relation_heads
    return values


def scores_of(x):
    """[batch, time, heads * time] as attention scores [batch, heads, time, time]."""
    batch, time, width = x.shape
    return x.reshape(batch, time, width // time, time).swapaxes(1, 2)


def attention_map_kl(student, teacher, where=None):
    student, teacher = scores_of(student), scores_of(teacher)
    batch, heads, time, _ = student.shape
    values = np.zeros((batch, time))
    for b in range(batch):
        keep = np.ones(time, bool) if where is None else where[b]
        for h in range(heads):
            for query in np.flatnonzero(keep):
                q, p = (softmax(x[b, h, query][keep]) for x in (student, teacher))
                values[b, query] += kl(p, q) / heads
    return values
