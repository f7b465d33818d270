"""The race of the optimizers (`make race`): every method on three beds with one procedure and one budget; writes data/race_optimizers.json.

For each method and bed: six learning rates a decade apart with one seed, then three rates around the best of them (x 0.4, 1, 2.5) with five seeds; the rate with the smallest
median is reported. All rates fall in a line to zero. No weight decay, all other options at their defaults. One thread; about a quarter of an hour.
"""
import hashlib
import importlib
import json
import pathlib
import time

import torch

from lib.book.bench import machine
from lib.optimizers import harness

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "race_optimizers.json"
COARSE, AROUND, SEEDS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), (0.4, 1.0, 2.5), (0, 1, 2, 3, 4)
BEDS = {"quadratic": (lambda: harness.quadratic(), 200), "digits CNN": (lambda: harness.digits("cnn", split="valid"), 100),
        "language model": (lambda: harness.language(), 100)}


def _ours(slug, name, **options):
    return lambda params, lr: getattr(importlib.import_module(f"lib.optimizers.{slug}"), name)(params, lr=lr, **options)


METHODS = {
    "SGD + momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0),
    "AdaBelief": _ours("adabelief", "AdaBelief"), "Adan": _ours("adan", "Adan"), "AdamP": _ours("adamp", "AdamP"), "SGDP": _ours("adamp", "SGDP"),
    "diffGrad": _ours("diffgrad", "DiffGrad"), "Lion": _ours("lion", "Lion"), "SGD-SaI": _ours("sgd_sai", "SGDSaI", weight_decay=0.0),
    "FRUGAL (1/4)": _ours("frugal", "FRUGAL"), "SinkGD": _ours("multinorm", "SinkGD"), "SWAN": _ours("multinorm", "SWAN"),
    "AuON": _ours("auon", "AuON"), "Hybrid-AuON": _ours("auon", "HybridAuON"), "Muon": _ours("auon", "Muon"), "MKOR": _ours("mkor", "MKOR"),
    "SGD, clipped": _ours("coordinate_clipping", "SGDClip", momentum=0.9, fraction=0.1, skip_zeros=True),
}


def sources() -> dict:
    """Digest of every module of the chapter: the page says when the results are older than the code."""
    return {p.stem: hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in sorted((HERE.parent / "lib" / "optimizers").glob("*.py"))}


def enter(method, bed, steps):
    """One method on one bed: {'lr', 'scores' of five seeds, 'edge': best rate at the edge of the coarse grid, 'bytes' per parameter}."""
    coarse = harness.race(bed, {"m": method}, COARSE, [SEEDS[0]], steps, harness.linear_decay)["m"]
    fine = harness.race(bed, {"m": method}, [coarse.best.lr * f for f in AROUND], SEEDS, steps, harness.linear_decay)["m"]
    return {"lr": fine.best.lr, "scores": [round(s, 6) for s in fine.best.scores], "edge": not coarse.best_is_inside, "bytes": fine.bytes_per_parameter}


def main():
    torch.set_num_threads(1)
    results = {}
    for bed_name, (make, steps) in BEDS.items():
        bed = make()
        results[bed_name] = {"score": bed.score, "steps": steps, "methods": {}}
        for name, method in METHODS.items():
            start = time.time()
            results[bed_name]["methods"][name] = enter(method, bed, steps)
            r = results[bed_name]["methods"][name]
            print(f"{bed_name:15s} {name:15s} lr {r['lr']:.2g}  median {sorted(r['scores'])[2]:.4g}  {r['bytes']:.1f} B  {time.time() - start:.0f} s", flush=True)
    OUT.write_text(json.dumps({"machine": machine(), "seeds": list(SEEDS), "sources": sources(), "beds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
