"""LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention (Yang, Guo, Tang, Hu, Xiao, Tang, Lin, Liu, Lu, Han; 2025, arXiv:2502.14866).

Implemented: which heads become streaming heads; prefill over a list of key blocks for each block of queries (one kernel for dense, streaming and any other block-sparse head); a paged cache in which streaming heads keep sink
and local pages only; and decoding, where dense heads read the pages that hierarchical min/max scores choose, anew every few tokens. The kernels are in lserve.cu and run where the arrays are.

| symbol | name | shape |
|---|---|---|
| $q$, $K$, $V$ | `q`; `K`, `V` | [heads, D]; [KV heads, tokens, D], float32, after the rotation by position (RoPE) |
| $N_P$, $N_L$ | Config.page, Config.logical | tokens of a page and of a logical page |
| $k^{min}$, $k^{max}$ | Cache.low, Cache.high | [pages, N_P / N_L, D] |
| $s_{phys}$ | Cache.scores(q, h) | [pages of the head], bounds on $q \\cdot k$ |
| $\\alpha$ | `gates` | [layers, KV heads], in [0, 1]: how much a head needs the whole past |

Deviations from the paper
- Nothing is quantized (the system has W4A8 or W8A8 weights and a 4- or 8-bit cache), and no tensor cores are used. Head sizes up to 64, pages up to 64 tokens.
- The gates come from elsewhere (the paper trains them as DuoAttention does). Ties at the quantile are broken by the order of the heads, not by noise.
- The order of the scores is found on the host. Selection follows the released code: for each query head, the page being filled is forced in, the first page is not.

Cost of a decoding step: streaming head at most sink + local + page keys; dense head `budget` keys, and every `interval` steps N / N_L bounds of 2 D multiplications.
"""
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from lib.cuda import Module, launch

MAX_D = MAX_PAGE = 64


@dataclass(frozen=True)
class Config:
    """Defaults are the released ones, in tokens. page: at most 64, a multiple of logical; budget: of a dense head in a decoding step; interval: steps from one selection to the next;
    sink, local: what a streaming head sees in decoding, kept in whole pages. Raises ValueError."""
    page: int = 64
    logical: int = 16
    budget: int = 4096
    interval: int = 4
    sink: int = 128
    local: int = 256

    def __post_init__(self):
        for name, low in (("page", 1), ("logical", 1), ("budget", 1), ("interval", 1), ("sink", 0), ("local", 0)):
            _integer(name, getattr(self, name), low)
        if self.page > MAX_PAGE or self.page % self.logical:
            raise ValueError(f"page={self.page}, logical={self.logical}: a page should have at most {MAX_PAGE} tokens and be a multiple of a logical page")

    @property
    def kept(self):
        """Pages that a dense head reads when its past is longer than the budget."""
        return max(3, self.budget // self.page)


def streaming_heads(gates, share=0.5):
    """Which heads become streaming heads: the `share` of all heads of all layers with the smallest gates. gates: [layers, KV heads] -> bool of that shape. Raises ValueError."""
    gates = np.asarray(gates, dtype=float)
    if gates.ndim != 2 or not ((gates >= 0) & (gates <= 1)).all():
        raise ValueError(f"gates: should be [layers, KV heads] in 0..1, has shape {gates.shape} and values {gates.ravel()[:4]}")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share!r}: should be from 0 to 1")
    mask = np.zeros(gates.size, bool)
    mask[np.argsort(gates, axis=None, kind="stable")[:round(share * gates.size)]] = True
    return mask.reshape(gates.shape)


def block_lists(tokens, block, streaming, sink=128, local=8192):
    """The block iterator of a prefill: key blocks that each block of queries of each head reads, as (first, list) int32, see lserve.cu.

    streaming: [heads] bool. A streaming head reads the blocks that hold its `sink` first tokens and those of its `local` latest ones, whole; a dense head all up to its own."""
    _integer("tokens", tokens, 1), _integer("block", block, 1), _integer("sink", sink, 0), _integer("local", local, 0)
    n, lists = -(-tokens // block), []
    for alone in np.asarray(streaming, dtype=bool):
        for b in range(n):
            sinks, near = -(-sink // block), -(-local // block)
            lists.append([j for j in range(b + 1) if not alone or j < sinks or j >= b - near])
    return _csr(lists)


def block_mask(tokens, block, first, list_):
    """The same lists as a mask: [heads, tokens, tokens] bool, True where a query sees a key."""
    n = -(-tokens // block)
    seen = np.zeros(((len(first) - 1) // n * n, n), bool)
    seen[np.repeat(np.arange(len(seen)), np.diff(first)), list_] = True
    return np.tril(np.kron(seen.reshape(-1, n, n), np.ones((1, block, block), bool))[:, :tokens, :tokens])


def prefill(Q, K, V, first, list_, block=64, count=False):
    """Causal attention over listed key blocks. Q: [heads, N, D]; K, V: [KV heads, N, D]; block: 16, 32, 48 or 64. -> [heads, N, D], and with `count` the number of blocks read.

    A query whose list shows it no key gets zeros. Raises TypeError and ValueError before anything runs."""
    heads, n, d = _check("Q", Q, (None, None, None))
    kv = _check("K", K, (None, n, d))[0]
    _check("V", V, (kv, n, d))
    if heads % kv:
        raise ValueError(f"Q: {heads} heads should be a multiple of the {kv} of K")
    if block not in (16, 32, 48, 64):
        raise ValueError(f"block={block!r}: should be 16, 32, 48 or 64 keys")
    blocks = -(-n // block)
    first, list_ = np.ascontiguousarray(first, np.int32), np.ascontiguousarray(list_, np.int32)
    if first.shape != (heads * blocks + 1,) or first[0] != 0 or (np.diff(first) < 0).any() or first[-1] != list_.size or (list_.size and not 0 <= list_.min() <= list_.max() < blocks):
        raise ValueError(f"first, list_: should list blocks below {blocks} for {heads} x {blocks} blocks of queries, see block_lists(); first has shape {first.shape}")
    out, counts = np.zeros_like(Q), np.zeros_like(Q, dtype=np.uint64, shape=3)
    launch(_kernels(count)["prefill"], (-(-n // 16), heads), (16, 16), (Q, K, V, _like(Q, first), _like(Q, list_ if list_.size else np.zeros(1, np.int32)), out, n, d, block, heads // kv, np.float32(d ** -0.5), counts))
    return (out, int(counts[0])) if count else out


@dataclass(frozen=True)
class Decoded:
    """out: [heads, D]. pages: for each head, the numbers of the pages that it read (0 holds the first tokens). Counted: keys read, bounds of logical pages computed."""
    out: np.ndarray
    pages: tuple
    keys: int
    bounds: int


class Cache:
    """The keys and values of one layer, in pages. streaming: [KV heads] bool; like: an array whose kind (NumPy or CuPy) the cache takes. Raises ValueError."""

    def __init__(self, streaming, head_size, config=None, like=None):
        self.streaming, self.length = np.asarray(streaming, dtype=bool), 0
        self.config = config = config or Config()
        self.kv, self.d = self.streaming.size, _integer("head_size", head_size, 1)
        if self.streaming.ndim != 1 or self.kv == 0 or self.d > MAX_D:
            raise ValueError(f"streaming, head_size={head_size!r}: should be [KV heads], and at most {MAX_D}; streaming has shape {self.streaming.shape}")
        self.free, self.table = [], [{} for _ in range(self.kv)]                   # page number -> place in the pool
        empty = np.zeros(0, np.float32) if like is None else like
        zeros = lambda *shape, of=np.float32: np.zeros_like(empty, dtype=of, shape=shape)
        self.K, self.V = zeros(0, config.page, self.d), zeros(0, config.page, self.d)
        self.low, self.high = (zeros(0, config.page // config.logical, self.d) for _ in range(2))
        self.fill, self.chosen = zeros(0, of=np.int32), None

    @property
    def held(self):
        """Pages in use, of all heads."""
        return len(self.fill) - len(self.free)

    def _page(self):
        if not self.free:
            more, n = max(8, len(self.fill)), len(self.fill)
            for name in ("K", "V", "low", "high", "fill"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old, shape=(more, *old.shape[1:]))]))
            self.free = list(range(n + more - 1, n - 1, -1))
        return self.free.pop()

    def append(self, k, v):
        """Store m more tokens. k, v: [KV heads, m, D] float32. Streaming heads give pages back that have left their window. Raises TypeError and ValueError, and stores nothing then."""
        m = _check("k", k, (self.kv, None, self.d))[1]
        _check("v", v, (self.kv, m, self.d))
        P, touched = self.config.page, []
        for h, table in enumerate(self.table):
            for number in range(self.length // P, -(-(self.length + m) // P)):
                if number not in table:
                    table[number] = self._page()
                at, start, stop = table[number], max(self.length, number * P), min(self.length + m, (number + 1) * P)
                self.K[at, start - number * P:stop - number * P] = k[h, start - self.length:stop - self.length]
                self.V[at, start - number * P:stop - number * P] = v[h, start - self.length:stop - self.length]
                self.fill[at] = stop - number * P
                touched += [] if self.streaming[h] else [at]
            if self.streaming[h]:
                last = (self.length + m - 1) // P
                for number in [x for x in table if x not in self._window(last)]:
                    self.free.append(table.pop(number))
        self.length += m
        if touched:
            launch(_kernels(False)["page_stats"], len(touched), 64, (self.K, self.fill, _like(k, np.array(touched, np.int32)), self.low, self.high, P, self.config.logical, self.d))

    def _window(self, last):
        """Pages of a streaming head: those of the sink, the local ones, and the one being filled."""
        P = self.config.page
        return {x for x in range(last + 1) if x < -(-self.config.sink // P) or x >= last - -(-self.config.local // P)}

    def scores(self, q, count=None):
        """s_phys of all complete and begun pages of the dense heads, [heads] lists of [pages] (empty for streaming heads). q: [heads, D]."""
        group = self._heads(q)
        lists = [[] if self.streaming[h // group] else [self.table[h // group][x] for x in sorted(self.table[h // group])] for h in range(len(q))]
        first, list_ = _csr(lists)
        out, counts = np.zeros_like(q, shape=max(1, len(list_))), np.zeros_like(q, dtype=np.uint64, shape=3)
        if len(list_):
            launch(_kernels(count is not None)["page_scores"], (-(-max(map(len, lists)) // 64), len(q)), 64,
                   (q, self.low, self.high, self.fill, _like(q, list_), _like(q, first), out, self.config.page, self.config.logical, self.d, counts))
        if count is not None:
            count.append(int(counts[1]))
        return np.split(_host(out)[:len(list_)], first[1:-1])

    def select(self, q, count=None):
        """Page numbers for each head: the page being filled, and the best earlier ones; all where the past fits the budget; the window of a streaming head."""
        group, last, chosen = self._heads(q), (self.length - 1) // self.config.page, []
        bound = self.scores(q, count) if self.length > self.config.budget and not self.streaming.all() else None
        for h in range(len(q)):
            if self.streaming[h // group]:
                chosen.append(np.array(sorted(self._window(last))))
            elif bound is None:
                chosen.append(np.arange(last + 1))
            else:
                best = np.argsort(-bound[h][:last], kind="stable")[:self.config.kept - 1]
                chosen.append(np.sort(np.append(best, last)))
        return chosen

    def decode(self, q, count=False):
        """Attention of the newest token, whose key and value are stored already. q: [heads, D] float32, heads a multiple of the KV heads. -> Decoded. Raises TypeError and ValueError.

        The selector runs when the number of earlier tokens is a multiple of `interval`, or has never run; in between its pages are used again."""
        group, bounds, earlier = self._heads(q), [], self.length - 1
        if self.length == 0:
            raise ValueError("q: there is no token to attend to, append() comes first")
        if self.chosen is None or len(self.chosen) != len(q) or earlier % self.config.interval == 0:
            self.chosen = self.select(q, bounds if count else None)
        last, pages = earlier // self.config.page, []
        for h, old in enumerate(self.chosen):
            whole = self.streaming[h // group] or self.length <= self.config.budget
            pages.append(old if not whole else np.array(sorted(self._window(last))) if self.streaming[h // group] else np.arange(last + 1))
        first, list_ = _csr([[self.table[h // group][x] for x in p] for h, p in enumerate(pages)])
        out, counts = np.zeros_like(q), np.zeros_like(q, dtype=np.uint64, shape=3)
        launch(_kernels(count)["decode"], len(q), 64, (q, self.K, self.V, self.fill, _like(q, list_), _like(q, first), out, self.config.page, self.d, np.float32(self.d ** -0.5), counts))
        return Decoded(out, tuple(pages), int(counts[2]), sum(bounds))

    def _heads(self, q):
        heads = _check("q", q, (None, self.d))[0]
        if heads % self.kv:
            raise ValueError(f"q: {heads} heads should be a multiple of the {self.kv} KV heads")
        return heads // self.kv


@cache
def _kernels(count):
    module = Module.from_file(Path(__file__).with_suffix(".cu"))
    return Module('#define COUNT_WORK\n#line 1 "lserve.cu"\n' + module.source, module.filename) if count else module


def _csr(lists):
    first = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int32)
    return first, np.array([x for l in lists for x in l], np.int32)


def _like(x, array):
    return array if isinstance(x, np.ndarray) else np.asarray(array, like=x)


def _host(x):
    return x.get() if hasattr(x, "get") else x


def _integer(name, n, low):
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < low:
        raise ValueError(f"{name}={n!r}: should be an integer >= {low}")
    return int(n)


def _check(name, x, shape):
    """The shape of a contiguous, finite float32 array of this shape (None: any)."""
    if getattr(x, "dtype", None) != np.float32:
        raise TypeError(f"{name}: should be an array of float32, {'has ' + str(x.dtype) if hasattr(x, 'dtype') else 'was ' + type(x).__name__}")
    if x.ndim != len(shape) or 0 in x.shape or any(want not in (None, n) for want, n in zip(shape, x.shape)):
        raise ValueError(f"{name}: should have shape {tuple('any' if s is None else s for s in shape)} and no axis of length 0, has {x.shape}")
    if shape[-1] is None and x.shape[-1] > MAX_D:
        raise ValueError(f"{name}: head size {x.shape[-1]}, these kernels serve up to {MAX_D}")
    if not x.flags.c_contiguous:
        raise ValueError(f"{name}: should be contiguous in C order")
    if not bool(np.isfinite(x).all()):
        raise ValueError(f"{name}: should be finite, has NaN or infinity")
    return x.shape
