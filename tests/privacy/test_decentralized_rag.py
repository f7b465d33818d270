"""Reliability-scored retrieval: the scoring rule, sampling and ranking against plain loops, the simulation against one world by hand, and a ledger that notices what it should notice."""
import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy import stats

from lib.privacy.decentralized_rag import (Event, Ledger, LedgerError, Source, World, _digest, feedback, importance, make_worlds, rank, read, sample_sources, saving, simulate,
                                           without_each)

MODULE = "lib/privacy/decentralized_rag.py"
BREAKS = [
    ("signatures are not checked", MODULE, 'if not hmac.compare_digest(_tag(self._keys[name], body["message"]), tag):', "if False:"),
    ("the chain of hashes is not checked", MODULE, "if event.previous != replay.head:", "if False:"),
    ("a strict ledger takes a message twice", MODULE, 'if message.get("head") != self.head:', "if False:"),
    ("a strict ledger writes other scores than were signed", MODULE, 'if message.get("new") != body["scores"]:', "if False:"),
    ("a source signs whatever scores are quoted", MODULE, "if list(ledger.scores.get(name, ())) != quoted:", "if False:"),
    ("a grounded wrong answer earns reliability", MODULE, "np.asarray(correct)[..., None], s, -s)", "np.asarray(correct)[..., None], s, s)"),
    ("passages that are not needed get the credit", MODULE, "gap = sigma.max(axis=-1, keepdims=True) - sigma", "gap = sigma - sigma.min(axis=-1, keepdims=True)"),
    ("a source that appears twice is credited once", MODULE, "np.add.at(scores, (rows, source), by)", "scores[rows, source] += by"),
]
# Statistical checks fail by chance with at most this probability a seed; seeds are fixed, so a failure shows a real change.
FAILURE = 1e-6


# --- scores

def test_importance_is_how_much_less_like_the_answer():
    """Against the release's three steps, spelled out: the mean over others, the shift, the division."""
    sigma = np.random.default_rng(0).random((500, 5))
    phi = np.array([[np.delete(row, i).mean() - row[i] for i in range(5)] for row in sigma])
    phi -= phi.min(axis=1, keepdims=True)
    assert np.allclose(importance(sigma), phi / phi.sum(axis=1, keepdims=True), atol=1e-12)
    assert np.allclose(importance(sigma).sum(axis=1), 1) and (importance(sigma) >= 0).all()
    assert (importance(sigma)[np.arange(500), sigma.argmax(axis=1)] == 0).all()          # the most dispensable passage gets nothing


def test_importance_of_binary_answers():
    assert np.allclose(importance([1, 1, 1]), 1 / 3) and np.allclose(importance([0, 0]), 0.5)
    assert np.allclose(importance([0, 1, 1]), [1, 0, 0]) and np.allclose(importance([[0, 0, 1], [1, 0, 1]]), [[0.5, 0.5, 0], [0, 1, 0]])


@pytest.mark.parametrize("bad", [[1.0], [], 1.0, [0.5, math.nan], [0.5, math.inf]])
def test_bad_importance(bad):
    with pytest.raises(ValueError, match="similarity="):
        importance(bad)


def test_feedback_rule():
    """Grounded and correct: both rise; grounded and wrong: reliability falls, usefulness rises; not grounded: usefulness falls. Halves go to the even number."""
    for correct, grounded, (r, u) in ((True, True, (40, 40)), (False, True, (-40, 40)), (True, False, (0, -40)), (False, False, (0, -40))):
        got = feedback(np.array([0.4]), np.array([grounded]), np.array(correct))
        assert (got[0][0], got[1][0]) == (r, u)
    assert feedback(np.array([0.125, 0.375]), np.array([True, True]), np.array(True))[0].tolist() == [12, 38]
    batch = feedback(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[True, False], [True, True]]), np.array([True, False]))
    assert batch[0].tolist() == [[100, 0], [-50, -50]] and batch[1].tolist() == [[100, 0], [50, 50]] and batch[0].dtype == np.int64


@pytest.mark.parametrize("usefulness, floor", [([5, 1, 0, -7], 0.0), ([0, 0, 0, 0], 0.0), ([-1, -2, -3, 0], 0.0), ([5, 1, 0, -7], 0.2), ([0, 9, 0, 0], 0.0)])
def test_sources_are_sampled_in_proportion(usefulness, floor):
    """The law of the set of asked sources against the one enumerated from all 4^3 draws with replacement."""
    p = np.maximum(usefulness, 0) / max(1, np.maximum(usefulness, 0).sum()) if max(usefulness) > 0 else np.full(4, 0.25)
    p = (1 - floor) * p + floor / 4
    law = np.zeros(16)
    for draw in product(range(4), repeat=3):
        law[sum(1 << i for i in set(draw))] += p[list(draw)].prod()
    n = 40_000
    asked = sample_sources(np.tile(usefulness, (n, 1)), np.random.default_rng(1), floor=floor)
    seen = np.bincount(asked @ (1 << np.arange(4)), minlength=16)
    assert (seen[law == 0] == 0).all()
    if (law > 0).sum() > 1:
        assert stats.chisquare(seen[law > 0], n * law[law > 0]).pvalue > FAILURE


def test_all_are_asked_when_they_are_few():
    assert sample_sources(np.array([[1, 0, -5]]), np.random.default_rng(0)).all()


def test_rank_against_a_loop():
    rng = np.random.default_rng(2)
    relevance, reliability, among = rng.random((60, 12)), rng.integers(-50, 50, (60, 12)), rng.random((60, 12)) < 0.6
    among[:, :3] = True
    reliability[:20] = 7                                                                  # a constant list gives zeros, not a division by zero
    weight = rng.random(60)
    score, top = rank(relevance, reliability, among, weight)
    for i in range(60):
        who = np.flatnonzero(among[i])

        def unit(x):
            x = x[i][who].astype(float)
            return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else 0 * x
        want = (1 - weight[i]) * unit(relevance) + weight[i] * unit(reliability)
        assert np.allclose(score[i][who], want, atol=1e-12)
        assert top[i].tolist() == who[np.argsort(-want, kind="stable")[:3]].tolist()


def test_reader_against_a_loop_and_leaving_one_out():
    rng = np.random.default_rng(3)
    for _ in range(300):
        says, weight = rng.integers(-1, 3, 4), rng.random(4)
        votes = {a: weight[says == a].sum() for a in set(says.tolist()) - {-1}}
        assert read(says, weight) == (max(votes, key=votes.get) if votes else -1)
        for i, row in enumerate(without_each(says)):
            assert row[i] == -1 and np.array_equal(np.delete(row, i), np.delete(says, i))
    assert read(np.array([[1, 2, 2], [-1, -1, -1]]), np.array([[0.5, 0.3, 0.3], [1, 1, 1]])).tolist() == [2, -1]


# --- the simulation

def one_world_by_hand(world, queries, rng, start, w, floor):
    """The rules once more, for one world, with dictionaries and loops; the generator is used in the same order."""
    m = world.says.shape[1]
    R, U, log = [0] * m, [start] * m, []
    for _ in range(queries):
        q = int(rng.integers(0, world.truth.shape[1], 1)[0])
        p = [max(0, u) for u in U]
        p = [x / sum(p) if sum(p) else 1 / m for x in p]
        p = [(1 - floor) * x + floor / m for x in p]
        asked = set()
        for u in rng.random(3):
            u *= sum(p)
            asked.add(next(i for i in range(m) if sum(p[:i + 1]) > u))
        noise = rng.standard_normal(3 * m)
        cands = [(s, j, (1.0 if j == 0 else 0.4) + 0.1 * noise[3 * s + j]) for s in range(m) for j in range(3) if s in asked]

        def unit(x):
            return [(v - min(x)) / (max(x) - min(x)) if max(x) > min(x) else 0.0 for v in x]
        score = [(1 - w) * a + w * b for a, b in zip(unit([c[2] for c in cands]), unit([R[c[0]] for c in cands]))]
        order = sorted(range(len(cands)), key=lambda i: -score[i])[:3]
        prompt = [(cands[i][0], int(world.says[0, cands[i][0], q]) if cands[i][1] == 0 else None, score[i]) for i in order]

        def answer(passages):
            votes = {}
            for _, said, weight in passages:
                if said is not None:
                    votes[said] = votes.get(said, 0) + weight
            return max(votes, key=votes.get) if votes else None
        full = answer(prompt)
        sigma = [float(answer(prompt[:i] + prompt[i + 1:]) == full) for i in range(3)]
        gap = [max(sigma) - x for x in sigma]
        share = [g / sum(gap) if sum(gap) else 1 / 3 for g in gap]
        correct = full == world.truth[0, q]
        for (s, said, _), x in zip(prompt, share):
            points = round(100 * x)
            if said is not None and said == full:
                R[s] += points if correct else -points
                U[s] += points
            else:
                U[s] -= points
        log.append((correct, tuple(R), tuple(U)))
    return log


@pytest.mark.parametrize("start, w, floor", [(0, 0.5, 0.0), (200, 0.5, 0.0), (100, 0.0, 0.3), (50, 1.0, 0.1), (-20, 0.3, 0.0)])
def test_simulation_against_one_world_by_hand(start, w, floor):
    world = make_worlds([0.0, 0.3, 0.5, 0.8, 1.0], 1, np.random.default_rng(4), questions=40, answers=4)
    got = simulate(world, 150, np.random.default_rng(5), start=start, weight=w, floor=floor)
    for t, (correct, R, U) in enumerate(one_world_by_hand(world, 150, np.random.default_rng(5), start, w, floor)):
        assert (bool(got.correct[0, t]), tuple(got.reliability[0, t]), tuple(got.usefulness[0, t])) == (correct, R, U)


def test_worlds_have_the_stated_pollution():
    pollution = np.array([0.0, 0.25, 1.0])
    world = make_worlds(pollution, 50, np.random.default_rng(6))
    wrong = (world.says != world.truth[:, None]).sum(axis=(0, 2))
    assert wrong[0] == 0 and wrong[2] == 50_000
    assert abs(wrong[1] - 12_500) < stats.norm.isf(FAILURE / 2) * math.sqrt(50_000 * 0.25 * 0.75)
    assert world.says.min() >= 0 and world.says.max() < 20
    lies = (world.says[:, 2] - world.truth) % 20
    assert stats.chisquare(np.bincount(lies.ravel(), minlength=20)[1:]).pvalue > FAILURE


def test_clean_sources_answer_everything_and_lying_ones_nothing():
    for pollution, want in ((np.zeros(4), True), (np.ones(4), False)):
        h = simulate(make_worlds(pollution, 8, np.random.default_rng(7)), 60, np.random.default_rng(8))
        assert (h.correct == want).all()
        assert (np.diff(h.reliability, axis=1) >= 0).all() if want else (np.diff(h.reliability, axis=1) <= 0).all()


def test_a_query_moves_at_most_a_hundred_points():
    """Importance sums to one; three rounded shares may be one off. Sources that are not in the prompt keep their scores."""
    h = simulate(make_worlds(np.linspace(0, 1, 6), 20, np.random.default_rng(9)), 200, np.random.default_rng(10), start=500)
    change = np.abs(np.diff(h.usefulness, axis=1))
    assert change.sum(axis=2).max() <= 101 and ((change > 0).sum(axis=2) <= 3).all()
    assert (np.abs(np.diff(h.reliability, axis=1)) <= change + 101).all()


def test_settings_by_world_are_the_same_as_one_by_one():
    """Worlds do not talk to each other: two settings in one run are two different settings, in the right order."""
    world = make_worlds(np.linspace(0, 1, 6), 40, np.random.default_rng(11))
    start = np.repeat([0, 5000], 20)
    h = simulate(world, 50, np.random.default_rng(12), start=start)
    assert (h.usefulness[:20, 0].max() <= 100) and (h.usefulness[20:, 0].min() >= 4900)
    w = simulate(world, 300, np.random.default_rng(13), sampling="all", weight=np.repeat([0.0, 1.0], 20))
    assert w.correct[20:, 100:].mean() > w.correct[:20, 100:].mean() + 0.1
    everyone = simulate(world, 300, np.random.default_rng(14), sampling="uniform", weight=0.0)
    assert (everyone.reliability[:, -1, 0] > everyone.reliability[:, -1, -1]).all()


@pytest.mark.parametrize("change, message", [({"weight": 1.1}, "weight="), ({"weight": math.nan}, "weight="), ({"floor": -0.1}, "floor="), ({"floor": math.nan}, "floor="),
                                             ({"start": 0.5}, "start="), ({"start": math.nan}, "start="), ({"start": 2**31}, "start="), ({"sampling": "best"}, "sampling=")])
def test_bad_settings(change, message):
    world = make_worlds([0.1, 0.2], 3, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        simulate(world, 2, np.random.default_rng(0), **change)


@pytest.mark.parametrize("pollution", [[-0.1], [1.1], [math.nan], [], 0.5])
def test_bad_pollution(pollution):
    with pytest.raises(ValueError, match="pollution="):
        make_worlds(pollution, 3, np.random.default_rng(0))


# --- the ledger

SOURCES = [Source(name, name.encode() * 16) for name in "abc"]


def ledger_with_history(strict, updates=4):
    ledger, rng = Ledger(strict), np.random.default_rng(15)
    for source in SOURCES:
        ledger.register(source, 0, 100)
    for t in range(updates):
        chosen = [SOURCES[i] for i in rng.choice(3, 2, replace=False)]
        new = {s.name: (ledger.scores[s.name][0] + int(rng.integers(-50, 50)), ledger.scores[s.name][1] + 1) for s in chosen}
        message = ledger.message(f"query {t}", [s.name for s in chosen], new)
        ledger.update(message, {s.name: s.sign(ledger, message) for s in chosen}, new, info=f"answer {t}")
    return ledger


def leaves(thing, path=()):
    if isinstance(thing, dict):
        for key in thing:
            yield from leaves(thing[key], (*path, key))
    elif isinstance(thing, list):
        for i, item in enumerate(thing):
            yield from leaves(item, (*path, i))
    else:
        yield path, thing


def changed(body, path, value):
    body = json.loads(body)
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def state(ledger):
    return dict(ledger.scores), list(ledger.events), ledger.head


@pytest.mark.parametrize("strict", [False, True])
def test_every_change_of_the_past_is_noticed(strict):
    """Each leaf of each event changed; each event removed, repeated, swapped with the next; the scores themselves edited."""
    ledger = ledger_with_history(strict)
    ledger.verify()
    ledger.verify(ledger.head)
    events, scores, tried = list(ledger.events), dict(ledger.scores), 0
    histories = [events[:i] + events[i + 1:] for i in range(len(events))] + [events[:i] + events[i:i + 1] + events[i:] for i in range(len(events))]
    histories += [events[:i] + [events[i + 1], events[i]] + events[i + 2:] for i in range(len(events) - 1)]
    for i, event in enumerate(events):
        histories.append(events[:i] + [replace(event, previous="0" * 64)] + events[i + 1:])
        for path, value in leaves(json.loads(event.body)):
            other = value + 1 if isinstance(value, int) else value[:-1] + ("x" if value[-1:] != "x" else "y")
            histories.append(events[:i] + [Event(event.previous, changed(event.body, path, other))] + events[i + 1:])
    for history in histories:
        ledger.events = history
        with pytest.raises(LedgerError):
            ledger.verify()
        tried += 1
    assert tried > 50
    ledger.events = events
    ledger.scores = scores | {"a": (scores["a"][0] + 1, scores["a"][1])}
    with pytest.raises(LedgerError, match="not those that the events lead to"):
        ledger.verify()


def rewritten(ledger, at, path, value):
    """History changed at one place by somebody who recomputes all later hashes, the head and the scores."""
    events, previous = [], ""
    for i, event in enumerate(ledger.events):
        body = changed(event.body, path, value) if i == at else event.body
        events.append(Event(previous, body))
        previous = _digest(previous, body)
        ledger.scores.update({name: tuple(pair) for name, pair in json.loads(body)["scores"].items()})
    ledger.events, ledger.head = events, previous


def test_a_rewritten_chain():
    """The released rules sign neither new scores nor the chain: only a head known from elsewhere tells. A strict ledger tells by itself."""
    for strict in (False, True):
        ledger = ledger_with_history(strict)
        head, last = ledger.head, len(ledger.events) - 1
        name = next(iter(json.loads(ledger.events[last].body)["scores"]))
        rewritten(ledger, last, ("scores", name, 0), 9999)
        if strict:
            with pytest.raises(LedgerError, match="not those that were signed"):
                ledger.verify()
        else:
            ledger.verify()
        with pytest.raises(LedgerError):
            ledger.verify(head)


def test_replay_and_free_choice_of_scores():
    """The weakness of the released contract, and its cure: one signature, once given, writes any scores at any time."""
    for strict in (False, True):
        ledger = ledger_with_history(strict)
        old = next(json.loads(e.body) for e in ledger.events if "update" in e.body)
        names = list(old["scores"])
        forged = {name: (2**31 - 1, -2**31) for name in names}
        before = state(ledger)
        if strict:
            for new in (forged, {k: tuple(v) for k, v in old["scores"].items()}):        # other scores, and the very same update again
                with pytest.raises(LedgerError, match="another point of the chain"):
                    ledger.update(old["message"], old["signatures"], new)
            assert state(ledger) == before
        else:
            ledger.update(old["message"], old["signatures"], forged)
            ledger.verify()
            assert ledger.scores[names[0]] == (2**31 - 1, -2**31)
    ledger = ledger_with_history(True)
    honest = {"a": (1, 1)}
    message = ledger.message("q", ["a"], honest)
    with pytest.raises(LedgerError, match="not those that were signed"):
        ledger.update(message, {"a": SOURCES[0].sign(ledger, message)}, {"a": (2, 1)})


def test_a_source_signs_only_what_the_ledger_says():
    ledger = ledger_with_history(False)
    message = json.loads(ledger.message("q", ["a", "b"]))
    for wrong in (message["selected"] | {"a": [5, 5]}, message["selected"] | {"z": [0, 0]}):
        with pytest.raises(LedgerError, match="quotes"):
            SOURCES[0].sign(ledger, json.dumps(message | {"selected": wrong}))


@pytest.mark.parametrize("strict", [False, True])
def test_bad_updates_write_nothing(strict):
    ledger = ledger_with_history(strict)
    a, b = SOURCES[:2]
    before = state(ledger)

    def attempt(new, names=None, forge=lambda tags: tags):
        message = ledger.message("q", [n for n in new if n in ledger.scores], new)
        ledger.update(message, forge({s.name: s.sign(ledger, message) for s in SOURCES if s.name in (names or new)}), new)
    good = {"a": (1, 2), "b": (3, 4)}
    cases = [(lambda: attempt(good, forge=lambda t: t | {"b": t["a"]}), "signature of 'b'"), (lambda: attempt(good, forge=lambda t: t | {"b": "00" * 32}), "signature of 'b'"),
             (lambda: attempt(good, forge=lambda t: {"a": t["a"]}), "expected one each"), (lambda: attempt(good, names=["a", "b", "c"]), "expected one each"),
             (lambda: attempt({}), "expected one each"), (lambda: attempt({"z": (1, 2)}, forge=lambda t: {"z": "00"}), "not registered")]
    cases += [(lambda pair=pair: attempt({"a": pair}), "two integers") for pair in ((2**31, 0), (0, -2**31 - 1), (0.5, 1), (math.nan, 1), (True, 1), (1,), (1, 2, 3), (None, 1))]
    for call, message in cases:
        with pytest.raises(LedgerError, match=message):
            call()
        assert state(ledger) == before
    with pytest.raises(LedgerError, match="has a record already"):
        ledger.register(Source("a", b"another key, sixteen"))
    with pytest.raises(LedgerError, match="two integers"):
        ledger.register(Source("d", b"another key, sixteen"), 0.5, 1)
    assert state(ledger) == before and "d" not in ledger._keys
    for scores in ((2**31 - 1, -2**31), (0, 0)):                                          # the limits themselves are fine
        attempt({"a": scores})
    ledger.verify()


@pytest.mark.parametrize("name, key", [("", b"x" * 16), (3, b"x" * 16), ("a", b"short"), ("a", "x" * 16), ("a", None)])
def test_bad_sources(name, key):
    with pytest.raises(ValueError, match="name=|key:"):
        Source(name, key)


def test_the_hash_is_that_of_everything_before():
    import hashlib
    ledger, head = ledger_with_history(False), ""
    for event in ledger.events:
        assert event.previous == head
        head = hashlib.sha256((head + event.body).encode()).hexdigest()
    assert ledger.head == head
    import hmac
    body = json.loads(ledger.events[-1].body)
    for name, tag in body["signatures"].items():
        assert tag == hmac.new(name.encode() * 16, body["message"].encode(), "sha256").hexdigest()


def test_the_ledger_carries_a_simulation():
    h = simulate(make_worlds([0.0, 0.5, 1.0], 1, np.random.default_rng(16)), 30, np.random.default_rng(17), start=100)
    ledger = Ledger(strict=True)
    for source in SOURCES:
        ledger.register(source, 0, 100)
    for t in range(30):
        new = {s.name: (int(h.reliability[0, t, i]), int(h.usefulness[0, t, i])) for i, s in enumerate(SOURCES)}
        message = ledger.message(f"query {t}", new, new)
        ledger.update(message, {s.name: s.sign(ledger, message) for s in SOURCES}, new)
    ledger.verify()
    assert [ledger.scores[n] for n in "abc"] == list(zip(h.reliability[0, -1].tolist(), h.usefulness[0, -1].tolist()))


# --- cost

def test_saving_is_exact():
    """Against counted transactions and updates, in fractions."""
    for batch, fixed, variable in product((1, 2, 7, 20), (21000, 30000), (0, 17300)):
        alone, together = batch * (fixed + variable), fixed + batch * variable
        assert saving(batch, Fraction(fixed), Fraction(variable)) == 1 - Fraction(together, alone)
    assert saving(1, 5, 3) == 0


@pytest.mark.parametrize("args, message", [((0, 1, 1), "batch="), ((1.5, 1, 1), "batch="), ((True, 1, 1), "batch="), ((2, 0, 1), "fixed="), ((2, 1, -1), "variable="), ((2, math.nan, 1), "fixed="),
                                           ((2, 1, math.nan), "variable=")])
def test_bad_cost(args, message):
    with pytest.raises(ValueError, match=message):
        saving(*args)


def test_world_is_what_it_says():
    world = World(np.zeros((1, 1), int), np.zeros((1, 4, 1), int))
    assert simulate(world, 3, np.random.default_rng(0)).correct.all()
