"""kernels/lserve: block-sparse prefill and paged decoding against dense attention with a mask, bounds and selections by brute force, the cache's memory, bad input, the kernels under the sanitizers."""
import numpy as np
import pytest
import torch

from lib.cuda import Module, check
from lib.kernels import lserve
from lib.kernels.lserve import Cache, Config, block_lists, prefill, streaming_heads

CU, PY = "lib/kernels/lserve.cu", "lib/kernels/lserve.py"
BREAKS = [
    ("a page's score leaves out the negative half of a query", CU, "fmaxf(q[h * D + c] * low[at + c], q[h * D + c] * high[at + c])", "q[h * D + c] * high[at + c]"),
    ("unwritten logical pages are scored too", CU, "for (int l = 0; l * L < fill[page]; ++l)", "for (int l = 0; l < P / L; ++l)"),
    ("old sums do not fade when a larger score comes", CU, "acc = acc * fade + part;", "acc = acc + part;"),
    ("the next block is loaded while this one is read", CU, "        __syncthreads();                            // nobody reads this block any more\n", ""),
    ("later tokens are seen", CU, "s[r][j] = start + j <= row ? dot : LOW;", "s[r][j] = dot;"),
    ("the page being filled is not forced in", PY, "np.argsort(-bound[h][:last], kind=\"stable\")[:self.config.kept - 1]", "np.argsort(-bound[h], kind=\"stable\")[:self.config.kept]"),
    ("worst pages are kept", PY, "np.argsort(-bound[h]", "np.argsort(bound[h]"),
    ("streaming heads never give pages back", PY, "self.free.append(table.pop(number))", "pass"),
]
rng = np.random.default_rng(0)                # no kernel branches on values but through maxima: any data do
pytestmark = pytest.mark.usefixtures("compiler")
# float32 dot products of up to 64 terms and sums of up to a few hundred weights, against float64: relative errors of 1e-6 in a score of size 10 move a weight by 1e-5
TOL = dict(rtol=0, atol=2e-5)


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def attend(q, K, V):
    """One query over its keys in float64."""
    s = K.astype(float) @ q / len(q) ** 0.5
    w = np.exp(s - s.max())
    return w / w.sum() @ V


def masked(Q, K, V, first, list_, block):
    """torch's attention with the mask that the lists describe; queries that see nothing are NaN there."""
    heads, n, d = Q.shape
    blocks, mask, i = -(-n // block), np.zeros((heads, n, n), bool), np.arange(n)
    for h in range(heads):
        for b in range(blocks):
            for j in list_[first[h * blocks + b]:first[h * blocks + b + 1]]:
                mask[h, b * block:(b + 1) * block, j * block:(j + 1) * block] = True
    assert np.array_equal(lserve.block_mask(n, block, first, list_), mask & (i[:, None] >= i))
    K, V = (np.repeat(x, heads // len(x), 0) for x in (K, V))
    Q, K, V = (torch.from_numpy(x).double() for x in (Q, K, V))
    return torch.nn.functional.scaled_dot_product_attention(Q, K, V, attn_mask=torch.from_numpy(mask & (i[:, None] >= i))).numpy()


# --- prefill

@pytest.mark.parametrize("n, d, block, heads, kv", [(1, 1, 16, 1, 1), (17, 5, 16, 2, 1), (64, 64, 64, 1, 1), (130, 40, 32, 4, 2), (65, 33, 64, 3, 3), (100, 16, 48, 2, 2)])
def test_prefill_is_masked_attention(n, d, block, heads, kv):
    Q, K, V = f32(heads, n, d), f32(kv, n, d), f32(kv, n, d)
    streaming = np.arange(heads) % 2 == 1
    lists = block_lists(n, block, streaming, sink=block, local=block)
    out, blocks = prefill(Q, K, V, *lists, block, count=True)
    assert np.allclose(out, masked(Q, K, V, *lists, block), **TOL)
    assert blocks == lists[1].size


def test_dense_prefill_is_torch_s_causal_attention():
    Q, K, V = f32(2, 90, 32), f32(2, 90, 32), f32(2, 90, 32)
    out = prefill(Q, K, V, *block_lists(90, 32, [False, False]), 32)
    peer = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, (Q, K, V)), is_causal=True)
    assert np.allclose(out, peer.numpy(), **TOL)


def test_any_list_of_blocks_works():
    """Lists in any order, with gaps, and a query block that sees nothing."""
    Q, K, V = f32(1, 64, 8), f32(1, 64, 8), f32(1, 64, 8)
    first, list_ = np.array([0, 0, 1, 3, 6], np.int32), np.array([0, 2, 0, 3, 0, 1], np.int32)
    out, exact = prefill(Q, K, V, first, list_, 16), masked(Q, K, V, first, list_, 16)
    assert not out[:, :16].any() and np.allclose(out[:, 16:], exact[:, 16:], **TOL)
    assert not prefill(Q, K, V, np.zeros(5, np.int32), np.zeros(0, np.int32), 16).any()
    far = Q * np.float32(40)                                               # scores of hundreds: the running maximum keeps exp in range
    assert np.allclose(prefill(far, K, V, first, list_, 16)[:, 16:], masked(far, K, V, first, list_, 16)[:, 16:], rtol=0, atol=1e-3)


def test_block_lists_of_a_streaming_head():
    first, list_ = block_lists(10 * 16 - 3, 16, [True, False], sink=17, local=32)
    rows = [list_[first[b]:first[b + 1]].tolist() for b in range(20)]
    assert rows[0] == [0] and rows[4] == [0, 1, 2, 3, 4] and rows[5] == [0, 1, 3, 4, 5] and rows[9] == [0, 1, 7, 8, 9]
    assert rows[10:] == [list(range(b + 1)) for b in range(10)]
    assert block_lists(64, 16, [True], sink=0, local=0)[1].tolist() == [0, 1, 2, 3]


# --- gates

def test_streaming_heads_are_those_with_the_smallest_gates():
    gates = np.array([[0.1, 0.9, 0.2], [0.8, 0.7, 0.95]])
    assert streaming_heads(gates).tolist() == [[True, False, True], [False, True, False]]
    assert streaming_heads(gates, 1 / 3).sum() == 2 and streaming_heads(gates, 0).sum() == 0 and streaming_heads(gates, 1).all()
    assert streaming_heads([[0.1, 0.2, 0.3]]).tolist() == [[True, True, False]]                         # 1.5 heads: round half to even
    assert streaming_heads(np.full((2, 2), 0.5)).tolist() == [[True, True], [False, False]]            # ties: a whole layer
    for bad in ([0.5], [[1.5]], [[np.nan]]):
        with pytest.raises(ValueError, match="gates"):
            streaming_heads(bad)
    with pytest.raises(ValueError, match="share=1.5"):
        streaming_heads(gates, 1.5)


# --- the cache and decoding

def play(config, n, heads=4, kv=2, d=12, start=1, streaming=(False, True), steps=None):
    """Tokens in chunks and then one by one; yields (t, Decoded, q, K, V, cache) after every step."""
    Q, K, V = f32(n, heads, d), f32(kv, n, d), f32(kv, n, d)
    cache = Cache(list(streaming), d, config)
    for t in [start, *range(start + 1, n + 1)]:
        done = cache.length
        cache.append(np.ascontiguousarray(K[:, done:t]), np.ascontiguousarray(V[:, done:t]))
        yield t, cache.decode(Q[t - 1], count=True), Q[t - 1], K, V, cache


@pytest.mark.parametrize("start", [1, 30])
def test_decoding_is_exact_inside_the_selection(start):
    config = Config(page=8, logical=4, budget=24, interval=4, sink=8, local=8)
    for t, step, q, K, V, cache in play(config, 60, start=start):
        for h in range(4):
            seen = np.concatenate([np.arange(8 * p, min(8 * p + 8, t)) for p in step.pages[h]])
            assert np.allclose(step.out[h], attend(q[h], K[h // 2][seen], V[h // 2][seen]), **TOL), (t, h)
        tokens = [sum(min(8 * p + 8, t) - 8 * p for p in pages) for pages in step.pages]
        assert step.keys == sum(tokens)
        assert all(pages[-1] == (t - 1) // 8 for pages in step.pages), "the newest token is always seen"
        assert all(len(p) == min(3, (t - 1) // 8 + 1) for p in step.pages[2:]), "sink, local and the page being filled"
        assert all(len(p) == (3 if t > 24 else (t - 1) // 8 + 1) for p in step.pages[:2]) or t % 4 != 1 and 24 < t < 29


def test_budget_beyond_the_context_is_dense_attention():
    for t, step, q, K, V, _ in play(Config(page=16, logical=8, budget=64), 50, streaming=(False, False), start=20):
        dense = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(x).double() for x in (q[:, None], np.repeat(K[:, :t], 2, 0), np.repeat(V[:, :t], 2, 0))))
        assert np.allclose(step.out, dense.numpy()[:, 0], **TOL) and step.bounds == 0


def test_scores_are_bounds_and_the_selection_is_the_best_of_them():
    config = Config(page=8, logical=4, budget=24, interval=1)
    last = None
    for t, step, q, K, V, cache in play(config, 61, streaming=(False, False)):
        scores = cache.scores(q)
        for h in range(4):
            key = K[h // 2][:t].astype(float)
            for p, s in enumerate(scores[h]):
                parts = [key[i:min(i + 4, 8 * p + 8, t)] for i in range(8 * p, min(8 * p + 8, t), 4)]
                brute = [np.maximum(q[h] * x.min(0), q[h] * x.max(0)).sum() for x in parts]
                assert s == pytest.approx(max(brute), abs=1e-5)            # 12 products in float32
                assert s >= (key[8 * p:8 * p + 8] @ q[h]).max() - 1e-5 and s <= np.maximum(q[h] * np.concatenate(parts).min(0), q[h] * np.concatenate(parts).max(0)).sum() + 1e-5
            if t > 24:
                newest = (t - 1) // 8
                best = sorted(range(newest), key=lambda p: -scores[h][p])[:2]
                assert step.pages[h].tolist() == sorted([*best, newest])
        last = step
    assert last.bounds == 4 * 16                                           # four heads, 61 tokens are begun logical pages: 16 of 4


def test_negative_scores_do_not_lose_to_unwritten_pages():
    """All keys point away from the query: true bounds are negative, and a logical page of zeros would win."""
    cache = Cache([False], 4, Config(page=8, logical=4, budget=16, interval=1))
    K = -np.abs(f32(1, 41, 4)) - 1
    cache.append(K, f32(1, 41, 4))
    (scores,) = cache.scores(np.ones((1, 4), np.float32))
    assert len(scores) == 6 and (scores < -3.9).all()


def test_a_tiny_budget_keeps_three_pages_and_far_scores_do_not_overflow():
    """Scores from 700 down to -700 and back: only a running maximum keeps every exp in range."""
    cache, K, V = Cache([False], 1, Config(page=4, logical=2, budget=8, interval=1)), np.zeros((1, 20, 1), np.float32), f32(1, 20, 1)
    K[0, :, 0] = np.repeat([700, -700, 0, -700, 690], 4)
    cache.append(K, V)
    step = cache.decode(np.ones((1, 1), np.float32))
    assert step.pages[0].tolist() == [0, 2, 4]
    seen = np.r_[0:4, 8:12, 16:20]
    assert np.allclose(step.out[0], attend(np.ones(1), K[0, seen], V[0, seen]), **TOL)
    for streaming, local in ((True, 100), (False, 0)):                     # and all pages in order, through a low one
        cache = Cache([streaming], 1, Config(page=4, logical=2, budget=100, local=local))
        cache.append(K, V)
        assert np.allclose(cache.decode(np.ones((1, 1), np.float32)).out[0], attend(np.ones(1), K[0], V[0]), **TOL)


def test_the_selector_runs_when_its_interval_says_so():
    config = Config(page=8, logical=8, budget=8, interval=4)
    ran = [t for t, step, *_ in play(config, 70, start=9, streaming=(False, False)) if step.bounds]
    assert ran == [9, *range(13, 71, 4)], "earlier tokens are a multiple of 4: at t - 1 = 8, 12, ..."
    for t, step, *_ in play(Config(page=8, logical=8, budget=8, interval=5), 40, start=10, streaming=(False, False)):
        if any(p[-1] != (t - 1) // 8 for p in step.pages):
            break                                                          # an interval that does not divide the page misses the newest page
    else:
        raise AssertionError("interval 5 should have missed a page")


def test_memory_of_streaming_heads_is_constant():
    held, dense = [], []
    for t, step, *_, cache in play(Config(page=8, logical=4, sink=16, local=16), 200, streaming=(True, True)):
        held.append(cache.held)
        dense.append(len(step.pages[0]))
    assert max(held) == 2 * (2 + 2 + 1) == held[-1] and max(dense) == 5
    assert len(cache.fill) <= 16, "pages are used again"
    mixed = [c.held for *_, c in play(Config(page=8, logical=4, sink=16, local=16), 200)][-1]
    assert mixed == 25 + 5
    release = Config()
    assert release.kept == 64 and -(-release.sink // 64) + -(-release.local // 64) + 1 == 7


def test_chunks_do_not_matter():
    K, V, q = f32(2, 77, 8), f32(2, 77, 8), f32(4, 8)
    outs = []
    for cuts in ([77], [1] * 77, [5, 40, 0, 32]):
        cache, at = Cache([False, True], 8, Config(page=16, logical=4, budget=32, sink=16, local=16)), 0
        for m in cuts:
            if m:
                cache.append(np.ascontiguousarray(K[:, at:at + m]), np.ascontiguousarray(V[:, at:at + m]))
            at += m
        outs.append(cache.decode(q).out)
    assert np.array_equal(outs[0], outs[1]) and np.array_equal(outs[0], outs[2])


# --- bad input

def test_bad_input_is_named_and_changes_nothing():
    for bad, match in [(dict(page=65), "page=65"), (dict(page=16, logical=5), "logical=5"), (dict(budget=0), "budget=0"), (dict(interval=0), "interval=0"), (dict(sink=-1), "sink=-1"), (dict(local=1.5), "local=1.5"), (dict(page=True), "page=True")]:
        with pytest.raises(ValueError, match=match):
            Config(**bad)
    with pytest.raises(ValueError, match="head_size=65"):
        Cache([True], 65)
    with pytest.raises(ValueError, match="streaming"):
        Cache([[True]], 4)
    cache = Cache([False, True], 4, Config(page=8, logical=4))
    with pytest.raises(ValueError, match="no token"):
        cache.decode(f32(2, 4))
    good = f32(2, 3, 4)
    cache.append(good, good)
    nan = good.copy()
    nan[1, 2, 3] = np.nan
    for k, v, error, match in [(good.astype(np.float64), good, TypeError, "k: should be an array of float32, has float64"), (good, good[:, :2], ValueError, "v: should have shape"), (good[:1], good, ValueError, "k: should have shape"),
                               (good[:, :, ::-1], good, ValueError, "k: should be contiguous"), (good, nan, ValueError, "v: should be finite"), (good[:, :0], good[:, :0], ValueError, "k: should have shape"), ([1.0], good, TypeError, "k: .*was list")]:
        with pytest.raises(error, match=match):
            cache.append(k, v)
    for q, error, match in [(f32(3, 4), ValueError, "q: 3 heads"), (f32(2, 5), ValueError, "q: should have shape"), (f32(2, 4).astype(np.float16), TypeError, "q: should be an array of float32")]:
        with pytest.raises(error, match=match):
            cache.decode(q)
    assert cache.length == 3 and cache.held == 2 and cache.chosen is None
    Q = f32(2, 20, 4)
    lists = block_lists(20, 16, [False, False])
    for call, match in [(lambda: prefill(Q, Q, Q, *lists, 20), "block=20"), (lambda: prefill(f32(3, 20, 4), Q, Q, *lists, 16), "Q: 3 heads"), (lambda: prefill(f32(1, 4, 65), f32(1, 4, 65), f32(1, 4, 65), *lists, 16), "head size 65"),
                        (lambda: prefill(Q, Q, Q, lists[0][:-1], lists[1], 16), "first, list_"), (lambda: prefill(Q, Q, Q, lists[0], lists[1] + 1, 16), "first, list_"), (lambda: block_lists(0, 16, [True]), "tokens=0")]:
        with pytest.raises(ValueError, match=match):
            call()


# --- sanitizers

def test_kernels_are_clean():
    """Tiny odd sizes: 17 queries in two blocks, 5 channels, a page that is half full."""
    kernels = Module.from_file(lserve.Path(lserve.__file__).with_suffix(".cu"))
    Q, counts = f32(1, 17, 5), np.zeros(3, np.uint64)
    first, list_ = block_lists(17, 16, [False])
    report = check(kernels["prefill"], (2, 1), (16, 16), (Q, Q, Q, first, list_, np.zeros_like(Q), 17, 5, 16, 1, np.float32(0.4), counts))
    assert report.clean, str(report)
    pool, fill, low, high = f32(2, 4, 5), np.array([4, 3], np.int32), f32(2, 2, 5), f32(2, 2, 5)
    pages, ends = np.array([0, 1], np.int32), np.array([0, 2], np.int32)
    for name, grid, args in [("page_stats", 2, (pool, fill, pages, low, high, 4, 2, 5)), ("page_scores", (1, 1), (f32(1, 5), low, high, fill, pages, ends, np.zeros(2, np.float32), 4, 2, 5, counts)),
                             ("decode", 1, (f32(1, 5), pool, pool, fill, pages, ends, np.zeros((1, 5), np.float32), 4, 5, np.float32(0.4), counts))]:
        report = check(kernels[name], grid, 64, args)
        assert report.clean, f"{name}: {report}"
