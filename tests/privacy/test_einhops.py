"""EinHops: np.einsum as oracle, counters against closed forms and dense matrices, the noise of the machine, bad input, and the same calls on real CKKS ciphertexts (SEAL, through tenseal)."""
import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from lib.privacy.ckks_sim import Counts, Simulator, SlotVec, check_slots
from lib.privacy.einhops import Cost, baby_steps, cost, depth, einsum, mask, match, moves, multiply, pack, parse, permute, reduce

BREAKS = [
    ("replicates to the left", "lib/privacy/einhops.py", "vec.rotate(stride[d] << step)", "vec.rotate(-stride[d] << step)"),
    ("reduces to the right", "lib/privacy/einhops.py", "vec = vec + vec.rotate(-amount)", "vec = vec + vec.rotate(amount)"),
    ("a diagonal is rotated with the wrong sign", "lib/privacy/einhops.py", "np.roll(diagonal, baby * j)", "np.roll(diagonal, -baby * j)"),
    ("the mask is forgotten", "lib/privacy/einhops.py", "return Tensor(mask(plan, reduce(plan, product)),", "return Tensor(reduce(plan, product),"),
    ("reduction labels innermost", "lib/privacy/einhops.py", "return self.reduced + self.output", "return self.output + self.reduced"),
    ("a product of known factors is said to take a level", "lib/privacy/einhops.py", "s if s is None else s + _moved", "0 if s is None else s + _moved"),
    ("multiplying by known numbers costs no level", "lib/privacy/ckks_sim.py", "depth = 1 + max(", "depth = (not plain) + max("),
    ("rotations by zero are counted", "lib/privacy/ckks_sim.py", "if s % self.machine.slots == 0:", "if False:"),
]

# The fifteen expressions of the paper's benchmarks, with small sizes that are mostly no powers of two; attention scores from the readme; the last one permutes the odd operand of the tree only.
EXPRESSIONS = {
    "ij->ji": [(3, 5)], "ij->": [(4, 6)], "ij->j": [(5, 3)], "ij->i": [(5, 3)], "ij,j->i": [(4, 6), (6,)], "ij,jk->ik": [(3, 4), (4, 5)], "i,i->": [(7,), (7,)],
    "ij,ij->": [(3, 4), (3, 4)], "ij,ij->ij": [(3, 4), (3, 4)], "i,j->ij": [(3,), (5,)], "bij,bjk->bik": [(2, 3, 4), (2, 4, 5)], "ij,ij,ij->ij": [(2, 3)] * 3,
    "ij,jk,kl->il": [(2, 3), (3, 4), (4, 2)], "ik,jkl,il->ij": [(2, 3), (5, 3, 7), (2, 7)], "pqrs,tuqvr->pstuv": [(2, 3, 5, 7), (1, 4, 3, 2, 5)],
    "bthd,bThd->bhtT": [(2, 3, 2, 4), (2, 3, 2, 4)], "ij,ij,ji->ij": [(3, 4), (3, 4), (4, 3)],
}
# Sums of at most 105 products of standard normal numbers, in double precision: round-off is far below this, a wrong slot far above.
TOLERANCE = 1e-12
FAILURE = 1e-6                                       # of a statistical check, for a fixed seed


def data(equation, seed=0, shapes=None):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s) for s in shapes or EXPRESSIONS[equation]]


def random_calls(number, seed):
    """Random expressions of one to four operands, with sizes 1 to 5 and labels in any order, that fit into 4096 slots."""
    rng = np.random.default_rng(seed)
    while number:
        sizes = dict(zip("abcde", rng.integers(1, 6, 5).tolist()))
        inputs = ["".join(rng.permutation(list("abcde"))[:rng.integers(0, 4)]) for _ in range(rng.integers(1, 5))]
        present = sorted(set("".join(inputs)))
        output = "".join(rng.permutation(present)[:rng.integers(0, len(present) + 1)])
        if math.prod(1 << (sizes[d] - 1).bit_length() for d in present) <= 4096:
            number -= 1
            yield ",".join(inputs) + "->" + output, [tuple(sizes[d] for d in labels) for labels in inputs]


# --- the oracle

@pytest.mark.parametrize("slots", [2048, 4096])
@pytest.mark.parametrize("equation", EXPRESSIONS)
def test_equals_numpy(equation, slots):
    """log2 of 2048 is odd, of 4096 even: both rules for N1. (The contraction needs all 4096.)"""
    arrays = data(equation)
    machine = Simulator(slots)
    if slots == 2048 and equation.startswith("pqrs"):
        with pytest.raises(ValueError, match="need 4096 slots; there are 2048"):
            einsum(equation, *[pack(machine, a) for a in arrays])
        return
    out = einsum(equation, *[pack(machine, a) for a in arrays])
    want = np.einsum(equation, *arrays)
    assert out.shape == want.shape
    np.testing.assert_allclose(out.read(), want, atol=TOLERANCE)


def test_random_expressions_equal_numpy_and_cost_what_is_said():
    for equation, shapes in random_calls(60, seed=1):
        machine, arrays = Simulator(), data(equation, 2, shapes)
        out = einsum(equation, *[pack(machine, a) for a in arrays])
        np.testing.assert_allclose(out.read(), np.einsum(equation, *arrays), atol=TOLERANCE, err_msg=equation)
        said = cost(parse(equation, shapes, 4096))
        assert (machine.counts.rotations, out.vec.depth) == (said.rotations, said.depth), equation


@pytest.mark.parametrize("equation", ["ij,j->i", "ij,ij,ij->ij", "ij,jk,kl->il", "ij,ij,ji->ij", "ik,jkl,il->ij", "bij,bjk->bik"])
def test_any_operand_may_be_known(equation):
    """All subsets of operands in slots: the numbers, the rotations and the depth; known operands cost no rotation, and no level of their own."""
    arrays, shapes = data(equation), EXPRESSIONS[equation]
    for in_slots in itertools.product([True, False], repeat=len(arrays)):
        machine = Simulator()
        out = einsum(equation, *[pack(machine, a) if s else a for a, s in zip(arrays, in_slots)])
        if not any(in_slots):
            assert isinstance(out, np.ndarray) and np.array_equal(out, np.einsum(equation, *arrays))
            continue
        said = cost(parse(equation, shapes, 4096), in_slots)
        np.testing.assert_allclose(out.read(), np.einsum(equation, *arrays), atol=TOLERANCE)
        assert (machine.counts.rotations, out.vec.depth) == (said.rotations, said.depth)
    assert cost(parse("i,j->ij", [(3,), (5,)], 64), [False, True]) == Cost(permute=0, replicate=2, reduce=0, depth=2, slots=32)


# --- invariants

@pytest.mark.parametrize("equation", EXPRESSIONS)
def test_slots_outside_the_result_are_zero(equation):
    """Padding and all above: a result can be an operand again."""
    machine = Simulator()
    out = einsum(equation, *[pack(machine, a) for a in data(equation)])
    again = pack(Simulator(), out.read())
    np.testing.assert_array_equal(out.vec.values, again.vec.values)


def test_results_are_operands_again():
    machine, (a, b, c) = Simulator(), data("ij,jk,kl->il")
    ab = einsum("ij,jk->ik", pack(machine, a), pack(machine, b))
    out = einsum("ik,kl->il", ab, pack(machine, c))
    np.testing.assert_allclose(out.read(), a @ b @ c, atol=TOLERANCE)
    assert out.vec.depth == 6                                        # 3 for each: one after the other costs more than the tree's 4


def dense_cost(plan):
    """Rotations and depth from dense matrices and a tree by recursion; nothing of the module but its plan and N1."""
    n1, rotations, levels = baby_steps(plan.slots), 0, []
    for labels in plan.inputs:
        T = np.zeros((plan.slots, plan.slots), bool)
        for entry in itertools.product(*(range(plan.padded[d]) for d in labels)):
            place = dict(zip(labels, entry))
            old = new = 0
            for d in labels:
                old = old * plan.padded[d] + place[d]
            for d in plan.reduced + plan.output:
                new = new * plan.padded[d] + place.get(d, 0)
            T[new, old] = True
        rows, columns = np.nonzero(T)
        diagonals = {(int(c) - int(r)) % plan.slots for r, c in zip(rows, columns)}
        rotations += len({d % n1 for d in diagonals} - {0}) + len({d // n1 for d in diagonals} - {0})
        rotations += round(math.log2(math.prod(n for d, n in plan.padded.items() if d not in labels)))
        levels.append(0 if np.array_equal(rows, columns) else 1)
    rotations += round(math.log2(math.prod(plan.padded[d] for d in plan.reduced)))
    while len(levels) > 1:
        levels = [max(levels[i:i + 2]) + (len(levels[i:i + 2]) == 2) for i in range(0, len(levels), 2)]
    return rotations, levels[0] + 1


@pytest.mark.parametrize("equation", EXPRESSIONS)
def test_cost_is_that_of_the_dense_matrices(equation):
    plan = parse(equation, EXPRESSIONS[equation], 4096)
    machine = Simulator(4096)
    out = einsum(equation, *[pack(machine, a) for a in data(equation)])
    said = cost(plan)
    assert dense_cost(plan) == (said.rotations, said.depth)
    assert (machine.counts.rotations, out.vec.depth) == (said.rotations, said.depth)
    assert said.depth <= 2 + math.ceil(math.log2(len(plan.inputs)))
    assert said.permute <= len(plan.inputs) * (baby_steps(4096) + 4096 // baby_steps(4096) - 2)


def test_the_depths_that_are_known():
    depths = {e: cost(parse(e, EXPRESSIONS[e], 4096)).depth for e in EXPRESSIONS}
    assert depths["ij->j"] == 1 and depths["ij->ji"] == 2 and depths["ij,ij->ij"] == 2 and depths["ij,jk->ik"] == 3
    assert depths["ij,jk,kl->il"] == 4 and depths["ij,ij,ji->ij"] == 3              # the permuted operand waits while the others are multiplied
    plan = parse("ij,jk->ik", [(2, 2), (2, 2)], 16)
    assert depth(plan, [2, 0]) == 5 and depth(plan, [None, 0]) == 3


def test_slots_are_the_product_of_the_padded_sizes():
    """All orders of labels and operands; counted in the product of operands that are one everywhere (sizes are powers of two)."""
    seen = set()
    for first, second, out in itertools.product(("ij", "ji"), ("jk", "kj"), ("ik", "ki")):
        size = dict(i=2, j=4, k=8)
        equation = f"{first},{second}->{out}"
        shapes = [tuple(size[d] for d in labels) for labels in (first, second)]
        plan, machine = parse(equation, shapes, 256), Simulator(256)
        vec = multiply([match(plan, labels, pack(machine, np.ones(s))) for labels, s in zip(plan.inputs, shapes)])
        assert np.array_equal(np.flatnonzero(vec.values), np.arange(plan.used))
        seen.add((plan.used, cost(plan).slots))
    assert seen == {(64, 64)}
    assert parse("ij,jk->ik", [(3, 5), (5, 2)], 4096).used == 4 * 8 * 2


@pytest.mark.parametrize("baby", [1, 4, 16, 64, 256])
def test_permutation_equals_its_dense_matrix(baby):
    """With any number of baby steps, the whole range from one giant step a diagonal to none."""
    rng, machine = np.random.default_rng(3), Simulator(256)
    old, new = rng.permutation(256)[:40], rng.permutation(256)[:40]
    T = np.zeros((256, 256))
    T[new, old] = 1
    v = rng.standard_normal(256)
    vec = permute(machine.load(v), old, new, 256, baby)
    np.testing.assert_array_equal(vec.values, T @ v)
    delta = (old - new) % 256
    assert vec.depth == 1 and machine.counts.rotations == sum(len(set(x.tolist()) - {0}) for x in (delta % baby, delta // baby))
    assert machine.counts.plain_products == len(set(delta.tolist()))


def test_steps_are_what_einsum_does():
    plan, machine, (a, b) = parse("ij,jk->ik", [(3, 4), (4, 5)], 4096), Simulator(), data("ij,jk->ik")
    A, B = (match(plan, labels, pack(machine, x)) for labels, x in zip(plan.inputs, (a, b)))
    everything = np.einsum("ij,jk->jik", np.pad(a, ((0, 1), (0, 0))), np.pad(b, ((0, 0), (0, 3))))
    product = multiply([A, B])
    np.testing.assert_array_equal(product.values[:128].reshape(4, 4, 8), everything)
    summed = reduce(plan, product)
    np.testing.assert_allclose(summed.values[:32].reshape(4, 8)[:3, :5], a @ b, atol=TOLERANCE)
    assert summed.values[32:].any() and not mask(plan, summed).values[32:].any()
    old, new = moves(plan, "jk")                                                 # j: stride 8 -> 32, k: 1 -> 1
    assert old.tolist() == list(range(32)) and new.tolist() == [32 * (e // 8) + e % 8 for e in range(32)]
    np.testing.assert_array_equal(match(plan, "jk", b), B.values)                # a known operand gets the same layout


# --- the machine

def test_machine_adds_multiplies_and_rotates_to_the_right():
    machine = Simulator(8, levels=2)
    v, w = machine.load([1, 2, 3]), machine.load(np.arange(8))
    assert v.rotate(1).values.tolist() == [0, 1, 2, 3, 0, 0, 0, 0] and v.rotate(-1).values.tolist() == [2, 3, 0, 0, 0, 0, 0, 1]
    assert v.rotate(8) is v and machine.counts.rotations == 2
    assert (v + w).values.tolist() == [1, 3, 5, 3, 4, 5, 6, 7] and (v + w).depth == 0
    assert ((v * w) + v).values.tolist() == [1, 4, 9, 0, 0, 0, 0, 0] and (v * w).depth == 1 and (v * np.ones(8) + w).depth == 1
    assert ((v * w) * w).depth == 2
    counts = vars(machine.counts).copy()
    with pytest.raises(ValueError, match="levels=2: a product of depth 3"):
        (v * w) * w * w
    assert machine.counts.products == counts["products"] + 2                    # the two that fit
    assert (machine.counts.plain_products, machine.counts.additions) == (1, 5 - 1)


def test_noise_has_the_stated_variance():
    """Loading, rotating and multiplying add one draw each; a sum of two independent vectors has the sum of their variances. Chi-square over 4096 slots."""
    machine = Simulator(4096, noise=0.5, rng=np.random.default_rng(4))
    zero = machine.load(np.zeros(4096))
    for vec, draws in ((zero, 1), (zero.rotate(3), 2), (zero * np.ones(4096), 2), (zero + machine.load([]), 2), (zero.rotate(1).rotate(1), 3)):
        ratio = (vec.values**2).sum() / (draws * 0.25)
        assert stats.chi2.ppf(FAILURE / 2, 4096) < ratio < stats.chi2.isf(FAILURE / 2, 4096)


def test_small_noise_stays_small_and_repeats():
    def run(seed):
        machine = Simulator(noise=2.0**-20, rng=np.random.default_rng(seed))
        return einsum("ij,jk->ik", *[pack(machine, a) for a in data("ij,jk->ik")]).read()
    exact = np.einsum("ij,jk->ik", *data("ij,jk->ik"))
    # at most 49 noisy operations, each scaled by entries below 4 and summed over 4: 6 sigma of all of them together stays below 2^-20 * 6 * 16 * 7
    assert 0 < np.abs(run(5) - exact).max() < 2.0**-20 * 700
    assert np.array_equal(run(5), run(5)) and not np.array_equal(run(5), run(6))
    assert not np.array_equal(*(Simulator(8, noise=1.0).load([]).values for _ in range(2)))                  # without a generator: fresh entropy


# --- parity: the same calls on ciphertexts

class Seal:
    """The machine's face on real RNS-CKKS, 128-bit secure parameters: N = 8192, so 4096 slots, and a chain of three primes to spend."""
    slots, levels, scale = 4096, 3, 2.0**35

    def __init__(self, shifts, seal):
        self.seal, self.rotations = seal, 0
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(8192)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(8192, [50, 35, 35, 35, 50]))
        self.context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        assert self.context.parameters_set()
        keygen = seal.KeyGenerator(self.context)
        public, self.relin, self.galois = seal.PublicKey(), seal.RelinKeys(), seal.GaloisKeys()
        keygen.create_public_key(public)
        keygen.create_relin_keys(self.relin)
        keygen.create_galois_keys(sorted({-(s % 4096) for s in shifts} - {0}), self.galois)
        self.encryptor, self.evaluator = seal.Encryptor(self.context, public), seal.Evaluator(self.context)
        self.decryptor, self.encoder = seal.Decryptor(self.context, keygen.secret_key()), seal.CKKSEncoder(self.context)

    def load(self, values):
        plain, cipher = self.seal.Plaintext(), self.seal.Ciphertext()
        self.encoder.encode(np.pad(values, (0, 4096 - len(values))).tolist(), self.scale, plain)
        self.encryptor.encrypt(plain, cipher)
        return SealVec(self, cipher)


class SealVec:
    def __init__(self, machine, cipher):
        self.machine, self.cipher = machine, cipher

    @property
    def depth(self):
        """Primes that are gone from the ciphertext's modulus."""
        return 3 - self.machine.context.get_context_data(self.cipher.parms_id()).chain_index()

    @property
    def values(self):
        plain = self.machine.seal.Plaintext()
        self.machine.decryptor.decrypt(self.cipher, plain)
        return np.array(self.machine.encoder.decode_double(plain))

    def level_with(self, other):
        """Copies of both at the lower one's modulus: dropping primes without rescaling."""
        low = min((self, other), key=lambda v: 3 - v.depth).cipher.parms_id()
        pair = [self.machine.seal.Ciphertext() for _ in range(2)]
        for v, out in zip((self, other), pair):
            self.machine.evaluator.mod_switch_to(v.cipher, low, out)
        return pair

    def rescaled(self, cipher):
        self.machine.evaluator.rescale_to_next_inplace(cipher)
        cipher.scale = self.machine.scale                                           # the primes are 2^35 up to a factor 1 + 2^-17
        return SealVec(self.machine, cipher)

    def __add__(self, other):
        a, b = self.level_with(other)
        self.machine.evaluator.add_inplace(a, b)
        return SealVec(self.machine, a)

    def __mul__(self, other):
        evaluator = self.machine.evaluator
        if isinstance(other, SealVec):
            a, b = self.level_with(other)
            evaluator.multiply_inplace(a, b)
            evaluator.relinearize_inplace(a, self.machine.relin)
        else:
            a, plain = self.machine.seal.Ciphertext(), self.machine.seal.Plaintext()
            self.machine.encoder.encode(other.tolist(), self.cipher.parms_id(), self.machine.scale, plain)
            evaluator.multiply_plain(self.cipher, plain, a)
        return self.rescaled(a)

    def rotate(self, s):
        if s % 4096 == 0:
            return self
        self.machine.rotations += 1
        out = self.machine.seal.Ciphertext()
        self.machine.evaluator.rotate_vector(self.cipher, -(s % 4096), self.machine.galois, out)          # SEAL's positive steps go left
        return SealVec(self.machine, out)


@pytest.mark.parametrize("equation, known", [("ij,j->i", ()), ("ij,j->i", (0,)), ("i,i->", ()), ("ij,ij->", (1,)), ("ij,jk->ik", ()), ("ij,ij,ji->ij", ())])
def test_real_ciphertexts_give_the_same_numbers_and_use_the_same_levels(equation, known, monkeypatch):
    seal = pytest.importorskip("tenseal.sealapi", reason="tenseal is not installed: the simulator is not compared with real CKKS ciphertexts")
    shifts, rotate = set(), SlotVec.rotate
    monkeypatch.setattr(SlotVec, "rotate", lambda vec, s: (shifts.add(s), rotate(vec, s))[1])      # SEAL needs a key for each shift
    arrays, machine = data(equation), Simulator(4096, levels=3)
    simulated = einsum(equation, *[a if i in known else pack(machine, a) for i, a in enumerate(arrays)])
    real = Seal(shifts, seal)
    out = einsum(equation, *[a if i in known else pack(real, a) for i, a in enumerate(arrays)])
    assert (out.vec.depth, real.rotations) == (simulated.vec.depth, machine.counts.rotations)
    # a scale of 2^35 over N = 8192 coefficients leaves about 2^-20 an operation; a wrong slot would be off by about 1
    np.testing.assert_allclose(out.read(), np.einsum(equation, *arrays), atol=1e-3)
    np.testing.assert_allclose(out.vec.values, simulated.vec.values, atol=1e-3)


# --- bad input

BAD = [
    ("ij,jk", [(2, 3), (3, 4)], "one '->'"), ("ij->jk->ik", [(2, 3)], "one '->'"), (7, [(2, 3)], "one '->'"), ("...i->...", [(2, 3)], "'...' is not supported"),
    ("i1->i", [(2, 3)], "no letters"), ("ii->i", [(2, 2)], "'ii' repeats a label"), ("ii->", [(2, 2)], "repeats a label"), ("i->ii", [(2,)], "'ii' repeats a label"),
    ("ij,jk->ik", [(2, 3)], "names 2 operands: 1 were given"), ("ij->i", [(2, 3), (2, 3)], "names 1 operands: 2 were given"),
    ("ij->i", [(2, 3, 4)], "'ij', has 2 labels, but shape (2, 3, 4)"), ("ij,jk->ik", [(2, 3), (4, 5)], "label 'j' has size 3, and size 4 in operand 1"),
    ("ij,jk->ik", [(2, 1), (4, 5)], "label 'j' has size 1, and size 4"), ("ij->k", [(2, 3)], "output label 'k' is in no operand"),
    ("ij,jk->ik", [(9, 9), (9, 9)], "need 4096 slots; there are 1024"),
]


@pytest.mark.parametrize("equation, shapes, message", BAD, ids=[str(b[0]) + str(b[1]) for b in BAD])
def test_a_mismatched_expression_is_refused_before_anything_is_done(equation, shapes, message):
    machine = Simulator(1024)
    operands = [pack(machine, np.ones(s)) for s in shapes]
    with pytest.raises(ValueError, match=re.escape(message)):
        einsum(equation, *operands)
    assert machine.counts == Counts()
    if "->" in str(equation) and "slots" not in message:
        with pytest.raises(ValueError, match=re.escape(message)):                    # the fallback for known operands is as strict
            einsum(equation, *[np.ones(s) for s in shapes])


def test_too_few_levels_are_seen_before_anything_is_done():
    machine = Simulator(levels=2)
    a, b = (pack(machine, x) for x in data("ij,jk->ik"))
    with pytest.raises(ValueError, match="needs depth 3: the machine has 2 levels"):
        einsum("ij,jk->ik", a, b)
    assert machine.counts == Counts()


@pytest.mark.parametrize("array, error, message", [
    ([1.0, math.nan], ValueError, "contains nan"), ([math.inf], ValueError, "contains inf"), ([1j], TypeError, "complex"), (["a"], TypeError, "real numbers"),
    ([True], TypeError, "bool"), (None, TypeError, "object"), (np.ones(17), ValueError, "at most 16 slots"), (np.ones((3, 5)), ValueError, r"shape \(3, 5\)"),
    (np.ones((0, 2)), ValueError, "no empty axis")])
def test_bad_arrays(array, error, message):
    machine = Simulator(16)
    with pytest.raises(error, match=message):
        pack(machine, array)
    if "slots" not in message and "shape" not in message and "axis" not in message:
        with pytest.raises(error, match="operand 1 .*" + message):
            einsum("i,j->ij", pack(machine, [1.0]), array)
    assert machine.counts == Counts()


@pytest.mark.parametrize("arguments, error, message", [
    (dict(slots=12), ValueError, "slots=12"), (dict(slots=1), ValueError, "slots=1"), (dict(slots=16.0), ValueError, "slots=16.0"), (dict(slots=True), ValueError, "slots=True"),
    (dict(levels=0), ValueError, "levels=0"), (dict(levels=2.0), ValueError, "levels=2.0"), (dict(noise=-1.0), ValueError, "noise=-1.0"),
    (dict(noise=math.nan), ValueError, "noise=nan"), (dict(noise=math.inf), ValueError, "noise=inf"), (dict(rng=0), TypeError, "rng=0")])
def test_bad_machines(arguments, error, message):
    with pytest.raises(error, match=message):
        Simulator(**arguments)


def test_bad_operations_of_the_machine():
    machine = Simulator(8)
    v = machine.load([1.0])
    for call, error, message in ((lambda: v.rotate(1.5), TypeError, "s=1.5"), (lambda: v.rotate(True), TypeError, "s=True"), (lambda: v * np.ones(4), ValueError, r"shape \(4,\)"),
                                 (lambda: v * np.full(8, np.nan), ValueError, "contains nan"), (lambda: v * 2, TypeError, "unsupported"), (lambda: v + 2, TypeError, "unsupported"),
                                 (lambda: v + Simulator(8).load([1.0]), ValueError, "two machines"), (lambda: v * Simulator(8).load([1.0]), ValueError, "two machines"),
                                 (lambda: machine.load(np.ones(9)), ValueError, r"shape \(9,\)"), (lambda: machine.load(1.0), ValueError, "expected \\(m,\\)"),
                                 (lambda: einsum("i,i->i", pack(machine, [1.0]), pack(Simulator(8), [1.0])), ValueError, "2 machines")):
        with pytest.raises(error, match=message):
            call()
    assert machine.counts == Counts()
    assert pack(Simulator(16, levels=1), np.ones(16)).read().sum() == 16                                    # just fits
    assert set(vars(Counts()).values()) == {0} and (Simulator().slots, Simulator().noise) == (4096, 0.0)
    assert [check_slots(2), baby_steps(4096), baby_steps(2048), baby_steps(16384), baby_steps(16)] == [2, 64, 64, 128, 4]
