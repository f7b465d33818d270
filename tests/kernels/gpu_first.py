"""GPU cases of "Reading a kernel" (see lib/book/bench_gpu.py)."""
from pathlib import Path

import lib.kernels
from lib.book.bench_gpu import Case, as_torch
from lib.cuda import Module, launch

kernels = Module.from_file(Path(lib.kernels.__file__).with_name("first.cu"))


def cases(xp, tiny):
    n = 33 if tiny else 2048
    A, B = (xp.random.default_rng(s).random((n, n), dtype=xp.float32) for s in (0, 1))
    C, none = xp.zeros((n, n), xp.float32), xp.zeros(1, xp.uint64)
    a, b = as_torch(A), as_torch(B)

    def run(name):
        launch(kernels[name], (-(-n // 16), -(-n // 16)), (16, 16), (A, B, C, n, n, n, none))
        return C

    for name in ("product", "tiled"):                       # float32 sums of n terms in another order, TF32 is off by default: 1e-5 is ten times what was seen
        yield Case(f"{name}, {n} x {n} x {n}, float32", lambda name=name: run(name), "torch.matmul (cuBLAS), float32", lambda: a @ b, 12 * n * n, 2 * n**3, 1e-5)
    x, partial = A.ravel(), xp.zeros(-(-n * n // 256), xp.float32)

    def total(name):
        launch(kernels[name], len(partial), 256, (x, partial, n * n))
        return partial.sum()

    for name in ("tree_sum", "warp_sum"):
        yield Case(f"{name}, {n * n} numbers", lambda name=name: total(name), "torch.sum", lambda: a.sum(), 4 * n * n, n * n, 1e-5)
