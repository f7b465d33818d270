"""Improved Analysis of Sparse Linear Regression in Local Differential Privacy Model (2023, arXiv:2310.07367).

y = <x, theta> + noise, theta with k nonzero entries; nobody shows x or y to anyone. *Non-interactive*: half of the people send a noisy x x^T, half a noisy x y; the server solves
and soft-thresholds. *Sequentially interactive*: in every round new people send a randomized gradient, and the server takes a step of iterative hard thresholding (LDP-IHT).

| symbol | name | shape |
|---|---|---|
| x, y | `X`, `y` | (n, d), (n,): one row a person |
| r, r' | `r`, `r_y` | what entries of x, and y, are clipped to |
| D | `covariance_sensitivity`, `cross_sensitivity` | of the upper triangle of x x^T (d (d + 1) / 2 numbers), and of x y |
| Upsilon, upsilon | `sd` | standard deviation of one person's noise, an entry |
| Sigma, b | `release(...)` | (d, d), (d,) |
| lambda_n | `threshold(n)` | scalar |
| B | `bound` | most that the norm of a gradient can be |
| k', T, eta | `k`, `rounds`, `lr` | entries that IHT keeps, number of rounds, step size |

Deviations from the paper: of the paper its abstract and three reviews could be read. Clipping each factor, symmetric noise, the plug-in with soft threshold, and IHT with a
pure-eps randomizer are theirs; constants are ours: sensitivities proved on the page and attained, Gaussian noise by the chapter's zCDP account (any eps) or Laplace noise
(delta = 0), lambda_n from the noise level for an identity covariance and |theta| <= 1, B from the server's own theta instead of an assumed l1 bound, a floor under the eigenvalues
of Sigma. The randomizer is that of Duchi, Jordan and Wainwright (2018).
Cost: n d^2 for the moments, d^3 for the server; n d for all rounds of IHT. Means of n noises are drawn at once, with exactly their law.
"""
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from .mechanisms import check_finite, check_positive, gaussian_sigma, soft_threshold, zcdp_rho
from .oracles import check_epsilon, check_rng


def _integer(name, value, low, high) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected {low} <= {name} <= {high}")
    return int(value)


def _people(X, y, d=None):
    X, y = np.asarray(X), check_finite("y", y)
    if X.ndim != 2 or X.shape[1] != (d or X.shape[1]) or y.shape != X.shape[:1] or len(y) < 2:
        raise ValueError(f"X has shape {X.shape}, y {y.shape}: expected (n, {d or 'd'}) and (n,) with n >= 2")
    return (X, y) if X.dtype.kind in "iub" else (check_finite("X", X), y)


def covariance_sensitivity(d, r, order) -> float:
    """Most that the upper triangle of x x^T changes, in the l1 or l2 norm, between any two x in [-r, r]^d. Attained: (r, ..., r) and 0 (l1), orthogonal sign vectors (l2, d even)."""
    return r * r * {1: d * (d + 1) / 2, 2: d}[_integer("order", order, 1, 2)]


def cross_sensitivity(d, r, r_y, order) -> float:
    """The same for x y with |y| <= r_y. Attained by (x, y) and (x, -y) at a corner."""
    return 2 * r * r_y * {1: d, 2: math.sqrt(d)}[_integer("order", order, 1, 2)]


@dataclass(frozen=True)
class Moments:
    """Sums over people of clipped moments; not private. Add those of several chunks."""
    covariance: np.ndarray         # (d, d), over the first n_covariance people
    cross: np.ndarray              # (d,), over the other n_cross
    n_covariance: int
    n_cross: int

    def __add__(self, other):
        return Moments(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


class NonInteractive:
    """Everyone sends one message, once. With delta Gaussian noise, (epsilon, delta)-LDP; without, Laplace noise, epsilon-LDP. Raises ValueError/TypeError."""

    def __init__(self, d, epsilon, delta=None, r=1.0, r_y=1.0):
        self.d, self.epsilon, self.delta = _integer("d", d, 1, math.inf), check_epsilon(epsilon), delta
        self.r, self.r_y = check_positive("r", r), check_positive("r_y", r_y)
        order, self.upper = 1 if delta is None else 2, np.triu_indices(self.d)
        change = covariance_sensitivity(self.d, self.r, order), cross_sensitivity(self.d, self.r, self.r_y, order)
        if delta is None:
            self.sd = tuple(math.sqrt(2) * c / self.epsilon for c in change)
        else:
            self.sd = tuple(gaussian_sigma(c, zcdp_rho(self.epsilon, delta)) for c in change)

    def _noise(self, sd, shape, rng, n=1):
        """The sum of n people's noises: a Gaussian, or a difference of two Gamma(n)."""
        if self.delta is None:
            return sd / math.sqrt(2) * (rng.gamma(n, size=shape) - rng.gamma(n, size=shape))
        return rng.normal(0.0, sd * math.sqrt(n), shape)

    def privatize(self, X, y, rng=None):
        """Reports of the first half, (n // 2, d (d + 1) / 2): upper triangles; and of the second half, (n - n // 2, d)."""
        X, y = _people(X, y, self.d)
        rng, half = check_rng(rng), len(y) // 2
        X, y = np.clip(X, -self.r, self.r), np.clip(y, -self.r_y, self.r_y)      # factors, not products
        i, j = self.upper
        first, second = X[:half, i] * X[:half, j], X[half:] * y[half:, None]
        return first + self._noise(self.sd[0], first.shape, rng), second + self._noise(self.sd[1], second.shape, rng)

    def moments(self, X, y) -> Moments:
        """What the reports of these people would have as sums, without noise."""
        X, y = _people(X, y, self.d)
        half, X, y = len(y) // 2, np.clip(X, -self.r, self.r).astype(float), np.clip(y, -self.r_y, self.r_y)
        return Moments(X[:half].T @ X[:half], X[half:].T @ y[half:], half, len(y) - half)

    def release(self, moments, rng=None):
        """(Sigma (d, d), b (d,)): the means of all reports, in the law that `privatize` gives them, but drawn at once."""
        if not isinstance(moments, Moments):
            raise TypeError(f"moments={moments!r}: expected Moments")
        rng, noise = check_rng(rng), np.zeros((self.d, self.d))
        noise[self.upper] = self._noise(self.sd[0], len(self.upper[0]), rng, moments.n_covariance)
        noise = np.triu(noise) + np.triu(noise, 1).T
        b = moments.cross + self._noise(self.sd[1], self.d, rng, moments.n_cross)
        return (moments.covariance + noise) / moments.n_covariance, b / moments.n_cross

    def mean(self, reports):
        """(Sigma, b) from reports that people sent."""
        first, second = (check_finite("reports", part) for part in reports)
        sigma = np.zeros((self.d, self.d))
        sigma[self.upper] = first.mean(axis=0)
        return sigma + np.triu(sigma, 1).T, second.mean(axis=0)

    def threshold(self, n, multiplier=1.0, public=False) -> float:
        """lambda_n: multiplier sqrt(2 ln d) times the noise of an entry of the plug-in, for an identity covariance and |theta| <= 1; `public`: of b alone."""
        variance = self.sd[1] ** 2 + (0 if public else self.sd[0] ** 2)
        return multiplier * math.sqrt(2 * math.log(max(self.d, 2)) * variance / (n / 2))


def plug_in(sigma, b, floor=0.0) -> tuple[np.ndarray, int]:
    """(Sigma^-1 b, number of eigenvalues of Sigma that were below `floor` and raised to it). sigma: (d, d) symmetric; b: (d,). Raises ValueError for a singular result."""
    sigma, b = check_finite("sigma", sigma), check_finite("b", b)
    if b.ndim != 1 or sigma.shape != (b.size, b.size) or not np.allclose(sigma, sigma.T):
        raise ValueError(f"sigma has shape {sigma.shape}, b {b.shape}: expected a symmetric (d, d) and (d,)")
    if not floor >= 0:
        raise ValueError(f"floor={floor!r}: expected a number >= 0")
    values, vectors = np.linalg.eigh(sigma)
    low = values < floor
    values = np.where(low, floor, values)
    if not np.abs(values).min() > 0:
        raise ValueError(f"sigma has an eigenvalue of {values[np.abs(values).argmin()]}: expected none, or a floor > 0")
    return vectors @ ((vectors.T @ b) / values), int(low.sum())


def sparse_estimate(sigma, b, threshold, floor=0.1) -> np.ndarray:
    """Soft-thresholded plug-in (d,): the closed form of the elementary estimator, which needs no k. Raises ValueError."""
    return soft_threshold(plug_in(sigma, b, floor)[0], threshold)


class L2Randomizer:
    """Pure eps-LDP for vectors of norm <= bound in R^d: a random point of a sphere, more likely on the side of the vector; unbiased."""

    def __init__(self, d, epsilon):
        self.d, self.epsilon = _integer("d", d, 1, math.inf), check_epsilon(epsilon)
        self.truth = 1 / (1 + math.exp(-self.epsilon))                        # e^eps / (e^eps + 1)
        log = gammaln((d + 1) / 2) - gammaln(d / 2)
        self.stretch = math.sqrt(math.pi) * math.exp(log) / math.tanh(self.epsilon / 2)

    def privatize(self, V, bound, rng=None) -> np.ndarray:
        """V: (n, d), norms <= bound -> (n, d), all of norm `bound * stretch`.

        Raises ValueError for a longer row: clip before.
        """
        V, bound = check_finite("V", V), check_positive("bound", bound)
        rng = check_rng(rng)
        norm = np.linalg.norm(V, axis=-1) if V.ndim == 2 else None
        if norm is None or V.shape[1] != self.d:
            raise ValueError(f"V has shape {V.shape}: expected (n, {self.d})")
        if (norm > bound * (1 + 1e-9)).any():
            raise ValueError(f"V has a row of norm {norm.max():.4g}, bound={bound:.4g}")
        u = rng.normal(size=V.shape)
        u /= np.linalg.norm(u, axis=1, keepdims=True)             # uniform on the sphere
        plus = rng.random(len(V)) < 0.5 + norm / (2 * bound)      # round v to +-v / |v|
        near = rng.random(len(V)) < self.truth                    # stay on that side?
        side = np.where(plus == near, 1.0, -1.0)
        flip = np.where(np.einsum("ij,ij->i", u, V) >= 0, side, -side)
        return u * (flip * bound * self.stretch)[:, None]

    def density(self, u, V, bound) -> np.ndarray:
        """Density at direction u (m, d) for each v of V (n, d), relative to the uniform law on the sphere: (n, m)."""
        plus = 0.5 + np.linalg.norm(V, axis=1) / (2 * bound)
        same = plus * self.truth + (1 - plus) * (1 - self.truth)
        return 2 * np.where(V @ u.T >= 0, same[:, None], 1 - same[:, None])


def hard_threshold(theta, k) -> np.ndarray:
    """theta (d,) with all but its k largest entries (in absolute value) set to 0."""
    theta = check_finite("theta", theta)
    out = np.zeros_like(theta)
    keep = np.argsort(-np.abs(theta), kind="stable")[:_integer("k", k, 1, theta.size)]
    out[keep] = theta[keep]
    return out


def groups(n, rounds) -> list[slice]:
    """Disjoint groups of people, one a round: whoever has answered is not asked again."""
    edges = np.linspace(0, _integer("n", n, 1, math.inf), _integer("rounds", rounds, 1, n) + 1).astype(int)
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:])]


def ldp_iht(X, y, epsilon, k, rounds, r=1.0, r_y=1.0, lr=1.0, radius=math.inf, rng=None, batch=65536) -> np.ndarray:
    """LDP-IHT: theta after each round, (rounds + 1, d), from theta_0 = 0. Each person answers once, with all of epsilon.

    k: entries to keep; lr: step size; radius: theta is scaled back into a ball of this radius. Raises ValueError/TypeError before anything is drawn.
    """
    X, y = _people(X, y)
    d = X.shape[1]
    randomizer, rng, k = L2Randomizer(d, epsilon), check_rng(rng), _integer("k", k, 1, d)
    r, r_y, lr = check_positive("r", r), check_positive("r_y", r_y), check_positive("lr", lr)
    batch = _integer("batch", batch, 1, math.inf)
    if not radius > 0:
        raise ValueError(f"radius={radius!r}: expected a number > 0")
    path = [np.zeros(d)]
    for group in groups(len(y), rounds):
        theta, total = path[-1], np.zeros(d)
        bound = math.sqrt(d) * r * (r * np.abs(theta).sum() + r_y)    # B: public
        for start in range(group.start, group.stop, batch):
            part = slice(start, min(start + batch, group.stop))
            x = np.clip(X[part], -r, r)
            residual = x @ theta - np.clip(y[part], -r_y, r_y)
            sent = randomizer.privatize(x * residual[:, None], bound, rng)
            total += sent.sum(axis=0)
        step = hard_threshold(theta - lr * total / (group.stop - group.start), k)
        path.append(step * min(1.0, radius / max(np.linalg.norm(step), 1e-300)))
    return np.array(path)
