"""GPU cases of kernels/sageattention2 (see lib/book/bench_gpu.py)."""
import torch

from lib.book.bench_gpu import Case, as_torch
from lib.kernels.sageattention2 import Recipe, attend, centre, quantize

attention = torch.nn.functional.scaled_dot_product_attention


def cases(xp, tiny):
    n, heads, d = (140, 2, 16) if tiny else (4096, 8, 64)
    Q, K, V = (xp.random.default_rng(s).standard_normal((heads, n, d), dtype=xp.float32) for s in range(3))
    k = centre(K)[0]
    for name, recipe in (("float32", Recipe(None, smooth_q=False, smooth_k=False, fp8=False, accumulator="wide")),
                         ("int8 codes, smooth K, FP8", Recipe(8, smooth_q=False)),
                         ("4-bit codes in bytes, smooth K, FP8", Recipe(4, smooth_q=False))):
        q_, k_ = Q, K
        if recipe.bits:                                     # the peer attends to the numbers that the codes stand for
            q_, k_ = (codes * scale[..., None] for codes, scale in (quantize(Q, recipe.bits, "q"), quantize(k, recipe.bits, "k")))
        q_, k_, v_ = (as_torch(xp.ascontiguousarray(x, dtype=xp.float32)) for x in (q_, k_, V))
        q_, k_, v_ = (x if tiny else x.half() for x in (q_, k_, v_))
        yield Case(f"{name}, {n} tokens, {heads} heads of {d}, with quantization", lambda r=recipe: attend(Q, K, V, r).out, "scaled_dot_product_attention" + ("" if tiny else ", float16"),
                   lambda q=q_, k=k_, v=v_: attention(q, k, v).float(), 16 * heads * n * d, 4 * heads * n * n * d, 0.06 if recipe.fp8 else 5e-3)     # E4M3 is off by 1/16 at most; float16 of the peer
