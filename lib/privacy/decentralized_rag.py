"""A Decentralized Retrieval Augmented Generation System with Source Reliabilities Secured on Blockchain (2025, arXiv:2511.07577).

Independent sources answer queries; each has two integer scores, reliability and usefulness, on a public ledger. Usefulness decides who is asked, reliability whose passages reach the
reader, and what the reader made of a passage changes both. Here: importance by leaving one out, the feedback rule, sampling and ranking, a simulation of many worlds at once, and a
signed, hash-chained ledger with the rules of the released contract (and stricter ones).

| symbol | name | shape |
|---|---|---|
| M, N, T | `pollution`, `worlds`, `queries` | sources, independent worlds, queries one after the other |
| R_m, U_m | `reliability`, `usefulness` | (N, M) int64 |
| w | `weight` | share of reliability in the ranking |
| sigma_i | `similarity` | (..., n) likeness of the answer without passage i to the full answer |
| I_i | `importance(...)` | (..., n), sums to one |
| U_0 | `start` | usefulness at registration, which the registrant chooses |

Deviations from the paper: no language model; the reader takes the answer with the largest total weight, so that the likeness of two answers is 0 or 1. A retriever's scores are drawn:
near 1 for the passage that answers, near 0.4 for the two others. One segment a passage (the release splits sentences, and lets the question's own segment count for the last passage).
Signatures are HMAC-SHA256 instead of ECDSA: whoever verifies could sign. Ours: the exploration floor, and `Ledger(strict=True)`.
Cost: O(T) steps of O(N M) each; the ledger verifies in O(events).
"""
import hashlib
import hmac
import json
from dataclasses import dataclass

import numpy as np

PASSAGES, TOP, RETRIEVERS = 3, 3, 3                                                # of a source, in the prompt, sampled sources


class LedgerError(ValueError):
    """A signature, a score or the chain of hashes is not what it should be. Nothing was written."""


# --- scores

def importance(similarity) -> np.ndarray:
    """Leave-one-out weights, (max sigma - sigma_i) / sum; all equal: uniform.  (..., n) -> (..., n)

    What the release computes in three steps: phi_i = mean of the other sigmas - sigma_i, shifted so that the smallest is 0, divided by the sum.
    """
    sigma = np.asarray(similarity, dtype=float)
    if not (np.isfinite(sigma).all() and sigma.ndim and sigma.shape[-1] >= 2):
        raise ValueError(f"similarity={similarity!r}: expected finite numbers (..., n) with n >= 2")
    gap = sigma.max(axis=-1, keepdims=True) - sigma
    total = gap.sum(axis=-1, keepdims=True)
    return np.where(total > 0, gap / np.where(total > 0, total, 1), 1 / sigma.shape[-1])


def feedback(weights, grounded, correct):
    """What each passage changes, (reliability, usefulness), for s = round(100 I) points.

    weights: (..., n), grounded: (..., n) bool, correct: (...) bool -> two int64 (..., n)
    """
    s = np.rint(100 * np.asarray(weights)).astype(np.int64)
    signed = np.where(np.asarray(correct)[..., None], s, -s)
    # usefulness does not ask whether the answer was right
    return np.where(grounded, signed, 0), np.where(grounded, s, -s)


def sample_sources(usefulness, rng, n=RETRIEVERS, floor=0.0) -> np.ndarray:
    """Who is asked: n draws with replacement in proportion to max(0, U), uniform if no U is positive.  (N, M) -> (N, M) bool

    floor: (N,) or scalar, share of the probability that is spread evenly (ours; 0 in the release). If there are no more than n sources, all are asked.
    """
    worlds, m = usefulness.shape
    if m <= n:
        return np.ones((worlds, m), bool)
    p = np.maximum(usefulness, 0).astype(float)
    total = p.sum(axis=1, keepdims=True)
    p = np.where(total > 0, p / np.where(total > 0, total, 1), 1 / m)
    p = (1 - np.reshape(floor, (-1, 1))) * p + np.reshape(floor, (-1, 1)) / m
    draw = rng.random((worlds, n, 1)) * p.sum(axis=1)[:, None, None]               # the sum is 1 but for round-off
    picked = (np.cumsum(p, axis=1)[:, None, :] <= draw).sum(axis=2).clip(max=m - 1)
    asked = np.zeros((worlds, m), bool)
    asked[np.arange(worlds)[:, None], picked] = True
    return asked


def _minmax(x, among):
    low, high = (f(np.where(among, x, worst), axis=1, keepdims=True) for f, worst in ((np.min, np.inf), (np.max, -np.inf)))
    return np.where(among & (high > low), (x - low) / np.where(high > low, high - low, 1), 0.0)


def rank(relevance, reliability, among, weight):
    """Combined score (1 - w) minmax(relevance) + w minmax(R) over the candidates `among`, and the indices of the best TOP.  (N, C) each, weight (N,) -> (N, C), (N, TOP)"""
    w = np.reshape(weight, (-1, 1))
    score = (1 - w) * _minmax(relevance, among) + w * _minmax(reliability, among)
    return score, np.argsort(np.where(among, -score, np.inf), axis=1, kind="stable")[:, :TOP]


def read(says, weight):
    """The stand-in for a language model: the answer with the largest total weight; -1 if no passage answers.  says: (..., n) int, -1 for "nothing to the point" -> (...)"""
    votes = np.where(says[..., :, None] == says[..., None, :], weight[..., None, :], 0).sum(axis=-1)
    best = np.argmax(np.where(says >= 0, votes, -1.0), axis=-1)
    return np.take_along_axis(says, best[..., None], axis=-1)[..., 0]


def without_each(says):
    """What is left when one passage is taken out: row i lacks passage i.  (..., n) -> (..., n, n)"""
    return np.where(np.eye(says.shape[-1], dtype=bool), -1, says[..., None, :])


# --- many worlds at once

@dataclass(frozen=True)
class World:
    """N worlds. truth: (N, Q) answers; says: (N, M, Q) what each source answers to each question."""
    truth: np.ndarray
    says: np.ndarray


def make_worlds(pollution, worlds, rng, questions=1000, answers=20) -> World:
    """Source m gives a wrong answer, uniform among the others, to a share pollution[m] of the questions (each independently).  pollution: (M,) in [0, 1]"""
    share = np.asarray(pollution, dtype=float)
    if share.ndim != 1 or share.size == 0 or not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"pollution={pollution!r}: expected (M,) numbers in [0, 1]")
    truth = rng.integers(0, answers, (worlds, questions))
    shape = (worlds, len(share), questions)
    wrong = (truth[:, None] + rng.integers(1, answers, shape)) % answers
    return World(truth, np.where(rng.random(shape) < share[:, None], wrong, truth[:, None]))


@dataclass(frozen=True)
class History:
    """correct, answered by query: (N, T) bool; reliability, usefulness after each query: (N, T, M); changes: (N, T, M, 2)"""
    correct: np.ndarray
    reliability: np.ndarray
    usefulness: np.ndarray


def simulate(world, queries, rng, start=1000, weight=0.5, floor=0.0, sampling="usefulness") -> History:
    """`queries` random questions to each world, one after the other.

    start, weight, floor: scalars or (N,), one for each world. sampling: "usefulness", "uniform" (sources by lot, scores learned but not used for the lot) or "all" (one pool).
    """
    n, m, _ = world.says.shape
    start, weight, floor = (np.broadcast_to(np.asarray(x), (n,)) for x in (start, weight, floor))
    for name, x in (("weight", weight), ("floor", floor)):
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError(f"{name}={x!r}: expected numbers in [0, 1]")
    if start.dtype.kind not in "iu" or np.abs(start).max() >= 2**31:
        raise ValueError(f"start={start!r}: expected integers of 32 bits")
    if sampling not in ("usefulness", "uniform", "all"):
        raise ValueError(f"sampling={sampling!r}: expected 'usefulness', 'uniform' or 'all'")
    R, U = np.zeros((n, m), np.int64), np.repeat(start[:, None], m, axis=1).astype(np.int64)
    out, rows = History(np.zeros((n, queries), bool), *(np.zeros((n, queries, m), np.int64) for _ in range(2))), np.arange(n)[:, None]
    for t in range(queries):
        q = rng.integers(0, world.truth.shape[1], n)
        asked = np.ones((n, m), bool) if sampling == "all" else sample_sources(U if sampling == "usefulness" else np.ones_like(U), rng, floor=floor)
        relevance = np.tile([1.0] + [0.4] * (PASSAGES - 1), m) + 0.1 * rng.standard_normal((n, PASSAGES * m))
        score, top = rank(relevance, np.repeat(R, PASSAGES, axis=1), np.repeat(asked, PASSAGES, axis=1), weight)
        source = top // PASSAGES                                                   # (N, TOP)
        says = np.where(top % PASSAGES == 0, world.says[rows, source, q[:, None]], -1)
        said, vote = says, score[rows, top]
        answer = read(said, vote)
        likeness = read(without_each(said), vote[:, None, :]) == answer[:, None]   # (N, TOP): 1 or 0
        correct = answer == world.truth[rows[:, 0], q]
        change = feedback(importance(likeness), (said == answer[:, None]) & (answer >= 0)[:, None], correct)
        for scores, by in zip((R, U), change):
            np.add.at(scores, (rows, source), by)
        out.correct[:, t], out.reliability[:, t], out.usefulness[:, t] = correct, R, U
    return out


# --- the ledger

def _text(thing) -> str:
    return json.dumps(thing, sort_keys=True, separators=(",", ":"))


def _digest(previous, body) -> str:
    return hashlib.sha256((previous + body).encode()).hexdigest()


def _tag(key, message) -> str:
    return hmac.new(key, message.encode(), "sha256").hexdigest()


@dataclass(frozen=True)
class Event:
    """previous: hash of the event before; body: canonical JSON of what happened."""
    previous: str
    body: str


class Source:
    """Owner of a key. key: bytes, 16 or more."""

    def __init__(self, name, key):
        if not isinstance(name, str) or not name:
            raise ValueError(f"name={name!r}: expected a non-empty string")
        if not isinstance(key, bytes) or len(key) < 16:
            raise ValueError("key: expected 16 bytes or more")
        self.name, self.key = name, key

    def sign(self, ledger, message) -> str:
        """Checks the scores that the message quotes against the ledger, then signs it. Raises LedgerError."""
        for name, quoted in json.loads(message)["selected"].items():
            if list(ledger.scores.get(name, ())) != quoted:
                raise LedgerError(f"the message quotes {quoted} for {name!r}, the ledger has {ledger.scores.get(name)}")
        return _tag(self.key, message)


class Ledger:
    """Scores and the chain of events that made them. scores: {name: (reliability, usefulness)}; head: hash of the last event.

    strict=False: the rules of the released contract: every signature must be over `message`, whatever it says. strict=True (ours): the message must name the head of the chain and the new scores.
    """

    def __init__(self, strict=False):
        self.strict, self.scores, self.events, self.head, self._keys = bool(strict), {}, [], "", {}

    def register(self, source, reliability=0, usefulness=0):
        """Anybody may, with any scores, as in the release. Raises LedgerError for a name that exists."""
        body = {"kind": "register", "name": source.name, "scores": {source.name: [reliability, usefulness]}}
        if source.name in self.scores:
            raise LedgerError(f"name={source.name!r}: has a record already")
        self._check_scores(body["scores"])
        self._keys[source.name] = source.key
        self._append(body)

    def message(self, query, names, new=None) -> str:
        """What the sources sign: the query and their current scores; a strict ledger adds its head and the scores to be written, {name: (R, U)}."""
        quoted = {name: list(self.scores[name]) for name in names}
        extra = {"head": self.head, "new": {k: list(v) for k, v in new.items()}} if self.strict else {}
        return _text({"query": query, "selected": quoted, **extra})

    def update(self, message, signatures, new, info=""):
        """Write new scores {name: (R, U)} with one signature for each name. All or nothing: raises LedgerError before anything changes."""
        body = {"kind": "update", "message": message, "signatures": dict(signatures), "scores": {k: list(v) for k, v in new.items()}, "info": info}
        self._check_update(body)
        self._append(body)

    def verify(self, head=None):
        """Replays all events. Raises LedgerError that names the first event that does not fit; `head`: a hash known from elsewhere (a copy, a consensus)."""
        replay = Ledger(self.strict)
        replay._keys = self._keys
        for i, event in enumerate(self.events):
            try:
                if event.previous != replay.head:
                    raise LedgerError("it does not follow the event before it")
                body = json.loads(event.body)
                (replay._check_update if body["kind"] == "update" else lambda b: replay._check_scores(b["scores"]))(body)
                replay._append(body)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LedgerError(f"event {i}: {error}") from None
        if replay.head != (self.head if head is None else head):
            raise LedgerError(f"event {len(self.events) - 1}: the chain ends in another hash than expected")
        if replay.scores != self.scores:
            raise LedgerError("the scores are not those that the events lead to")

    def _append(self, body):
        event = Event(self.head, _text(body))
        self.events.append(event)
        self.head = _digest(event.previous, event.body)
        self.scores.update({name: tuple(pair) for name, pair in body["scores"].items()})

    def _check_scores(self, scores):
        for name, pair in scores.items():
            if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int) or not -2**31 <= x < 2**31 for x in pair):
                raise LedgerError(f"scores of {name!r} are {pair!r}: expected two integers of 32 bits")

    def _check_update(self, body):
        self._check_scores(body["scores"])
        signed, written = sorted(body["signatures"]), sorted(body["scores"])
        if signed != written or not written:
            raise LedgerError(f"signatures of {signed} for scores of {written}: expected one each")
        for name, tag in body["signatures"].items():
            if name not in self.scores:
                raise LedgerError(f"name={name!r}: is not registered")
            if not hmac.compare_digest(_tag(self._keys[name], body["message"]), tag):
                raise LedgerError(f"the signature of {name!r} does not fit key and message")
        if self.strict:
            message = json.loads(body["message"])
            if message.get("head") != self.head:
                raise LedgerError("the signed message belongs to another point of the chain")
            if message.get("new") != body["scores"]:
                raise LedgerError("the scores are not those that were signed")


def saving(batch, fixed, variable):
    """Share of the cost saved by B updates in one transaction instead of B: (B - 1) fixed / (B (fixed + variable)).  fixed: a transaction's cost; variable: an update's; exact for Fractions"""
    if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
        raise ValueError(f"batch={batch!r}: expected an integer >= 1")
    if not (fixed > 0 and variable >= 0):
        raise ValueError(f"fixed={fixed!r}, variable={variable!r}: expected a cost > 0 and one >= 0")
    return (batch - 1) * fixed / (batch * (fixed + variable))
