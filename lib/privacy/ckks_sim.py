"""A simulated CKKS machine: vectors of numbers in slots, and the few operations that a ciphertext of that scheme allows. It keeps no secret: nothing here is encryption.

RNS-CKKS (Cheon, Kim, Kim, Song, 2017; with residue number systems 2018) packs S numbers into a ciphertext. One can add slot by slot, multiply slot by slot (by another ciphertext or by a
known vector), and rotate all slots cyclically. Every multiplication uses up a level, and there are only as many as the parameters were chosen for. The machine counts all of it.

| symbol | name | shape |
|---|---|---|
| S | `slots` | a power of two |
| L | `levels` | how many multiplications may follow one another |
| v | `SlotVec.values` | (S,) |
| depth of v | `SlotVec.depth` | levels used up on the longest way to v |
| sigma | `noise` | standard deviation of the error that an operation adds to a slot |

Direction: rotate(v, s)[i] = v[i - s], so a positive s shifts to the right and what leaves at the end comes back at the front.
Noise: independent Gaussian, one draw a slot for loading, rotating and multiplying. It stands in for the scheme's real error, which grows with the message and correlates between slots.
"""
import math
from dataclasses import dataclass, field

import numpy as np

from .oracles import check_rng


@dataclass
class Counts:
    """Operations done so far; a rotation by a multiple of S is none."""
    rotations: int = 0
    products: int = 0               # slot vector times slot vector
    plain_products: int = 0         # slot vector times known numbers
    additions: int = 0


def check_slots(slots) -> int:
    """A power of two >= 2. Raises ValueError."""
    if isinstance(slots, bool) or not isinstance(slots, (int, np.integer)) or slots < 2 or slots & (slots - 1):
        raise ValueError(f"slots={slots!r}: expected a power of two >= 2")
    return int(slots)


def check_numbers(name, values) -> np.ndarray:
    """Finite real numbers as float64, any shape. Raises TypeError or ValueError."""
    values = np.asarray(values)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"{name} has dtype {values.dtype}: expected real numbers")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} contains {values[~np.isfinite(values)][0]}: expected finite numbers")
    return values.astype(float)


@dataclass(eq=False)
class Simulator:
    """slots: power of two; levels: integer >= 1; noise: finite, >= 0; rng: generator of the noise. Raises ValueError/TypeError otherwise."""
    slots: int = 4096
    levels: int = 8
    noise: float = 0.0
    rng: np.random.Generator | None = None
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self):
        self.slots, self.rng = check_slots(self.slots), check_rng(self.rng)
        if isinstance(self.levels, bool) or not isinstance(self.levels, (int, np.integer)) or self.levels < 1:
            raise ValueError(f"levels={self.levels!r}: expected an integer >= 1")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise={self.noise!r}: expected a finite number >= 0")

    def load(self, values) -> "SlotVec":
        """(m,) numbers with m <= S -> a fresh slot vector of depth 0; the other slots are zero."""
        values = check_numbers("values", values)
        if values.ndim != 1 or len(values) > self.slots:
            raise ValueError(f"values has shape {values.shape}: expected (m,) with m <= {self.slots} slots")
        return self._new(np.pad(values, (0, self.slots - len(values))), 0)

    def _new(self, values, depth):
        if self.noise:
            values = values + self.noise * self.rng.standard_normal(self.slots)
        return SlotVec(self, values, depth)


class SlotVec:
    """What a ciphertext holds. `a + b`, `a * b` (b a slot vector or (S,) known numbers) and `a.rotate(s)`; `values` would need the secret key."""

    def __init__(self, machine, values, depth):
        self.machine, self.values, self.depth = machine, values, depth

    def _partner(self, other):
        if other.machine is not self.machine:
            raise ValueError("operands live on two machines: expected slot vectors of one")
        return other.values

    def __add__(self, other):
        if not isinstance(other, SlotVec):
            return NotImplemented
        values = self.values + self._partner(other)
        self.machine.counts.additions += 1
        return SlotVec(self.machine, values, max(self.depth, other.depth))

    def __mul__(self, other):
        machine, plain = self.machine, isinstance(other, np.ndarray)
        if not plain and not isinstance(other, SlotVec):
            return NotImplemented
        if plain and other.shape != (machine.slots,):
            raise ValueError(f"factor has shape {other.shape}: expected ({machine.slots},)")
        depth = 1 + max(self.depth, 0 if plain else other.depth)
        if depth > machine.levels:
            raise ValueError(f"levels={machine.levels}: a product of depth {depth} needs at least that many; a fresh vector has depth 0")
        values = self.values * (check_numbers("factor", other) if plain else self._partner(other))
        machine.counts.plain_products += plain
        machine.counts.products += not plain
        return machine._new(values, depth)

    def rotate(self, s: int) -> "SlotVec":
        """All slots s places to the right, cyclically; to the left for s < 0."""
        if isinstance(s, bool) or not isinstance(s, (int, np.integer)):
            raise TypeError(f"s={s!r}: expected an integer")
        if s % self.machine.slots == 0:
            return self
        self.machine.counts.rotations += 1
        return self.machine._new(np.roll(self.values, s), self.depth)
