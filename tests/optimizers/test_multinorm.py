"""Multi-normalization against Sinkhorn's algorithm, a loop written out in NumPy, closed forms, and the drop-in checks."""
import math

import numpy as np
import pytest
import torch

from lib.optimizers.base import state_bytes
from lib.optimizers.matrices import NORMALIZERS
from lib.optimizers.multinorm import MNGD, SWAN, SinkGD, gap, multinormalize
from tests.optimizers.conformance import NAN, Conformance, same, set_grads, snapshot, tensors

MODULE = "lib/optimizers/multinorm.py"
MATRICES = "lib/optimizers/matrices.py"
BREAKS = [
    ("columns get the factor of rows", MATRICES, "keepdim=True), math.sqrt(X.shape[-2]))", "keepdim=True), math.sqrt(X.shape[-1]))"),
    ("rows get the factor of columns", MATRICES, "keepdim=True), math.sqrt(X.shape[-1]))", "keepdim=True), math.sqrt(X.shape[-2]))"),
    ("columns before rows", MODULE, "        for norm in norms:\n            X =", "        for norm in reversed(norms):\n            X ="),
    ("one round only", MODULE, "for _ in range(rounds):", "for _ in range(min(rounds, 1)):"),
    ("step has the wrong sign", MODULE, 'alpha=-group["lr"]', 'alpha=group["lr"]'),
    ("a zero row divides by zero", MATRICES, "norm.masked_fill(norm == 0.0, math.inf)", "norm"),
    ("the gap sees one norm only", MODULE, "torch.stack(far).amax(0)", "far[0]"),
]
OPTIONS = [("lr", -1e-3), ("lr", NAN), ("lr", float("inf")), ("lr", "fast"), ("maximize", "yes"), ("rounds", -1), ("rounds", 2.0),
           ("rounds", True)]


class TestConformance(Conformance):
    optimizer = SinkGD
    floats_per_parameter = 0
    bad_options = OPTIONS


class TestConformanceOfSWAN(Conformance):
    optimizer = SWAN
    floats_per_parameter = 0
    bad_options = OPTIONS


class TestConformanceOfOtherNorms(Conformance):
    optimizer = MNGD
    options = {"lr": 0.05, "norms": ("frobenius", "sign", "column"), "rounds": 2}
    floats_per_parameter = 0
    bad_options = [*OPTIONS, ("norms", "row"), ("norms", ()), ("norms", ("row", "rows"))]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- oracles -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_naive_transcription_over_60_steps(rounds):
    """The algorithm box with one loop over rows and one over columns."""
    generator = np.random.default_rng(0)
    theta = [generator.normal(size=shape) for shape in ((4, 6), (5, 3), (1, 7))]
    params = [torch.tensor(w, requires_grad=True) for w in theta]
    opt = SinkGD(params, lr=0.05, rounds=rounds)
    for _ in range(60):
        for w, p in zip(theta, params, strict=True):
            G = generator.normal(size=w.shape)
            p.grad = torch.tensor(G)
            m, n = G.shape
            X = G.copy()
            for _ in range(rounds):
                for i in range(m):
                    X[i] = X[i] * math.sqrt(n) / math.sqrt(sum(x * x for x in X[i]))
                for j in range(n):
                    X[:, j] = X[:, j] * math.sqrt(m) / math.sqrt(sum(x * x for x in X[:, j]))
            w -= 0.05 * X
        opt.step()
    for w, p in zip(theta, params, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11, atol=1e-11)  # the same float64 formulas, another order


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("rounds", [1, 5, 30])
def test_sinkhorn_on_the_squared_gradient(shape, rounds):
    """Sinkhorn and Knopp scale G * G to row sums n and column sums m; the root with G's signs is X."""
    G = gaussian(*shape)
    m, n = shape
    P = (G * G).numpy().copy()
    for _ in range(rounds):
        P *= n / P.sum(axis=1, keepdims=True)
        P *= m / P.sum(axis=0, keepdims=True)
    np.testing.assert_allclose(multinormalize(G, rounds=rounds).numpy(), np.sign(G.numpy()) * np.sqrt(P), rtol=1e-10)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_swan_by_svd(shape):
    """Rows to sqrt(n), then whitening: the polar factor from the SVD, at the size of the longer side."""
    w = gaussian(*shape)
    p = w.clone().requires_grad_()
    opt = SWAN([p], lr=0.1)
    for t in range(50):
        G = gaussian(*shape, seed=t + 1)
        p.grad = G.clone()
        opt.step()
        U, _, Vh = torch.linalg.svd(G / G.norm(dim=1, keepdim=True), full_matrices=False)
        w -= 0.1 * math.sqrt(max(shape)) * U @ Vh
    torch.testing.assert_close(p.detach(), w, rtol=1e-7, atol=1e-8)  # eigenvectors of a Gram matrix lose digits where S is small


# -- what a fixed point is -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pair", [("row", "column"), ("row", "spectral"), ("column", "spectral"), ("sign", "spectral"), ("row", "sign")])
def test_two_projections_of_one_size_come_closer(pair):
    for seed in range(10):
        X, distances = gaussian(7, 12, seed=seed), []
        for k in range(30):
            Y = NORMALIZERS[pair[k % 2]](X)
            distances.append((Y - X).norm().item())
            X = Y
        assert (np.diff(distances[1:]) <= 1e-7).all()  # the first distance is to G itself, of another size; 1e-7 for the Gram matrix


def test_convergence_and_descent():
    G = gaussian(64, 64)
    gaps = [gap(multinormalize(G, rounds=rounds)).item() for rounds in range(1, 31)]
    assert gaps[0] > 1e-2 and gaps[4] < 1e-4 and gaps[29] < 1e-13
    X = multinormalize(G, rounds=30)
    assert X.norm().item() == pytest.approx(64, rel=1e-12) and (G * X).sum() > 0 and ((G * X) >= 0).all()


def test_gap_is_the_worst_of_the_norms():
    X = NORMALIZERS["row"](gaussian(4, 7))
    assert gap(X, ("row",)) < 1e-15 and gap(X, ("row", "column")) > 1e-2
    assert gap(gaussian(3, 4, 7)).shape == (3,)


def test_invariance_to_the_scales_of_rows_and_columns():
    G = gaussian(6, 9)
    D, E = gaussian(6, 1, seed=1).exp(), gaussian(1, 9, seed=2).exp()
    for rounds in (1, 5):
        torch.testing.assert_close(multinormalize(D * G, rounds=rounds), multinormalize(G, rounds=rounds), rtol=1e-12, atol=1e-12)
    assert (multinormalize(G * E, rounds=1) - multinormalize(G, rounds=1)).norm() > 1e-2
    torch.testing.assert_close(multinormalize(D * G * E, rounds=200), multinormalize(G, rounds=200), rtol=1e-9, atol=1e-9)


def test_one_norm_alone_is_normalized_descent():
    p = torch.zeros(4, 9, dtype=torch.float64, requires_grad=True)
    opt = MNGD([p], lr=0.5, norms=("row",), rounds=3)
    p.grad = gaussian(4, 9)
    opt.step()
    torch.testing.assert_close(p.detach(), -0.5 * 3.0 * p.grad / p.grad.norm(dim=1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_rank_one_becomes_its_sign():
    G = torch.outer(gaussian(5), gaussian(8, seed=1))
    torch.testing.assert_close(multinormalize(G, rounds=1), G.sign(), rtol=1e-12, atol=1e-12)


def test_vectors_and_scalars_follow_the_sign():
    params, signs = tensors(shapes=((5,), ())), tensors(shapes=((5,), ()))
    opt = SinkGD(params, lr=0.1)
    set_grads(params, 3)
    opt.step()
    for p, q in zip(params, signs, strict=True):
        torch.testing.assert_close(p, q - 0.1 * p.grad.sign(), rtol=1e-14, atol=1e-14)


def test_triangular_two_by_two_converges_like_one_over_rounds():
    """The entry off the diagonal must vanish, and its square does so like 1 / L."""
    squares = [multinormalize(torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64), rounds=L)[0, 1].item() ** 2 for L in (1000, 2000)]
    assert squares[0] / squares[1] == pytest.approx(2.0, rel=1e-2)


def test_a_dead_row_leaves_its_share_to_the_others():
    G = gaussian(8, 5)
    G[3] = 0.0
    X = multinormalize(G, rounds=50)
    assert torch.equal(X[3], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(X.norm(dim=0), torch.full((5,), math.sqrt(8), dtype=torch.float64))
    torch.testing.assert_close(X[0].norm(), torch.tensor(math.sqrt(5 * 8 / 7), dtype=torch.float64))


# -- the idea switched off, state, bad input -----------------------------------------------------------------------------

def test_no_rounds_is_gradient_descent():
    ours, theirs = tensors(), tensors()
    opt, other = SinkGD(ours, lr=0.1, rounds=0), torch.optim.SGD(theirs, lr=0.1)
    for t in range(20):
        set_grads(ours, t)
        set_grads(theirs, t)
        opt.step()
        other.step()
    assert same([p.detach() for p in ours], [p.detach() for p in theirs])


def test_equal_shapes_share_a_call_and_change_nothing():
    a = [gaussian(4, 6, seed=s).requires_grad_() for s in range(5)]
    b = [p.detach().clone().requires_grad_() for p in a]
    together, alone = SinkGD(a), [SinkGD([p]) for p in b]
    set_grads(a, 0)
    for p, q in zip(a, b, strict=True):
        q.grad = p.grad.clone()
    together.step()
    for opt in alone:
        opt.step()
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_no_state():
    params = tensors()
    opt = SinkGD(params)
    set_grads(params, 0)
    opt.step()
    assert state_bytes(opt) == 0 and all(set(s) == {"step"} for s in opt.state.values())


def test_norms_spoilt_between_steps():
    opt = MNGD(tensors())
    set_grads(opt.param_groups[0]["params"], 0)
    before = snapshot(opt)
    opt.param_groups[0]["norms"] = ("row", "diagonal")
    with pytest.raises(ValueError, match="norms"):
        opt.step()
    opt.param_groups[0]["norms"] = ("row", "column")
    assert same(before, snapshot(opt))


def test_a_layer_of_dead_units_stays_finite():
    w = torch.ones(3, 4, requires_grad=True)
    w.grad = torch.zeros(3, 4)
    w.grad[1] = 1.0
    for method in (SinkGD, SWAN):
        method([w]).step()
        assert torch.isfinite(w).all() and torch.equal(w[0], torch.ones(4))
