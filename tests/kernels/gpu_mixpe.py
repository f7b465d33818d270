"""GPU cases of kernels/mixpe (see lib/book/bench_gpu.py)."""
from lib.book.bench_gpu import Case, as_torch
from lib.kernels.groups import quantize
from lib.kernels.mixpe import ORDERS, multiply


def cases(xp, tiny):
    M, K, g = (20, 128, 32) if tiny else (4096, 4096, 128)
    import numpy as np
    random = np.random.default_rng(0)
    W = quantize(random.standard_normal((M, K)), g)
    w, W = as_torch(xp.asarray(W.values(), dtype=xp.float32)), W.on(xp)
    for N in (1, 18) if tiny else (1, 8, 64):
        h, q = xp.asarray(random.standard_normal((N, K)).astype(np.float16)), xp.asarray(random.integers(-127, 128, (N, K)).astype(np.int8))
        for kind, X in (("W4A16", h), ("W4A8", q)):
            x = as_torch(X).float()
            pair = (w, x) if tiny else (w.half(), x.half())
            for order, warp in [(o, False) for o in ORDERS] + [(o, True) for o in ("first", "after")]:
                if warp and N > 8:
                    continue
                yield Case(f"{kind}, {M} x {K} times {N}, scale {order}{', one warp a result' if warp else ''}", lambda W=W, X=X, o=order, w=warp: multiply(W, X, order=o, warp=w).Y,
                           "torch.matmul (cuBLAS), float16", lambda p=pair: (p[0] @ p[1].T).float(), M * K // 2 + 3 * M * K // g + X.nbytes + 4 * M * N, 2 * M * N * K, 2e-3)      # weights rounded to float16 on one side or both, results too
