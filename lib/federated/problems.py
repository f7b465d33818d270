"""What the clients want to learn: objectives whose gradients are computed for many clients in one call.

A problem has `n_clients`, `dim`, `gradient(x, clients, rng)` with x of shape (n, dim), one row for each of the n clients
named in `clients`, and `loss(x)`, the plain mean of all the clients' objectives at one x of shape (dim,).
"""
import numpy as np


class Quadratics:
    """F_n(x) = 1/2 (x - c_n)' A_n (x - c_n): clients that disagree, with the compromise in closed form.

    centers: (n_clients, dim). curvature: (n_clients, dim, dim) symmetric positive definite, the identity by default.
    noise: standard deviation of each coordinate of a stochastic gradient.
    """

    def __init__(self, centers, curvature=None, noise: float = 0.0):
        c = np.asarray(centers, dtype=float)
        if c.ndim != 2 or c.size == 0 or not np.isfinite(c).all():
            raise ValueError(f"centers must be finite with shape (n_clients, dim), neither of them 0, got shape {c.shape}")
        a = np.broadcast_to(np.eye(c.shape[1]), (*c.shape, c.shape[1])) if curvature is None else np.asarray(curvature, float)
        if a.shape != (*c.shape, c.shape[1]) or not np.allclose(a, a.swapaxes(1, 2)) or not (np.linalg.eigvalsh(a) > 0).all():
            raise ValueError(f"curvature must be symmetric positive definite with shape {(*c.shape, c.shape[1])}")
        if not 0.0 <= noise < np.inf:
            raise ValueError(f"noise must be finite and >= 0, got {noise!r}")
        self.centers, self.noise = c, noise
        self.curvature = None if curvature is None else a  # None: the identity, which needs no product
        self.n_clients, self.dim = c.shape

    def gradient(self, x, clients, rng) -> np.ndarray:
        g = x - self.centers[clients]
        if self.curvature is not None:
            g = np.einsum("nij,nj->ni", self.curvature[clients], g)
        return g + self.noise * rng.standard_normal(g.shape) if self.noise else g

    def loss(self, x) -> float:
        gap = x - self.centers
        g = gap if self.curvature is None else np.einsum("nij,nj->ni", self.curvature, gap)
        return 0.5 * float((gap * g).sum(axis=1).mean())

    def optimum(self, weights=None) -> np.ndarray:
        """The minimiser of sum_n weights_n F_n; equal weights by default."""
        w = np.ones(self.n_clients) if weights is None else np.asarray(weights, dtype=float)
        if w.shape != (self.n_clients,) or not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
            raise ValueError(f"weights must be {self.n_clients} finite numbers >= 0, not all 0, got {w}")
        if self.curvature is None:
            return w @ self.centers / w.sum()
        pull = np.einsum("nij,nj->ni", self.curvature, self.centers)
        return np.linalg.solve(np.einsum("n,nij->ij", w, self.curvature), w @ pull)


class SoftmaxRegression:
    """Multinomial logistic regression on samples that are spread over the clients.

    features: (n_samples, n_features), labels: (n_samples,) in 0..n_classes-1, owner: (n_samples,) the client of a sample.
    x holds the weights and the biases, (n_features + 1) * n_classes numbers. Mini-batches are drawn with replacement.
    """

    def __init__(self, features, labels, owner, n_clients: int, n_classes: int, batch: int = 16, l2: float = 1e-3):
        features, labels, owner = np.asarray(features, dtype=float), np.asarray(labels), np.asarray(owner)
        if features.ndim != 2 or not np.isfinite(features).all() or not len(features) == len(labels) == len(owner):
            raise ValueError(f"features must be finite with shape (n_samples, n_features), labels and owner as long, got "
                             f"{features.shape}, {labels.shape}, {owner.shape}")
        self.counts = np.bincount(owner, minlength=n_clients)
        if n_clients < 1 or len(self.counts) != n_clients or not self.counts.all():
            raise ValueError(f"owner must give each of the n_clients={n_clients} clients at least one sample")
        if labels.min() < 0 or labels.max() >= n_classes:
            raise ValueError(f"labels must lie in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")
        self.features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        self.truth = np.eye(n_classes)[labels]  # (n_samples, n_classes)
        self.labels, self.owner, self.batch, self.l2 = labels, owner, batch, l2
        self.order, self.first = np.argsort(owner, kind="stable"), np.cumsum(self.counts) - self.counts
        self.n_clients, self.n_classes, self.dim = n_clients, n_classes, self.features.shape[1] * n_classes

    def gradient(self, x, clients, rng) -> np.ndarray:
        pick = (rng.random((len(clients), self.batch)) * self.counts[clients, None]).astype(int)
        pick = self.order[self.first[clients, None] + pick]  # (n, batch)
        a, w = self.features[pick], x.reshape(len(clients), -1, self.n_classes)
        miss = _softmax(a @ w) - self.truth[pick]  # (n, batch, classes)
        return (a.swapaxes(1, 2) @ miss / self.batch + self.l2 * w).reshape(x.shape)

    def loss(self, x) -> float:
        p = _softmax(self.features @ x.reshape(-1, self.n_classes))[np.arange(len(self.labels)), self.labels]
        mine = np.bincount(self.owner, weights=-np.log(np.maximum(p, 1e-300)), minlength=self.n_clients) / self.counts
        return float(mine.mean()) + 0.5 * self.l2 * float(x @ x)

    def accuracy(self, x, features, labels) -> float:
        """Share of right answers on other samples."""
        w = x.reshape(-1, self.n_classes)
        return float((np.argmax(features @ w[:-1] + w[-1], axis=1) == labels).mean())


def _softmax(z) -> np.ndarray:
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def dirichlet_split(labels, n_clients: int, alpha: float, rng: np.random.Generator, least: int = 1) -> np.ndarray:
    """The owner of each sample, shape (n_samples,): clients with tastes of their own.

    Client n draws its taste q_n ~ Dirichlet(alpha, ..., alpha) over the labels; a sample of label y goes to client n with
    probability q_n[y] / sum_m q_m[y]. Clients left with fewer than `least` samples take random ones from the largest.
    """
    labels = np.asarray(labels)
    if isinstance(n_clients, bool) or not isinstance(n_clients, (int, np.integer)) or n_clients < 1:
        raise ValueError(f"n_clients must be an integer >= 1, got {n_clients!r}")
    if not 0.0 < alpha < np.inf:
        raise ValueError(f"alpha must be finite and > 0, got {alpha!r}")
    if labels.ndim != 1 or len(labels) < n_clients * least:
        raise ValueError(f"labels must hold at least {n_clients * least} samples, got shape {labels.shape}")
    kinds, label = np.unique(labels, return_inverse=True)
    taste = rng.dirichlet(np.full(len(kinds), alpha), size=n_clients) + 1e-12  # (n_clients, kinds); no label without a taker
    upto = np.cumsum(taste, axis=0) / taste.sum(axis=0)
    owner = (rng.random(len(labels))[:, None] > upto.T[label]).sum(axis=1)  # (n_samples,)
    owner = np.minimum(owner, n_clients - 1)
    while (size := np.bincount(owner, minlength=n_clients)).min() < least:
        owner[rng.choice(np.flatnonzero(owner == size.argmax()))] = size.argmin()
    return owner


def label_shares(labels, owner, n_clients: int) -> np.ndarray:
    """(n_clients, n_labels): which part of a client's samples has which label."""
    kinds, label = np.unique(labels, return_inverse=True)
    table = np.bincount(owner * len(kinds) + label, minlength=n_clients * len(kinds)).reshape(n_clients, -1)
    return table / np.maximum(table.sum(axis=1, keepdims=True), 1)
