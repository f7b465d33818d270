"""Uniformly random subsets of fixed size, for a million users at once, kept as bits.

Subset-based mechanisms draw, for every user, `size` of `m` elements without replacement. Drawing a key per element and sorting costs n*m keys; here a user costs
m/64 machine words. How: cut [m] into two halves; the number that falls into the left half is hypergeometric; given that number, each half is uniform among its
subsets of that size. Halves come from a pool of independent coin flips (64 elements a word): given how many heads a pool row has, it is uniform among the subsets
of that size, so it may serve any user who needs that many. Rows are matched to users by their count alone, each is used once, and nothing else about a row
decides whether it is used: the result is exactly uniform, whatever the coin's bias. A bias near size/m only makes matches frequent.
"""
from dataclasses import dataclass

import numpy as np

_COIN_BITS = 6          # the coin's bias is a multiple of 1/64
_ROUNDS = 6             # pools to draw before the few users with rare counts are served by sorting


def _coins(rng, shape, share):
    """uint64 words whose bits are independent with P(1) = `share` rounded to a multiple of 1/64, at least one of them and at most 63."""
    c = int(np.clip(round(share * 2**_COIN_BITS), 1, 2**_COIN_BITS - 1))
    digits = [c >> i & 1 for i in range(_COIN_BITS)]
    digits = digits[digits.index(1):]                   # trailing zeros halve nothing
    words = None
    for digit in digits:                                # p <- (digit + p) / 2
        draw = rng.integers(0, 2**64, size=shape, dtype=np.uint64)
        words = draw if words is None else words | draw if digit else words & draw
    return words


def _rows(rng, sizes, m):
    """Row i: a uniformly random subset of [m] with sizes[i] elements, as bits.  sizes: (n,) -> (n, ceil(m/64)) uint64"""
    n, width = len(sizes), -(-m // 64)
    out = np.zeros((n, width), np.uint64)
    if m == 0:
        return out
    tail = np.uint64(2**64 - 1 >> -m % 64)
    waiting = np.arange(n)
    for _ in range(_ROUNDS):
        if len(waiting) < 64:
            break
        need = sizes[waiting].astype(np.int16 if m < 2**15 else np.int64)               # short integers sort by radix
        pool = _coins(rng, (len(waiting), width), need.mean() / m)
        pool[:, -1] &= tail
        have = np.bitwise_count(pool).sum(axis=1, dtype=need.dtype)
        by_need, by_have = np.argsort(need, kind="stable"), np.argsort(have, kind="stable")
        wanted, there = (np.bincount(x, minlength=m + 1) for x in (need, have))
        value = need[by_need]
        rank = np.arange(len(value)) - (np.cumsum(wanted) - wanted)[value]      # the how-manieth user who needs this count
        served = rank < there[value]
        rows = by_have[((np.cumsum(there) - there)[value] + rank)[served]]
        out[waiting[by_need[served]]] = pool[rows]
        waiting = waiting[by_need[~served]]
    for part in np.array_split(waiting, max(1, len(waiting) * m // 2**22)):     # at most 4 M keys at a time
        order = np.argsort(rng.random((len(part), m)), axis=1).argsort(axis=1)
        out[part] = _pack(order < sizes[part][:, None])
    return out


def _pack(mask):
    """(n, m) bool -> (n, ceil(m/64)) uint64, element i in bit i."""
    n, m = mask.shape
    padded = np.zeros((n, -(-m // 64) * 64), bool)
    padded[:, :m] = mask
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint64)


@dataclass(frozen=True)
class Subsets:
    """n subsets of [m], `size` elements each, as bits: the two halves of [m] start at a word of their own.  bits: (n, words) uint64"""
    m: int
    size: int
    bits: np.ndarray

    def __len__(self):
        return len(self.bits)

    @property
    def place(self):
        """Position of each element's bit in a row.  (m,) int64"""
        half = self.m // 2
        element = np.arange(self.m)
        return np.where(element < half, element, element - half + -(-half // 64) * 64)

    def contains(self, elements):
        """Is elements[i] in subset i?  (n,) -> (n,) bool"""
        at = self.place[elements]
        return (self.bits[np.arange(len(self)), at >> 6] >> (at & 63).astype(np.uint64) & np.uint64(1)).astype(bool)

    def mask(self):
        """(n, m) bool; for tests and small n."""
        return np.unpackbits(self.bits.view(np.uint8), axis=1, bitorder="little")[:, self.place].astype(bool)

    def counts(self):
        """In how many subsets each element is.  (m,) int64"""
        total = np.zeros(self.bits.shape[1] * 64, np.int64)
        for start in range(0, len(self), 255):           # eight byte-wide counters ride in a word; they hold up to 255
            flat = np.unpackbits(np.ascontiguousarray(self.bits[start:start + 255]).view(np.uint8), axis=1, bitorder="little")
            total += np.add.reduce(flat.view(np.uint64), axis=0).view(np.uint8)
        return total[self.place]


def uniform_subsets(rng, n, m, size) -> Subsets:
    """n independent subsets of [m], each uniform among those with `size` elements.

    rng: np.random.Generator; 1 <= size <= m. Expected cost O(n m / 64) words.
    """
    left = m // 2
    sizes = rng.hypergeometric(left, m - left, size, n) if left else np.zeros(n, np.int64)
    return Subsets(m, size, np.concatenate([_rows(rng, sizes, left), _rows(rng, size - sizes, m - left)], axis=1))


def force(rng, subsets: Subsets, elements, inside) -> Subsets:
    """Condition subset i on containing elements[i] (inside[i]) or not: swap it with a random element where it is on the wrong side.

    Uniform subsets stay uniform given the condition: by symmetry, exchanging the element with a uniformly chosen one from the other side maps each subset
    without the element to each subset with it equally often.  elements: (n,) int; inside: (n,) bool
    """
    m, place = subsets.m, subsets.place
    bits = subsets.bits.copy()
    wrong = np.flatnonzero(subsets.contains(elements) != inside)
    one = np.uint64(1)
    at = place[elements[wrong]]
    bits[wrong, at >> 6] ^= one << (at & 63).astype(np.uint64)
    while len(wrong):                                    # rejection: a random element that is on the side to be left
        pick = rng.integers(0, m, len(wrong))
        at = place[pick]
        word, bit = at >> 6, one << (at & 63).astype(np.uint64)
        holds = (bits[wrong, word] & bit) != 0
        good = (holds == inside[wrong]) & (pick != elements[wrong])
        bits[wrong[good], word[good]] ^= bit[good]
        wrong = wrong[~good]
    return Subsets(m, subsets.size, bits)
