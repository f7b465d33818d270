"""The chapter at the size that the issue of scale is about, on one core: frequency protocols for a million users and a thousand values, a tree counter over a million steps."""
import time

import numpy as np

from lib.privacy.allomfree import LGRR, LOSUE
from lib.privacy.continual_observation import TreeCounter
from lib.privacy.modular_subset_selection import ModularSubsetSelection
from lib.privacy.oracles import GRR, OUE, SS, SUE


def rows():
    n, k = 1_000_000, 1024
    values = np.random.default_rng(0).integers(0, k, n)
    for name, oracle in (("ModularSubsetSelection, 4 moduli", ModularSubsetSelection(k, 1.0, (967, 971, 977, 983))), ("subset selection", SS(k, 1.0))):
        for label, work in (("perturb", lambda: oracle.privatize(values, np.random.default_rng(1))), ("estimate", lambda: oracle.estimate(reports))):
            start = time.process_time()
            result = work()
            spent = time.process_time() - start
            if label == "perturb":
                reports = result
            yield f"{name}: {label}", spent, "CPU s", f"n = {n}, k = {k}, ε = 1"
    for name, oracle in (("randomized response", GRR(k, 1.0)), ("SUE", SUE(k, 1.0)), ("OUE", OUE(k, 1.0)), ("L-GRR, two rounds", LGRR(k, 2.0, 1.0)), ("L-OSUE, two rounds", LOSUE(k, 2.0, 1.0))):
        start = time.process_time()
        oracle.collect(values, np.random.default_rng(1))
        yield f"{name}: perturb and count in batches", time.process_time() - start, "CPU s", f"n = {n}, k = {k}, ε = 1"
    bits = np.random.default_rng(2).integers(0, 2, (n, 1))
    for piece in (n, 100):
        counter = TreeCounter(n, 1, 0.5, rng=np.random.default_rng(1))
        start = time.process_time()
        for at in range(0, n, piece):
            counter.observe(bits[at:at + piece])
        yield f"tree counter, {piece} arrivals a call", time.process_time() - start, "CPU s", f"T = {n}, d = 1, ρ = 0.5"
