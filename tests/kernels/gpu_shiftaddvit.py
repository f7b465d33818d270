"""GPU cases of kernels/shiftaddvit (see lib/book/bench_gpu.py)."""
import torch

from lib.book.bench_gpu import Case, as_torch
from lib.kernels.shiftaddvit import add_attention, shift_gemm


def cases(xp, tiny):
    batch, n, d = (2, 19, 8) if tiny else (64, 1024, 64)
    random = xp.random.default_rng(0)
    Q, K = (random.random((batch, n, d)) < 0.5 for _ in range(2))
    V = random.standard_normal((batch, n, d), dtype=xp.float32)
    q, k, v = as_torch(Q).float(), as_torch(K).float(), as_torch(V)
    for quadratic in (False, True):             # float32 sums of up to 1024 terms, in another order
        yield Case(f"additive attention, {'popcount scores' if quadratic else 'linear'}, {batch} x {n} x {d}", lambda o=quadratic: add_attention(Q, K, V, o).out,
                   "two torch.matmul (cuBLAS), float32", lambda: q @ (k.transpose(1, 2) @ v), batch * n * (d // 4 + 8 * d), 2 * batch * n * d * d, 1e-4)
    n, m = (20, 18) if tiny else (2048, 2048)
    X, codes = random.integers(-2**16, 2**16, (n, m)).astype(xp.int32), (random.integers(1, 17, (m, m)) * (2 * random.integers(0, 2, (m, m)) - 1)).astype(xp.int8)
    c = as_torch(codes).double()
    x, w = as_torch(X).float(), (torch.sign(c) * 2.0 ** (c.abs() - 1)).float()
    yield Case(f"shift and add, {n} x {m} x {m}", lambda: shift_gemm(X, codes), "torch.matmul (cuBLAS), float32", lambda: x @ w.T, 4 * n * m + m * m + 8 * n * m, 2 * n * m * m, 1e-4)
