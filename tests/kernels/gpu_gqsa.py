"""GPU cases of kernels/gqsa (see lib/book/bench_gpu.py)."""
from lib.book.bench_gpu import Case, as_torch
from lib.kernels.gqsa import compress, keep, multiply
from lib.kernels.groups import quantize
from lib.kernels.mixpe import multiply as dense


def cases(xp, tiny):
    import numpy as np

    M, K, g, workers = (24, 64, 16, 16) if tiny else (4096, 4096, 16, 132 * 16)     # 16 warps on each multiprocessor of an H100
    random = np.random.default_rng(0)
    W, score, x = random.standard_normal((M, K)), random.random((M, K // g)), random.standard_normal((1, K)).astype(np.float16)
    skewed = score * np.exp(2 * random.standard_normal((M, 1)))                     # some rows keep most of their groups, others few
    X = xp.asarray(x)
    for kind, s in (("even rows", keep(score, 0.5, per="row")), ("skewed rows", keep(skewed, 0.5))):
        stored = compress(W, s, g)
        w, there = as_torch(xp.asarray(stored.values(), dtype=xp.float32)), stored.on(xp)
        pair = (w, as_torch(X).float()) if tiny else (w.half(), as_torch(X))
        for schedule in ("rows", "groups"):
            yield Case(f"half of the groups of {g}, {M} x {K}, {kind}, {schedule} dealt to {workers} warps", lambda s=there, d=schedule: multiply(s, X, d, workers).Y,
                       "torch.matmul (cuBLAS), float16", lambda p=pair: (p[0] @ p[1].T).float(), stored.nnz * (g // 2 + 5) + 4 * M + x.nbytes, 2 * stored.nnz * g, 2e-3)      # float16 weights and results on the other side
    if not tiny:
        full = quantize(W, 128)
        w, full = as_torch(xp.asarray(full.values(), dtype=xp.float16)), full.on(xp)
        yield Case(f"all groups of 128, {M} x {K}, one warp a result (kernels/mixpe)", lambda: dense(full, X, order="after", warp=True).Y,
                   "torch.matmul (cuBLAS), float16", lambda: (w @ as_torch(X).T).float(), M * K // 2 + 3 * M * K // 128, 2 * M * K, 2e-3)
