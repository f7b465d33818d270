"""GPU cases of kernels/bipolar_int (see lib/book/bench_gpu.py)."""
from lib.book.bench_gpu import Case, as_torch
from lib.kernels.bipolar_int import decode, matmul, pack


def cases(xp, tiny):
    n = 35 if tiny else 2048
    for bits in (1, 2, 4):
        u, t = (xp.random.default_rng(s).integers(0, 2**bits, (n, n)).astype(xp.uint8) for s in (0, 1))
        W, X = pack(u, bits), pack(t, bits)
        w, x = (as_torch(xp.asarray(2 * c.astype(xp.int32) - (2**bits - 1), dtype=xp.float32)) for c in (u, t))
        if tiny:
            assert (decode(u, bits) == w.numpy()).all()
        else:
            w, x = w.half(), x.half()                       # the values are small integers: exact in float16, their sums in its float32 accumulator
        for fused in (True, False):
            yield Case(f"bipolar {bits} x {bits} bits, {n} x {n} x {n}, {'fused' if fused else 'unfused'}", lambda W=W, X=X, f=fused: matmul(W, X, f).Y,
                       "torch.matmul (cuBLAS), float16", lambda w=w, x=x: w @ x.T, 2 * bits * n * n // 8 + 4 * n * n, 2 * n**3, 0.0 if tiny else 1e-3)      # the peer rounds its result to float16
