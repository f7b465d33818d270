"""Differentially Private Data Publication with Multi-level Data Utility (2021, arXiv:2112.07061).

One vector is published: few random measurements of a sparse vector, noise for differential privacy, and a mask B v on top. What a reader knows of the mask decides how
much of it goes away: all of it (B and v), all of it at the price of some measurements (B alone: the annihilator of B), or nothing.

| symbol | name | shape |
|---|---|---|
| x, alpha, Psi | `x`, `alpha`, `basis` | (n,) data, (n,) its s-sparse coefficients, (n, n) orthonormal columns: x = Psi alpha |
| Phi | `phi` | (m, n) public, entries N(0, 1/m), m < n |
| e, eps, rho | `epsilon`, `rho` | (m,) Laplace or Gaussian noise for the sensitivity of Phi x |
| B, v | `B`, `v` | (m, p) and (p,), secret: entries N(0, 1/m) and N(0, strength^2) |
| z = Phi x + e + B v | `z` | (m,) what is published |
| F | `annihilator(B)` | (m - p, m), orthonormal rows, F B = 0 |

Deviations from the paper: of the encoding only its name could be read. B v with a secret B, the annihilator of the middle reader, the laws of B, v and the choice of noise
are a reconstruction. The decoder is orthogonal matching pursuit (OMP), told the true s; the paper's other decoders are not here.
Cost: m n to publish; s products with an (m, n) matrix and s least-squares problems of at most s unknowns to read.
"""
import numpy as np
from scipy.fft import idct
from scipy.linalg import null_space
from scipy.spatial.distance import pdist

from .mechanisms import check_finite, check_positive, gaussian, laplace, pure_rho
from .oracles import check_rng


def _integer(name, value, low, high, why):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected {low} <= {name} <= {high}, {why}")
    return int(value)


def dct_basis(n) -> np.ndarray:
    """(n, n), columns: the orthonormal cosines, the constant one first."""
    return idct(np.eye(n), norm="ortho", axis=0)


def measurement_sensitivity(phi, order, relation="add") -> float:
    """Largest change of Phi x, in the l1 (order=1) or l2 norm (order=2), where one person moves one unit in one entry of x (relation="add") or from one entry to another ("replace").

    Computed from the very phi that is used: a bound that holds on average over phi protects nobody. Raises ValueError.
    """
    phi = check_finite("phi", phi)
    if order not in (1, 2) or relation not in ("add", "replace"):
        raise ValueError(f"order={order!r}, relation={relation!r}: expected 1 or 2, 'add' or 'replace'")
    if relation == "add":
        return float(np.linalg.norm(phi, order, axis=0).max())
    return float(pdist(phi.T, "cityblock" if order == 1 else "euclidean").max())


def annihilator(B) -> np.ndarray:
    """(m - p, m) with orthonormal rows and F B = 0. Orthonormal, so that white noise stays white and no reader does better with another F. Raises ValueError for p >= m."""
    B = check_finite("B", B)
    if B.ndim != 2 or B.shape[1] >= B.shape[0]:
        raise ValueError(f"B has shape {B.shape}: expected (m, p) with p < m")
    return null_space(B.T).T


def omp(A, y, s) -> np.ndarray:
    """Orthogonal matching pursuit: s times, take the column most correlated with the residual, and fit all taken ones anew by least squares.

    A: (r, n), columns of any norm > 0; y: (..., r), each row a problem of its own; s <= r. Returns alpha (..., n). Raises ValueError/TypeError.
    """
    A, y = check_finite("A", A), check_finite("y", y)
    if A.ndim != 2 or y.ndim < 1 or y.shape[-1] != A.shape[0]:
        raise ValueError(f"A has shape {A.shape}, y {y.shape}: expected (r, n) and (..., r)")
    s = _integer("s", s, 1, min(A.shape), "as many coefficients as A has rows and columns at most")
    norms = np.linalg.norm(A, axis=0)
    if not norms.all():
        raise ValueError(f"A has {np.count_nonzero(norms == 0)} columns of zeros: expected none")
    Y = y.reshape(-1, A.shape[0])                                    # (T, r)
    residual, taken = Y, np.empty((len(Y), 0), dtype=int)
    for _ in range(s):
        score = np.abs(residual @ A) / norms                         # (T, n)
        np.put_along_axis(score, taken, -1.0, axis=1)
        taken = np.append(taken, score.argmax(axis=1)[:, None], axis=1)
        columns = A.T[taken]                                         # (T, j, r)
        q, triangle = np.linalg.qr(columns.transpose(0, 2, 1))
        along = Y[:, None, :] @ q                                    # (T, 1, j)
        residual = Y - (along @ q.transpose(0, 2, 1))[:, 0]
    alpha, fit = np.zeros((len(Y), A.shape[1])), np.linalg.solve(triangle, along.transpose(0, 2, 1))
    np.put_along_axis(alpha, taken, fit[..., 0], axis=1)
    return alpha.reshape(*y.shape[:-1], -1)


class Publisher:
    """Holds the public `phi` and `basis` and the secret `B`, and publishes.

    n, m, p: entries, measurements, dimension of the mask, 1 <= p < m <= n; strength: standard deviation of v; basis: (n, n) orthonormal, cosines by default;
    relation: see `measurement_sensitivity`. Raises ValueError/TypeError.
    """

    def __init__(self, n, m, p, strength=1.0, basis=None, relation="add", rng=None):
        self.n = _integer("n", n, 2, np.inf, "a vector")
        self.m = _integer("m", m, 2, self.n, "no more measurements than entries")
        self.p = _integer("p", p, 1, self.m - 1, "so that measurements are left without the mask")
        self.strength, rng = check_positive("strength", strength), check_rng(rng)
        self.basis = dct_basis(self.n) if basis is None else check_finite("basis", basis)
        if self.basis.shape != (self.n, self.n) or not np.allclose(self.basis.T @ self.basis, np.eye(self.n), atol=1e-8):
            raise ValueError(f"basis has shape {self.basis.shape}: expected ({self.n}, {self.n}) with orthonormal columns")
        self.phi = rng.normal(0.0, self.m**-0.5, (self.m, self.n))
        self.B = rng.normal(0.0, self.m**-0.5, (self.m, self.p))
        self.sensitivity = {order: measurement_sensitivity(self.phi, order, relation) for order in (1, 2)}

    def privatize(self, x, epsilon=None, rho=None, rng=None, grid=None, budget=None):
        """x (n,) -> (z (m,), v (p,)): z is published, v is for top readers.

        Either epsilon: Laplace noise, epsilon-DP; or rho: Gaussian noise, rho-zCDP.
        grid: see `laplace`; budget: a `Budget` that pays, or None.
        Raises ValueError before anything is drawn or spent.
        """
        x, rng = check_finite("x", x), check_rng(rng)
        if x.shape != (self.n,):
            raise ValueError(f"x has shape {x.shape}: expected ({self.n},)")
        if (epsilon is None) == (rho is None) or (rho is not None and grid is not None):
            raise ValueError(f"epsilon={epsilon!r}, rho={rho!r}, grid={grid!r}: expected epsilon "
                             "(with or without grid) or rho")
        cost = pure_rho(epsilon) if rho is None else check_positive("rho", rho)
        grid = grid if grid is None else check_positive("grid", grid)
        if budget is not None:
            budget.spend(cost)
        y = self.phi @ x                         # the only access to the data
        if rho is None:
            y = laplace(y, self.sensitivity[1], epsilon, rng, grid)
        else:
            y = gaussian(y, self.sensitivity[2], rho, rng)
        v = rng.normal(0.0, self.strength, self.p)
        return y + self.B @ v, v


def read(z, phi, s, basis=None, B=None, v=None) -> np.ndarray:
    """What a reader makes of z: with B and v the top one, with B the middle one, with neither the low one.

    z: (..., m); phi: (m, n); s: number of coefficients; basis: (n, n), cosines by default; B: (m, p); v: (..., p). Returns x (..., n). Raises ValueError/TypeError.
    """
    z, phi = check_finite("z", z), check_finite("phi", phi)
    if phi.ndim != 2 or z.ndim < 1 or z.shape[-1] != phi.shape[0]:
        raise ValueError(f"z has shape {z.shape}, phi {phi.shape}: expected (..., m) and (m, n)")
    basis = dct_basis(phi.shape[1]) if basis is None else check_finite("basis", basis)
    A = phi @ basis
    if B is not None and np.shape(B)[:1] != phi.shape[:1]:
        raise ValueError(f"B has shape {np.shape(B)}: expected ({phi.shape[0]}, p)")
    if v is not None:
        if B is None or np.shape(v) != (*z.shape[:-1], np.shape(B)[1]):
            raise ValueError(f"v has shape {np.shape(v)}: expected B (m, p), v (..., p)")
        z = z - check_finite("v", v) @ check_finite("B", B).T        # top: no mask left
    elif B is not None:
        F = annihilator(B)                                           # middle: p rows less
        A, z = F @ A, z @ F.T
    return omp(A, z, s) @ basis.T
