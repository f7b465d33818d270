"""The matrix normalizers against the SVD, against one another, and on what has no direction."""
import math

import pytest
import torch

from lib.optimizers.matrices import (CUBIC_COEFFICIENTS, MUON_COEFFICIENTS, NORMALIZERS, as_matrix, column, frobenius,
                                     newton_schulz, on_matrices, row, spectral, stacks)

SHAPES = [(3, 3), (4, 7), (7, 4), (1, 5), (5, 1), (1, 1), (64, 32)]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_images_have_one_size_and_stay_where_they_are(name, shape):
    X = gaussian(*shape)
    Y = NORMALIZERS[name](X)
    assert torch.linalg.matrix_norm(Y).item() == pytest.approx(math.sqrt(X.numel()), rel=1e-12)
    torch.testing.assert_close(NORMALIZERS[name](Y), Y, rtol=1e-12, atol=1e-12)  # a projection, scaled
    torch.testing.assert_close(NORMALIZERS[name](1e-9 * X), Y, rtol=1e-10, atol=1e-12)  # the size of X is forgotten
    torch.testing.assert_close(NORMALIZERS[name](-X), -Y, rtol=0, atol=0)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("shape", [(3, 3), (4, 7), (7, 4)])
def test_no_matrix_of_the_norm_is_better_aligned(name, shape):
    """P(X) maximizes <X, Z> over the norm's sphere, whose points are the images of other matrices."""
    X = gaussian(*shape)
    best = (X * NORMALIZERS[name](X)).sum()
    others = NORMALIZERS[name](torch.cat([gaussian(200, *shape, seed=1), X + 0.1 * gaussian(200, *shape, seed=2)]))
    assert ((X * others).sum((-2, -1)) <= best + 1e-12).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_svd(shape):
    X = gaussian(*shape)
    m, n = shape
    torch.testing.assert_close(spectral(X), math.sqrt(max(m, n)) * polar(X), rtol=1e-8, atol=1e-9)  # eigh squares the condition number
    # 60 cubic steps: a singular value grows by 1.5 a step until it is near 1; the smallest here is above 1e-3 of the norm
    torch.testing.assert_close(newton_schulz(X, 60, CUBIC_COEFFICIENTS, eps=0.0), polar(X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape, steps):
    X, (a, b, c) = gaussian(*shape), MUON_COEFFICIENTS
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(X, steps), U @ torch.diag(s) @ Vh, rtol=1e-10, atol=1e-10)


def test_where_muons_coefficients_end():
    """Five steps take every singular value from 0.01 on into a band around 1: not to 1."""
    s = torch.linspace(0.01, 1, 100_000, dtype=torch.float64)
    a, b, c = MUON_COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert 0.67 < s.min() < 0.75 and 1.1 < s.max() < 1.21


def test_rows_and_columns():
    X = gaussian(4, 7)
    torch.testing.assert_close(row(X).norm(dim=1), torch.full((4,), math.sqrt(7), dtype=torch.float64))
    torch.testing.assert_close(column(X).norm(dim=0), torch.full((7,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(column(X), row(X.mT).mT)
    torch.testing.assert_close(frobenius(X), X * math.sqrt(28) / X.square().sum().sqrt())


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_batch_is_its_matrices(name):
    X = gaussian(2, 3, 4, 6)
    torch.testing.assert_close(NORMALIZERS[name](X)[1, 2], NORMALIZERS[name](X[1, 2]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(newton_schulz(X)[1, 2], newton_schulz(X[1, 2]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stays_zero(name, dtype):
    assert torch.equal(NORMALIZERS[name](torch.zeros(3, 4, dtype=dtype)), torch.zeros(3, 4, dtype=dtype))
    X = gaussian(3, 4, dtype=dtype)
    X[1], X[:, 2] = 0.0, 0.0
    Y = NORMALIZERS[name](X)
    assert torch.isfinite(Y).all() and Y[1].abs().max() < 1e-6 and Y[:, 2].abs().max() < 1e-6
    assert torch.equal(newton_schulz(torch.zeros(3, 4, dtype=dtype)), torch.zeros(3, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_one_has_one_singular_value(dtype):
    X = torch.outer(gaussian(5, dtype=dtype), gaussian(8, seed=1, dtype=dtype))
    s = torch.linalg.svdvals(spectral(X))
    assert s[0] == pytest.approx(math.sqrt(8), rel=1e-4) and s[1] < 1e-3  # not the noise of the seven others, blown up


def test_parameters_of_any_shape():
    tensors = [gaussian(3, 4), gaussian(5), gaussian(), gaussian(0, 2), gaussian(3, 4, seed=1), gaussian(2, 1, 3), gaussian(4, 3).t()]
    assert [tuple(as_matrix(x).shape) for x in tensors] == [(3, 4), (1, 5), (1, 1), (0, 2), (3, 4), (2, 3), (3, 4)]
    assert [(where, tuple(X.shape)) for where, X in stacks(tensors)] == [
        ([0, 4, 6], (3, 3, 4)), ([1], (1, 1, 5)), ([2], (1, 1, 1)), ([5], (1, 2, 3))]
    for x, y in zip(tensors, on_matrices(row, tensors), strict=True):
        assert y.shape == x.shape
        torch.testing.assert_close(y, row(as_matrix(x)).reshape(x.shape) if x.numel() else x)


def test_low_precision_is_computed_in_float32():
    x = gaussian(6, 4, dtype=torch.bfloat16)
    y, = on_matrices(spectral, [x])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, spectral(x.float()).bfloat16(), rtol=0, atol=0)
