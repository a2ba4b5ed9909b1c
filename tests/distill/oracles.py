"""The papers' equations in plain NumPy, row by row."""

from __future__ import annotations

import numpy as np


def softmax(z, T=1.0):
    e = np.exp((z - z.max(-1, keepdims=True)) / T)
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z, y, smoothing=0.0):
    """Szegedy et al., 2016: the target is (1-s) onehot + s/K. Rows of label -1 are not there."""
    rows = [i for i, label in enumerate(y) if label != -1]
    if not rows:
        return 0.0
    log_p, K, total = np.log(softmax(z)), z.shape[1], 0.0
    for i in rows:
        q = np.full(K, smoothing / K)
        q[y[i]] += 1 - smoothing
        total -= (q * log_p[i]).sum()
    return total / len(rows)


def hinton(zs, members, shares, y, T, a, mean="arithmetic"):
    """Hinton et al., 2015: soft targets at T, T^2 before their term, hard targets at 1."""
    if mean == "arithmetic":
        p = sum(w * softmax(z, T) for w, z in zip(shares, members, strict=True))
    else:
        logs = sum(w * np.log(softmax(z, T)) for w, z in zip(shares, members, strict=True))
        p = np.exp(logs) / np.exp(logs).sum(-1, keepdims=True)
    q = softmax(zs, T)
    kl = [
        sum(pc * np.log(pc / qc) for pc, qc in zip(pr, qr, strict=True)) for pr, qr in zip(p, q, strict=True)
    ]
    return (1 - a) * cross_entropy(zs, y) + a * T * T * np.mean(kl)


def mimic(zs, zt, mu=None, sigma=None):
    """Ba and Caruana, 2014: a regression of logits, 1/2 of the squares."""
    total = 0.0
    for s, t in zip(zs, zt, strict=True):
        t = t - t.mean()
        if mu is not None:
            t = (t - mu) / sigma
        total += 0.5 * ((s - t) ** 2).sum()
    return total / zs.size


def hint(guided, target):
    """Romero et al., 2015, equation 3, of a batch: the mean over examples."""
    return np.mean([0.5 * ((g - t) ** 2).sum() for g, t in zip(guided, target, strict=True)])


def attention(fs, ft):
    """Zagoruyko and Komodakis, 2017: sum of squares over channels, vectorised, divided by its norm."""

    def q(f):
        a = (f**2).sum(0).ravel()
        return a / np.sqrt((a**2).sum())

    return np.mean([(q(s) - q(t)) ** 2 for s, t in zip(fs, ft, strict=True)])


def factor(fs, ft):
    """Kim et al., 2018, equation 2 with p = 1, over the elements."""

    def n(f):
        return f.ravel() / np.sqrt((f**2).sum())

    return np.mean([np.abs(n(t) - n(s)) for s, t in zip(fs, ft, strict=True)])


def kl(p, q):
    """The mean over rows of KL(p | q)."""
    return np.mean(
        [sum(a * np.log(a / b) for a, b in zip(pr, qr, strict=True)) for pr, qr in zip(p, q, strict=True)]
    )


def mutual(logits, y, weight):
    """Zhang et al., 2018, equation 8."""
    total = 0.0
    for i, z in enumerate(logits):
        others = [kl(softmax(p), softmax(z)) for j, p in enumerate(logits) if j != i]
        total += cross_entropy(z, y) + weight * sum(others) / (len(logits) - 1)
    return total


def one(each, gate, y, T, weight):
    """Lan et al., 2018, equations 3 to 7."""
    ensemble = sum(gate[:, b : b + 1] * z for b, z in enumerate(each))
    total = cross_entropy(ensemble, y)
    for z in each:
        total += cross_entropy(z, y) + weight * T * T * kl(softmax(ensemble, T), softmax(z, T))
    return total, ensemble


def kdgan(zc, zt, sc, st, d, y, alpha, beta, gamma):
    """Wang et al., 2018, with the classifier's labels; ``d(x's labels)`` gives D's logits; -log sigmoid."""

    def true(score):
        return np.log1p(np.exp(-score))

    def false(score):
        return np.log1p(np.exp(score))

    onehot = np.eye(zc.shape[1])[np.maximum(y, 0)]
    known = y != -1
    D = (true(d(onehot)) * known).sum() / max(known.sum(), 1)
    D += alpha * false(d(sc)).mean() + (1 - alpha) * false(d(st)).mean()
    C = cross_entropy(zc, y) + alpha * true(d(sc)).mean() + beta * kl(softmax(zt), softmax(zc))
    T = cross_entropy(zt, y) + (1 - alpha) * true(d(st)).mean() + gamma * kl(softmax(zc), softmax(zt))
    return C, T, D


def apprentice(zt, za, y, alpha, beta, gamma):
    """Mishra and Marr, 2018, equation 1."""
    H = -np.mean((softmax(zt) * np.log(softmax(za))).sum(1))
    return alpha * cross_entropy(zt, y) + beta * cross_entropy(za, y) + gamma * H
