"""Matrix normalizers: what is left of a matrix when the size of its entries, rows, columns or singular values is taken away.

Every function takes X [..., m, n], acts on the last two axes, and leaves alone what has no direction: a zero row stays
zero. The images of the first five have one common size, |Y|_F = sqrt(m n) (every entry 1 in the mean square), as long
as X has no zero row, column, entry or singular value. So they can be exchanged at one learning rate, and alternated:

    frobenius   sqrt(m n) X / |X|_F                 sign        the entries become +-1
    row         every row gets norm sqrt(n)         column      every column gets norm sqrt(m)
    spectral    all singular values become sqrt(max(m, n)); exact, by eigenvectors of the smaller Gram matrix
    newton_schulz    all singular values come near 1, by matrix products alone

`as_matrix` reads a parameter of any shape as a matrix, and `stacks` gathers equal shapes, so that one call serves all.
"""
import math
from collections.abc import Callable, Iterator

import torch

Tensors = list[torch.Tensor]
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at zero; from 0.01 on, singular values end in 0.68 .. 1.14
CUBIC_COEFFICIENTS = (1.5, -0.5, 0.0)  # Newton and Schulz: slow from small singular values, but it converges to 1


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """[first axis, all others], as for a convolution's [out, in * height * width]; a vector is one row."""
    return x.flatten(1) if x.ndim > 1 else x.reshape(1, -1)


def stacks(tensors: Tensors) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(positions, matrices [k, m, n]) for each shape in the list, in at least float32; empty tensors are left out."""
    places: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(tensors):
        if x.numel():
            places.setdefault(x.shape, []).append(i)
    for where in places.values():
        X = torch.stack([as_matrix(tensors[i]) for i in where])
        yield where, X.to(torch.promote_types(X.dtype, torch.float32))


def on_matrices(f: Callable[[torch.Tensor], torch.Tensor], tensors: Tensors) -> Tensors:
    """f over each tensor as a matrix: new tensors in the shapes and dtypes of the old ones."""
    out = [torch.zeros_like(x) for x in tensors]
    for where, X in stacks(tensors):
        for i, y in zip(where, f(X), strict=True):
            out[i] = y.reshape(tensors[i].shape).to(tensors[i].dtype)
    return out


def _over(X: torch.Tensor, norm: torch.Tensor, size: float) -> torch.Tensor:
    return X * (size / norm.masked_fill(norm == 0.0, math.inf))


def frobenius(X: torch.Tensor) -> torch.Tensor:
    """sqrt(m n) X / |X|_F."""
    return _over(X, torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True), math.sqrt(X.shape[-2] * X.shape[-1]))


def row(X: torch.Tensor) -> torch.Tensor:
    """Each row gets the norm sqrt(n)."""
    return _over(X, torch.linalg.vector_norm(X, dim=-1, keepdim=True), math.sqrt(X.shape[-1]))


def column(X: torch.Tensor) -> torch.Tensor:
    """Each column gets the norm sqrt(m)."""
    return _over(X, torch.linalg.vector_norm(X, dim=-2, keepdim=True), math.sqrt(X.shape[-2]))


def spectral(X: torch.Tensor) -> torch.Tensor:
    """sqrt(max(m, n)) U V^T for X = U S V^T; singular values that are rounding errors of zero become zero."""
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # now m <= n
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    squares, U = torch.linalg.eigh(X @ X.mT)  # (X X^T)^(-1/2) X, in the basis in which X X^T is diagonal
    noise = X.shape[-1] * torch.finfo(X.dtype).eps * squares[..., -1:].clamp_min(torch.finfo(X.dtype).tiny)
    scale = squares.clamp_min(0.0).rsqrt().masked_fill(squares <= noise, 0.0) * math.sqrt(X.shape[-1])
    Y = (U * scale.unsqueeze(-2)) @ (U.mT @ X)
    return Y.mT if tall else Y


def newton_schulz(X: torch.Tensor, steps: int = 5, coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
                  eps: float = 1e-7) -> torch.Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, from X / (|X|_F + eps): U f(S) V^T, where f drives S towards 1."""
    a, b, c = coefficients
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # the Gram matrix of the shorter side
    X = X / (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


NORMALIZERS = {"frobenius": frobenius, "row": row, "column": column, "spectral": spectral, "sign": torch.sign}
