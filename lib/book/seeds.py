"""All randomness of a page flows from one integer, BOOK_SEED."""
import os

import numpy as np


def seed() -> int:
    """The page's seed: environment variable BOOK_SEED, 0 where it is not set.

    Raises ValueError if BOOK_SEED is not an integer >= 0.
    """
    text = os.environ.get("BOOK_SEED", "0")
    if not text.isdecimal():
        raise ValueError(f"BOOK_SEED={text!r}: expected an integer >= 0")
    return int(text)


def _sequence(stream):
    if isinstance(stream, bool) or not isinstance(stream, (int, np.integer)) or stream < 0:
        raise ValueError(f"stream={stream!r}: expected an integer >= 0")
    return np.random.SeedSequence([seed(), int(stream)])


def rng(stream: int = 0) -> np.random.Generator:
    """A numpy generator; different streams are statistically independent, the same stream repeats."""
    return np.random.default_rng(_sequence(stream))


def generator(stream: int = 0):
    """A torch.Generator on the CPU, from the same seed and stream numbering as `rng`."""
    import torch

    state = _sequence(stream).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
