"""EinHops: Einsum Notation for Expressive Homomorphic Operations on RNS-CKKS Tensors (2025, arXiv:2507.07972).

einsum on tensors that lie in the slots of a vector which can only be added, multiplied slot by slot, and rotated. Six steps: check the expression; name output and reduction labels;
bring every operand into one common layout (permute, then replicate); multiply; reduce by doubling; mask. The vectors are `ckks_sim.SlotVec`s, or anything else with `+`, `*` and `rotate`.

| symbol | name | shape |
|---|---|---|
| S | `slots` | number of slots, a power of two |
| o, r | `Plan.output`, `Plan.reduced` | labels that stay; labels that are summed, in order of appearance |
| r + o | `Plan.layout` | the common layout, reduction labels outermost |
| &#124;d&#124; | `Plan.padded[d]` | size of label d, rounded up to a power of two |
| T | `moves(...)` | 0/1 matrix, S x S, kept as the (old, new) slot pairs of its ones |
| delta | `(old - new) % S` | diagonals of T that are not zero |
| N1 | `baby_steps(S)` | sqrt(S), or sqrt(2S) where log2 S is odd |

Deviations from the paper: an expression that does not fit raises ValueError (the released code ends the process); a size-1 axis is not stretched against a longer one; rotations by zero are
neither done nor counted; S is whatever the machine has (the released code: 16384). Cost: see `cost`, which is exact.
"""
import itertools
import math
from dataclasses import dataclass

import numpy as np

from .ckks_sim import check_numbers, check_slots


@dataclass(frozen=True)
class Tensor:
    """A tensor in slots: row-major, every axis padded with zeros to a power of two; `vec` holds prod(padded) numbers from slot 0 on, and zeros."""
    vec: object
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The numbers, with the tensor's shape."""
        full = tuple(map(_pow2, self.shape))
        return self.vec.values[:math.prod(full)].reshape(full)[tuple(map(slice, self.shape))].copy()


@dataclass(frozen=True)
class Plan:
    """What steps 1 and 2 find out; sizes and padded map a label to its true and its padded size."""
    inputs: tuple[str, ...]
    output: str
    reduced: str
    sizes: dict
    padded: dict
    slots: int

    @property
    def layout(self) -> str:
        return self.reduced + self.output

    @property
    def used(self) -> int:
        """Slots that hold the product of all operands."""
        return math.prod(self.padded.values())

    def strides(self, labels) -> dict:
        """Row-major distance between neighbours along each label."""
        sizes = [self.padded[d] for d in labels]
        return {d: math.prod(sizes[i + 1:]) for i, d in enumerate(labels)}


@dataclass(frozen=True)
class Cost:
    """Counted work of a call: rotations of the three kinds, levels, slots."""
    permute: int
    replicate: int
    reduce: int
    depth: int
    slots: int

    @property
    def rotations(self) -> int:
        return self.permute + self.replicate + self.reduce


def _pow2(n):
    return 1 << (n - 1).bit_length()


def _padded(array):
    """Zeros appended to every axis, up to the next power of two."""
    full = np.zeros([_pow2(n) for n in array.shape])
    full[tuple(map(slice, array.shape))] = array
    return full


def baby_steps(slots) -> int:
    """N1, fixed by the number of slots alone."""
    return 1 << (check_slots(slots).bit_length() // 2)


def pack(machine, array) -> Tensor:
    """A numpy array of any shape -> a Tensor on `machine`. Raises ValueError if it has an empty axis or does not fit, TypeError for what is not real."""
    array = check_numbers("array", array)
    if 0 in array.shape or math.prod(map(_pow2, array.shape)) > machine.slots:
        raise ValueError(f"array has shape {array.shape}: expected no empty axis, and at most {machine.slots} slots after padding to powers of two")
    return Tensor(machine.load(_padded(array).ravel()), array.shape)


def parse(equation, shapes, slots=1 << 62) -> Plan:
    """Steps 1 and 2. Raises ValueError, naming the label or the operand, for an expression that does not fit the shapes or the slots."""
    if not isinstance(equation, str) or equation.count("->") != 1:
        raise ValueError(f"equation={equation!r}: expected a string with one '->', such as 'ij,jk->ik'")
    left, output = equation.replace(" ", "").split("->")
    inputs, sizes = tuple(left.split(",")), {}
    for labels in (*inputs, output):
        if labels and not (labels.isascii() and labels.isalpha()):
            raise ValueError(f"equation={equation!r}: {labels!r} has characters that are no letters; '...' is not supported")
        if len(set(labels)) < len(labels):
            raise ValueError(f"equation={equation!r}: {labels!r} repeats a label; diagonals and traces are not supported")
    if len(inputs) != len(shapes):
        raise ValueError(f"equation={equation!r} names {len(inputs)} operands: {len(shapes)} were given")
    for number, (labels, shape) in enumerate(zip(inputs, shapes)):
        if len(labels) != len(shape):
            raise ValueError(f"equation={equation!r}: operand {number}, {labels!r}, has {len(labels)} labels, but shape {tuple(shape)}")
        for d, n in zip(labels, shape):
            if sizes.setdefault(d, n) != n:
                raise ValueError(f"equation={equation!r}: label {d!r} has size {sizes[d]}, and size {n} in operand {number}")
    if missing := set(output) - set(sizes):
        raise ValueError(f"equation={equation!r}: output label {min(missing)!r} is in no operand")
    plan = Plan(inputs, output, "".join(d for d in sizes if d not in output), sizes, {d: _pow2(n) for d, n in sizes.items()}, check_slots(slots))
    if plan.used > plan.slots:
        raise ValueError(f"equation={equation!r}: padded sizes {plan.padded} need {plan.used} slots; there are {plan.slots}")
    return plan


def moves(plan, labels):
    """(old, new): the slot of every entry of an operand in its own layout and in the common one; entries that padding adds are moved too."""
    here, there = plan.strides(labels), plan.strides(plan.layout)
    old = np.arange(math.prod(plan.padded[d] for d in labels))
    return old, sum((old // here[d] % plan.padded[d] * there[d] for d in labels), np.zeros_like(old))


def permute(vec, old, new, slots, baby=None):
    """Slot old[e] goes to slot new[e], the others to zero: T v, for one level."""
    baby, shift, total = baby or baby_steps(slots), (old - new) % slots, None
    turned = {i: vec.rotate(-i) for i in np.unique(shift % baby).tolist()}
    for j in np.unique(shift // baby).tolist():
        block = None
        for delta in np.unique(shift[shift // baby == j]).tolist():
            diagonal = np.zeros(slots)
            diagonal[new[shift == delta]] = 1  # d_delta[i] = T[i, i + delta]
            term = turned[delta % baby] * np.roll(diagonal, baby * j)
            block = term if block is None else block + term
        block = block.rotate(-baby * j)
        total = block if total is None else total + block
    return total


def match(plan, labels, operand):
    """Step 3: an operand in the common layout.

    A Tensor gives a vector like its `vec`; known numbers give (S,) numbers, without any operation.
    """
    if not isinstance(operand, Tensor):
        kept = [d for d in plan.layout if d in labels]
        full = _padded(operand).transpose([labels.index(d) for d in kept])
        full = full.reshape([plan.padded[d] if d in labels else 1 for d in plan.layout])
        full = np.broadcast_to(full, [plan.padded[d] for d in plan.layout])
        return np.pad(full.ravel(), (0, plan.slots - plan.used))
    vec, (old, new) = operand.vec, moves(plan, labels)
    if not np.array_equal(old, new):
        vec = permute(vec, old, new, plan.slots)
    stride = plan.strides(plan.layout)
    for d in reversed([d for d in plan.layout if d not in labels]):  # innermost first
        for step in range(plan.padded[d].bit_length() - 1):
            vec = vec + vec.rotate(stride[d] << step)  # twice as many copies
    return vec


def multiply(factors):
    """Step 4: neighbours in pairs, until one is left; an odd one waits for the next round."""
    while len(factors) > 1:
        pairs = [factors[i:i + 2] for i in range(0, len(factors), 2)]
        factors = [p[0] if len(p) == 1 else p[1] * p[0] if isinstance(p[0], np.ndarray) else p[0] * p[1] for p in pairs]
    return factors[0]


def reduce(plan, vec):
    """Step 5: sums over the reduction labels arrive in the slots below prod |o|; those above hold partial sums."""
    amount = math.prod(plan.padded[d] for d in plan.output)
    while amount < plan.used:
        vec = vec + vec.rotate(-amount)
        amount *= 2
    return vec


def mask(plan, vec):
    """Step 6: zero whatever is no entry of the output, one level."""
    keep = _padded(np.ones([plan.sizes[d] for d in plan.output])).ravel()
    return vec * np.pad(keep, (0, plan.slots - len(keep)))


def einsum(equation, *operands):
    """Einstein summation over Tensors and numpy arrays -> Tensor; a plain np.einsum if no operand is a Tensor.

    equation: with '->', letters only, no label twice in an operand. All Tensors must live on one machine. Raises ValueError/TypeError before the first operation.
    """
    operands = [x if isinstance(x, Tensor) else check_numbers(f"operand {i}", x) for i, x in enumerate(operands)]
    machines = {id(x.vec.machine): x.vec.machine for x in operands if isinstance(x, Tensor)}
    if len(machines) > 1:
        raise ValueError(f"operands live on {len(machines)} machines: expected one")
    plan = parse(equation, [x.shape for x in operands], *[m.slots for m in machines.values()])
    if not machines:
        return np.einsum(equation, *operands)
    machine, = machines.values()
    if (needed := depth(plan, [x.vec.depth if isinstance(x, Tensor) else None for x in operands])) > machine.levels:
        raise ValueError(f"equation={equation!r} on these operands needs depth {needed}: the machine has {machine.levels} levels")
    product = multiply([match(plan, labels, x) for labels, x in zip(plan.inputs, operands)])
    return Tensor(mask(plan, reduce(plan, product)), tuple(plan.sizes[d] for d in plan.output))


def depth(plan, start) -> int:
    """Depth of the result. start: for each operand the depth at which it comes in, None for known numbers."""
    depths = [s if s is None else s + _moved(plan, labels) for labels, s in zip(plan.inputs, start)]
    while len(depths) > 1:                                                           # the tree of `multiply`
        pairs = [depths[i:i + 2] for i in range(0, len(depths), 2)]
        depths = [p[0] if len(p) == 1 else 1 + max(d for d in p if d is not None) if p != [None, None] else None for p in pairs]
    return depths[0] + 1


def _moved(plan, labels) -> int:
    old, new = moves(plan, labels)
    return int(not np.array_equal(old, new))


def cost(plan, in_slots=None, baby=None) -> Cost:
    """The exact cost of a call on fresh operands, without doing it. in_slots: for each operand, whether it is a Tensor (default: all)."""
    baby, in_slots, permuting, replicating = baby or baby_steps(plan.slots), in_slots or [True] * len(plan.inputs), 0, 0
    for labels in itertools.compress(plan.inputs, in_slots):
        old, new = moves(plan, labels)
        delta = (old - new) % plan.slots
        permuting += sum(np.count_nonzero(np.unique(part)) for part in (delta % baby, delta // baby))
        replicating += sum(n.bit_length() - 1 for d, n in plan.padded.items() if d not in labels)
    reducing = sum(plan.padded[d].bit_length() - 1 for d in plan.reduced)
    return Cost(int(permuting), replicating, reducing, depth(plan, [0 if s else None for s in in_slots]), plan.used)
