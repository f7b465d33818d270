"""Gradient Multi-Normalization for Stateless and Scalable LLM Training (2025), arXiv:2502.06742.

A gradient matrix is normalized in several norms at once, by taking turns, and the step follows what comes out: no
momentum, no second moment, no state. Implemented: the alternating scheme for any of the chapter's normalizers (`MNGD`),
SinkGD (rows and columns, 5 rounds) and SWAN (rows, then the spectrum, 1 round).

    symbol       name                    shape
    theta        params                  any; read as [first axis, all others]
    nabla        grads                   as params
    X            X                       [..., m, n]
    P_g          NORMALIZERS[name]       [..., m, n] -> [..., m, n], of size |P_g(X)|_F = sqrt(m n)
    g_1..g_K     norms                   names of normalizers, in the order of a round
    L            rounds                  int >= 0; 0 is plain gradient descent
    eta          lr                      float

Deviations from the paper: it gives vectors, embeddings and the output layer to Adam. Here a vector is a matrix of one
row: for SinkGD that makes its step the sign of the gradient. The paper divides by norms as they are; here a zero
row or column stays zero. A method without state has none here either: nothing but the count of steps is kept.

Cost: SinkGD 2 L passes over the gradient, O(L m n); SWAN one pass and O(min(m, n) m n) for the eigenvectors.
"""
import torch

from lib.optimizers.base import Batch, Optimizer, count
from lib.optimizers.matrices import NORMALIZERS, on_matrices


def known_norms(name: str, value) -> None:
    """`ValueError` unless value is a tuple or list of one or more names of normalizers."""
    if not isinstance(value, (tuple, list)) or not value or any(norm not in NORMALIZERS for norm in value):
        raise ValueError(f"{name} must be one or more of {', '.join(NORMALIZERS)}, got {value!r}")


def multinormalize(X: torch.Tensor, norms: tuple[str, ...] = ("row", "column"), rounds: int = 5) -> torch.Tensor:
    """`rounds` times: X <- P_g(X) for each norm g in its turn.  [..., m, n] -> [..., m, n]"""
    for _ in range(rounds):  # Alg. 1
        for norm in norms:
            X = NORMALIZERS[norm](X)
    return X


def gap(X: torch.Tensor, norms: tuple[str, ...] = ("row", "column")) -> torch.Tensor:
    """How far X is from a fixed point of all projections: the largest |X - P_g(X)|_F / |X|_F.  [..., m, n] -> [...]"""
    far = [torch.linalg.matrix_norm(X - NORMALIZERS[norm](X)) for norm in norms]
    return torch.stack(far).amax(0) / torch.linalg.matrix_norm(X)


class MNGD(Optimizer):
    """Gradient descent along multi-normalized gradients; raises `ValueError` or `TypeError` naming a bad option."""

    checks = {"norms": known_norms, "rounds": count}

    def __init__(self, params, lr=1e-3, norms=("row", "column"), rounds=5, *, maximize=False):
        super().__init__(params, lr=lr, norms=norms, rounds=rounds, maximize=maximize)

    def buffers(self, group):
        return ()

    def update(self, batch: Batch, group: dict) -> None:
        X = on_matrices(lambda G: multinormalize(G, group["norms"], group["rounds"]), batch.grads)
        torch._foreach_add_(batch.params, X, alpha=-group["lr"])  # theta <- theta - eta X^(L)


class SinkGD(MNGD):
    """Rows to norm sqrt(n), then columns to norm sqrt(m), `rounds` times: Sinkhorn's algorithm on the squared gradient."""

    def __init__(self, params, lr=1e-3, rounds=5, *, maximize=False):
        super().__init__(params, lr, ("row", "column"), rounds, maximize=maximize)


class SWAN(MNGD):
    """Rows to norm sqrt(n), then the whole matrix whitened, sqrt(n) (X X^T)^(-1/2) X for m <= n, once."""

    def __init__(self, params, lr=1e-3, rounds=1, *, maximize=False):
        super().__init__(params, lr, ("row", "spectral"), rounds, maximize=maximize)
