"""kernels/gqsa: the format against scipy's block sparse rows, saliency against refitting by least squares, both schedules against float64 and their counted loads, the two stages, bad input, the sanitizers."""
import numpy as np
import pytest
import scipy.sparse
import torch

from lib.cuda import check, gpu_available
from lib.kernels import gqsa
from lib.kernels.gqsa import GroupLinear, SparseGroups, bqpo, compress, convert, e2e_oqp, group_saliency, hessian, keep, makespan, multiply, output_error, two_of_four, weight_saliency
from lib.kernels.groups import pack, quantize
from lib.models import load

CU, PY = "lib/kernels/gqsa.cu", "lib/kernels/gqsa.py"
BREAKS = [
    ("a cut row loses its other parts", CU, "if (from > row_start[m]) carry", "if (from > row_start[m] + g) carry"),
    ("the high half of a byte meets the wrong activation", CU, "high * __half2float(x[k + 1])", "high * __half2float(x[k])"),
    ("only the first of several parts is joined", CU, "v < workers && carry_row[v] == m", "v < worker + 1 && carry_row[v] == m"),
    ("parts are joined twice", CU, "m < 0 || (worker > 0 && carry_row[worker - 1] == m)", "m < 0"),
    ("the last share reads beyond the groups", CU, "to = min(from + share, all)", "to = from + share"),
    ("the least salient groups are kept", PY, "np.argsort(rows, axis=1", "np.argsort(-rows, axis=1"),
    ("saliency divides by the squared inverse", PY, "W**2 / np.diag(np.linalg.inv(H))", "W**2 / np.diag(np.linalg.inv(H)) ** 2"),
    ("rounding stops the gradient", PY, "return x + (x.round() - x).detach()", "return x.round()"),
    ("zeros of a row's groups are counted as stored", PY, "return self.nnz * (4 * self.g", "return self.M * self.K / self.g * (4 * self.g"),
    ("codes belong to another scale than the stored one", PY, "self.scale.copy_(self.scale.half())", "pass"),
]
rng = np.random.default_rng(0)              # any data do: the kernels have no branch on values
pytestmark = pytest.mark.usefixtures("compiler")
SIZES = [(33, 96, 16, 0.5, 7), (5, 32, 8, 0.9, 64), (1, 16, 16, 0, 3), (40, 64, 4, 0.7, 5), (9, 2, 2, 0, 4), (17, 64, 32, 0.5, 1)]     # M, K, g, S, workers


def problem(M, K, g, S, dyadic=False):
    kept = keep(rng.random((M, K // g)), S)
    kept[M // 2] &= M < 3                                                    # a row without groups, and its neighbours
    if not dyadic:
        return compress(rng.standard_normal((M, K)), kept, g)
    n = int(kept.sum())
    parts = pack(rng.integers(0, 16, (n, g), dtype=np.uint8)), (rng.integers(1, 8, n) / 64).astype(np.float16), rng.integers(0, 16, n, dtype=np.uint8)
    return gqsa._stored(kept, K, g, *parts)


# ------------------------------------------------------------------------------------------------ the format
@pytest.mark.parametrize("M, K, g, S, _", SIZES)
def test_the_format_is_block_sparse_rows(M, K, g, S, _):
    W, kept = rng.standard_normal((M, K)), keep(rng.random((M, K // g)), S)
    s = compress(W, kept, g)
    dense = s.values()
    blocks = dense.reshape(M, -1, g)[kept]
    peer = scipy.sparse.bsr_matrix((blocks[:, None, :], s.col.astype(int), s.row_start), shape=(M, K), blocksize=(1, g))
    assert np.array_equal(peer.toarray(), dense) and peer.has_sorted_indices
    assert not dense.reshape(M, -1, g)[~kept].any()
    full = quantize(W, g).values().reshape(M, -1, g)                         # a group's grid is its own: what is dropped does not change it
    assert np.array_equal(blocks, full[kept])
    assert s.bits_per_weight * M * K == 8 * s.codes.nbytes + 8 * s.scale.nbytes + 4 * s.nnz + 8 * s.col.nbytes


def test_bits_of_the_usual_case():
    s = compress(rng.standard_normal((8, 64)), keep(rng.random((8, 4)), 0.5), 16)
    assert s.bits_per_weight == 0.5 * (4 + (16 + 4 + 16) / 16) == 3.125


@pytest.mark.parametrize("S, n", [(0, 12), (0.5, 6), (0.3, 8), (0.99, 0)])
def test_keep_drops_the_least(S, n):
    score = rng.permutation(12).reshape(3, 4).astype(float)
    kept = keep(score, S)
    assert kept.sum() == n and (not n or score[kept].min() > score[~kept].max(initial=-1))
    rows = keep(score, S, per="row")
    assert (rows.sum(1) == 4 - round(4 * S)).all()
    for a, b in zip(score, rows):
        assert not b.any() or a[b].min() > a[~b].max(initial=-1)


# ------------------------------------------------------------------------------------------------ saliency
def refitted(w, H, gone):
    """min (v - w)^T H (v - w) over v with v = 0 at `gone`, by solving for the others."""
    rest = np.setdiff1d(np.arange(len(w)), gone)
    v = np.zeros_like(w)
    v[rest] = np.linalg.solve(H[np.ix_(rest, rest)], H[rest] @ w) if len(rest) else 0
    return (v - w) @ H @ (v - w)


def test_saliency_is_the_rise_after_refitting():
    W, H = rng.standard_normal((3, 12)), hessian(rng.standard_normal((40, 12)) @ rng.standard_normal((12, 12)))
    one, exact = weight_saliency(W, H), group_saliency(W, H, 4, exact=True)
    for m in range(3):
        assert np.allclose(one[m], [refitted(W[m], H, [k]) for k in range(12)], rtol=1e-8)          # condition about 1e4, float64
        assert np.allclose(exact[m], [refitted(W[m], H, np.arange(4) + 4 * n) for n in range(3)], rtol=1e-8)
    assert np.allclose(group_saliency(W, H, 4), one.reshape(3, 3, 4).mean(-1)) and np.allclose(group_saliency(W, H, 1, exact=True), one)


def test_the_hessian_is_damped_by_its_mean_diagonal():
    X = rng.standard_normal((30, 5))
    assert np.allclose(hessian(X) - X.T @ X, 0.01 * np.trace(X.T @ X) / 5 * np.eye(5))


def test_two_of_four_and_output_error():
    score = rng.random((3, 12))
    kept = two_of_four(score).reshape(3, 3, 4)
    assert (kept.sum(2) == 2).all() and two_of_four(np.ones((2, 8))).sum() == 8          # ties too
    for four, there in zip(score.reshape(-1, 4), kept.reshape(-1, 4)):
        assert four[there].min() > four[~there].max()
    X, W, V = rng.standard_normal((30, 5)), rng.standard_normal((4, 5)), rng.standard_normal((4, 5))
    assert np.isclose(output_error(V, W, X.T @ X), np.linalg.norm(X @ (V - W).T) / np.linalg.norm(X @ W.T))
    with pytest.raises(ValueError, match="score: rows should hold a multiple of four, hold 6"):
        two_of_four(np.ones((2, 6)))


# ------------------------------------------------------------------------------------------------ products
@pytest.mark.parametrize("schedule", ["rows", "groups"])
@pytest.mark.parametrize("M, K, g, S, P", SIZES)
def test_products(M, K, g, S, P, schedule):
    s, X = problem(M, K, g, S, dyadic=True), (rng.integers(-64, 65, (3, K)) / 8).astype(np.float16)
    assert np.array_equal(multiply(s, X, schedule, P).Y, s.values() @ X.T.astype(float))     # multiples of 2^-9 below 2^14: exact in float32
    s, X = problem(M, K, g, S), rng.standard_normal((2, K)).astype(np.float16)
    bound = abs(s.values()) @ abs(X.T.astype(float)) * (K + 8) * 2.0**-24                    # float32: K products and additions, a few joins
    assert (abs(multiply(s, X, schedule, P).Y - s.values() @ X.T.astype(float)) <= bound).all()


@pytest.mark.parametrize("M, K, g, S, P", SIZES)
def test_loads_are_those_of_the_schedule(M, K, g, S, P):
    s, X = problem(M, K, g, S), np.ones((1, K), np.float16)
    groups = np.diff(s.row_start)
    rows, even = (multiply(s, X, schedule, P, count=True) for schedule in ("rows", "groups"))
    assert rows.load.tolist() == [groups[w::P].sum() for w in range(P)] and rows.joined == 0
    share = -(-s.nnz // P)
    assert even.load.tolist() == [len(range(s.nnz)[w * share:(w + 1) * share]) for w in range(P)]
    starts = np.arange(share, s.nnz, share)                                  # where a second, third, ... worker begins
    assert even.joined == np.sum(~np.isin(starts, s.row_start)) <= P - 1
    assert rows.load.max() == makespan(groups, P, "rows") and even.load.max() == makespan(groups, P, "groups")
    assert rows.bytes == even.bytes == s.nnz * (g // 2 + 5)
    assert multiply(s, X).load is None


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_across_many_workers_is_joined_whole(row):
    kept = np.zeros((3, 64), bool)
    kept[row] = True                                                         # one row has everything
    s = gqsa._stored(kept, 128, 2, np.full((64, 1), 0x21, np.uint8), np.ones(64, np.float16), np.zeros(64, np.uint8))
    made = multiply(s, np.ones((1, 128), np.float16), "groups", 10, count=True)
    assert made.Y.ravel().tolist() == [192 * (m == row) for m in range(3)] and made.joined == 9 and made.load.max() == 7
    assert multiply(s, np.ones((1, 128), np.float16), "rows", 10, count=True).load.max() == 64


# ------------------------------------------------------------------------------------------------ the two stages
def layer(M=6, K=32, g=8, bits=4, dtype=torch.float64, seed=1):
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(M, K, generator=random, dtype=dtype)
    mask = (torch.rand(M, K // g, generator=random) < 0.6).repeat_interleave(g, 1)
    return W, mask, GroupLinear(W, mask, g, bits)


def test_a_new_layer_is_the_quantized_masked_matrix():
    W, mask, q = layer()
    s = compress(W.numpy(), mask[:, ::8].numpy(), 8)
    assert np.allclose(q.dequantized().detach().numpy(), s.values(), atol=2e-3)      # here the scale is not rounded to float16: 15 steps times 2^-11 of 0.3
    x, bias = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.ones(6, dtype=torch.float64)
    q.bias = bias
    assert torch.allclose(q(x), x @ q.dequantized().T + 1)


def test_zeros_stay_codes():
    _, _, q = layer()
    with torch.no_grad():
        q.zero[0], q.zero[1], q.zero[2] = 20.0, -3.0, 6.6
    assert q._zero()[:3].ravel().tolist() == [15, 0, 7]


def test_frozen_layers_are_stored_exactly():
    W, mask, q = layer(dtype=torch.float32)
    with pytest.raises(ValueError, match="export: needs frozen codes"):
        q.export()
    q.freeze()
    s = q.export()
    assert np.array_equal(s.values(), q.dequantized().detach().double().numpy())
    assert np.array_equal(s.values(), compress(W.double().numpy(), mask[:, ::8].numpy(), 8).values())
    for bad in (GroupLinear(W, mask, 8, bits=2), GroupLinear(W, torch.ones_like(mask).index_fill(1, torch.tensor([3]), False), 8)):
        bad.freeze()
        with pytest.raises(ValueError, match="export: needs"):
            bad.export()


def test_gradients_are_straight_through():
    """With q = w / s + z inside the range: dW/dw = 1, dW/ds = round(w / s) - w / s, dW/dz = 0; at an end: 0, code - z, -s; where nothing exists, 0."""
    W, mask, q = layer()
    with torch.no_grad():
        q.scale *= 0.7                                                       # so that some weights are clipped
    q.dequantized().sum().backward()
    w, s, z = q.weight.detach().reshape(-1, 8), q.scale.detach(), q.zero.detach()
    there, code = mask.reshape(-1, 8), (w / s).round() + z
    inside = (code >= 0) & (code <= 15)
    assert (~inside & there).any() and (inside & there).any()
    assert torch.equal(q.weight.grad.reshape(-1, 8), (inside & there).double())
    assert torch.allclose(q.scale.grad, (torch.where(inside, (w / s).round() - w / s, code.clamp(0, 15) - z) * there).sum(1, keepdim=True))
    assert torch.allclose(q.zero.grad, (torch.where(inside, 0.0, -s) * there).sum(1, keepdim=True))
    q.freeze()
    q.zero_grad()
    q.dequantized().sum().backward()
    assert q.weight.grad is None and torch.allclose(q.zero.grad, -(q.scale.detach() * there.sum(1, keepdim=True)))
    assert torch.allclose(q.scale.grad, ((q.codes - z) * there).sum(1, keepdim=True))


def test_stages_improve_and_leave_alone_what_they_should():
    """A layer whose output is to be that of the dense matrix; losses before and after are over all data."""
    W, mask, q = layer(12, 32, 8, dtype=torch.float32)
    X = torch.randn(200, 32, generator=torch.Generator().manual_seed(3)) @ torch.randn(32, 32, generator=torch.Generator().manual_seed(4))
    Y = X @ W.T
    before = (q(X) - Y).square().mean().item()
    losses = bqpo(q, q, X, Y, 150, torch.Generator().manual_seed(5), batch=32, lr=2e-2, lr_grid=2e-3)
    between = (q(X) - Y).square().mean().item()
    assert len(losses) == 150 and between < 0.7 * before                     # inputs are correlated, so kept weights can stand in for dropped ones
    assert torch.equal(q.mask.bool(), mask) and not q.dequantized()[~mask].any()
    frozen, random = q.weight.detach().clone(), torch.Generator().manual_seed(6)
    e2e_oqp(q, lambda pick: (q(X[pick]) - Y[pick]).square().mean(), lambda: torch.randint(200, (32,), generator=random), 150)
    assert torch.equal(q.weight, frozen) and q.codes.min() >= 0 and q.codes.max() <= 15 and torch.equal(q.codes, q.codes.round())
    assert (q(X) - Y).square().mean().item() < between
    s = q.export()
    assert np.allclose(s.values(), q.dequantized().detach().numpy(), rtol=2.0**-10, atol=0)  # scales to float16
    with pytest.raises(ValueError, match="the loss became nan after 0 steps"):
        bqpo(q, q, X * np.nan, Y, 1, torch.Generator().manual_seed(5))


def test_a_converted_model_keeps_what_is_not_named():
    model = load("digits_mlp")
    mask = np.ones((128, 64), bool)
    mask[:, 16:32] = False
    ours, x = convert(model, {"fc1": mask}, 16, bits=16), torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert isinstance(ours.fc1, GroupLinear) and type(ours.fc2) is torch.nn.Linear and type(model.fc1) is torch.nn.Linear
    with torch.no_grad():
        model.fc1.weight[:, 16:32] = 0
    assert torch.allclose(ours(x), model(x), atol=1e-2)                      # 16 bits leave errors of 1e-5 a weight
    for bad in ({"fc1": mask[:2]}, {"": mask}):
        with pytest.raises(ValueError, match="masks: .*should name a linear layer"):
            convert(model, bad, 16)


# ------------------------------------------------------------------------------------------------ bad input
good = compress(rng.standard_normal((2, 8)), np.array([[True, False], [True, True]]), 4)
half = np.ones((1, 8), np.float16)
PARTS = dict(row_start=good.row_start, col=good.col, codes=good.codes, scale=good.scale, zero=good.zero, K=8, g=4)


@pytest.mark.parametrize("call, error, message", [
    (lambda: multiply(np.zeros((2, 8)), half), TypeError, r"W: should be SparseGroups, see compress\(\); was ndarray"),
    (lambda: multiply(good, half.astype(np.float32)), TypeError, "X: should be an array of float16, was float32"),
    (lambda: multiply(good, half[:, :4]), ValueError, r"X: should be a C-contiguous matrix \[N, 8\], has shape \(1, 4\)"),
    (lambda: multiply(good, np.ones((8, 3), np.float16).T), ValueError, "X: should be a C-contiguous"),
    (lambda: multiply(good, half * np.float16(np.nan)), ValueError, "X: should be finite"),
    (lambda: multiply(good, half, "columns"), ValueError, "schedule='columns': should be rows or groups"),
    (lambda: multiply(good, half, workers=0), ValueError, "workers=0: should be a positive"),
    (lambda: compress(np.ones((2, 8)), np.ones((2, 3), bool), 4), ValueError, r"kept: should be bool \[M, K / g\] for W \(2, 8\)"),
    (lambda: compress(np.ones((2, 8)), np.ones((2, 2)), 4), ValueError, "kept: should be bool .* is float64"),
    (lambda: compress(np.ones((2, 8)), np.zeros((2, 2), bool), 4), ValueError, "kept: no group is left"),
    (lambda: compress(np.ones((2, 9)), np.ones((2, 3), bool), 3), ValueError, "g=3: should be"),
    (lambda: compress(np.full((1, 4), np.nan), np.ones((1, 1), bool), 4), ValueError, "must be finite"),
    (lambda: keep(np.ones((2, 2)), 1.0), ValueError, "sparsity=1.0: should be at least 0 and below 1"),
    (lambda: keep(np.ones((2, 2)), 0.5, "column"), ValueError, "per='column'"),
    (lambda: keep(np.array([[np.nan, 1.0]]), 0.5), ValueError, "score: should be finite"),
    (lambda: hessian(np.full((3, 2), np.inf)), ValueError, "X: should be a finite matrix"),
    (lambda: hessian(np.ones((3, 2)), damping=0), ValueError, "damping=0: should be positive"),
    (lambda: group_saliency(np.ones((2, 8)), np.eye(8), 3), ValueError, "g=3: should divide the 8 weights"),
    (lambda: SparseGroups(**PARTS | {"g": 3}), ValueError, "g=3: should be even and divide"),
    (lambda: SparseGroups(**PARTS | {"col": good.col.astype(np.int64)}), TypeError, "col: should be an array of uint16, was int64"),
    (lambda: SparseGroups(**PARTS | {"codes": good.codes[:2]}), ValueError, r"codes: .* shape \(3, 2\), has \(2, 2\)"),
    (lambda: SparseGroups(**PARTS | {"row_start": np.array([0, 2, 1], np.int32)}), ValueError, "row_start: should rise from 0 to the 3 groups"),
    (lambda: SparseGroups(**PARTS | {"col": good.col + np.uint16(1)}), ValueError, "col, zero, scale: should be below 2"),
    (lambda: SparseGroups(**PARTS | {"zero": good.zero + np.uint8(16)}), ValueError, "col, zero, scale"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------ the kernels themselves
@pytest.mark.parametrize("name", ["by_rows", "by_groups"])
def test_no_race_and_nothing_out_of_bounds(name):
    M, K, g, P, N = 9, 32, 4, 6, 2
    s, X, Y, counts = problem(M, K, g, 0.6), np.ones((N, K), np.float16), np.zeros((M, N), np.float32), np.zeros(2, np.uint64)
    stored, load = (s.row_start, s.col, s.codes, s.scale, s.zero, X, Y), np.zeros(P, np.uint32)
    carry = (np.zeros((P, N), np.float32), np.zeros(P, np.int32)) if name == "by_groups" else ()
    report = check(gqsa._kernels(False)[name], (1, N), (32, 8), (*stored, *carry, M, N, K, g, P, load, counts))
    assert report.clean, str(report)


@pytest.mark.gpu
def test_the_gpu_agrees():
    there, why = gpu_available()
    if not there:
        pytest.skip(f"no GPU: {why}")
    import cupy
    s, X = problem(40, 256, 16, 0.5, dyadic=True), (rng.integers(-64, 65, (3, 256)) / 8).astype(np.float16)
    for schedule in ("rows", "groups"):
        made = multiply(s.on(cupy), cupy.asarray(X), schedule, 13, count=True)
        assert np.array_equal(cupy.asnumpy(made.Y), s.values() @ X.T.astype(float)) and int(made.load.max()) == makespan(np.diff(s.row_start), 13, schedule)
