"""GPU cases of kernels/lserve (see lib/book/bench_gpu.py). The peers attend densely, or over the gathered tokens of the same pages."""
import numpy as np
import torch

from lib.book.bench_gpu import Case, as_torch
from lib.kernels.lserve import Cache, Config, block_lists, block_mask, prefill

attention = torch.nn.functional.scaled_dot_product_attention


def cases(xp, tiny):
    n, heads, d = (70, 2, 8) if tiny else (4096, 8, 64)
    Q, K, V = (xp.random.default_rng(s).standard_normal((heads, n, d), dtype=xp.float32) for s in range(3))
    q, k, v = map(as_torch, (Q, K, V))
    for name, streaming in (("dense", [False] * heads), ("half streaming", [h % 2 == 0 for h in range(heads)])):
        lists = block_lists(n, 64, streaming, 16 if tiny else 128, 16 if tiny else 1024)
        mask = torch.from_numpy(block_mask(n, 64, *lists)).to(q.device)
        read = int(lists[1].size) * 64 * 64
        yield Case(f"prefill, {name}, {n} tokens, {heads} heads of {d}", lambda l=lists: prefill(Q, K, V, *l), "scaled_dot_product_attention with the mask",
                   lambda m=mask: attention(q, k, v, attn_mask=m), 16 * heads * n * d, 4 * d * read, 1e-4)      # float32 on both sides
    n = 300 if tiny else 32768
    cache = Cache([False] * heads, d, Config(page=16, logical=4, budget=64) if tiny else Config(), like=Q)
    past, values = (xp.random.default_rng(s).standard_normal((heads, n, d), dtype=xp.float32) for s in (3, 4))
    cache.append(past, values)
    one = Q[:, 0].copy()
    P = cache.config.page
    pages = cache.decode(one).pages
    tokens = torch.tensor(np.array([np.concatenate([np.arange(P * x, min(P * x + P, n)) for x in p]) for p in pages]), device=q.device)
    gather = lambda x: torch.gather(as_torch(x), 1, tokens[..., None].expand(-1, -1, d))
    yield Case(f"decode, {tokens.shape[1]} of {n} tokens, {heads} heads of {d}", lambda: cache.decode(one).out, "gather and scaled_dot_product_attention",
               lambda: attention(as_torch(one)[:, None], gather(past), gather(values))[:, 0], 8 * heads * tokens.shape[1] * d, 4 * heads * tokens.shape[1] * d, 1e-4)
