"""Step time of the chapter's element-wise optimizers on about 100 tensors and 3 M parameters, beside torch's AdamW (foreach) and the same method of pytorch_optimizer."""
import importlib
import statistics
import time

import torch

from lib.book.registry import load

# registry symbol -> (options of ours, name in pytorch_optimizer or None, its options)
METHODS = {
    "AdaBelief": ({}, "AdaBelief", {"rectify": False}),
    "Adan": ({}, "Adan", {}),
    "AdamP": ({}, "AdamP", {}),
    "SGDP": ({}, "SGDP", {}),
    "DiffGrad": ({}, "DiffGrad", {}),
    "Lion": ({}, "Lion", {}),
    "SGDSaI": ({}, "SGDSaI", {}),
    "FRUGAL": ({}, None, {}),
    "SinkGD": ({}, None, {}),
    "AuON": ({}, None, {}),
}


def model(seed=0):
    """98 matrices of 175 x 175: 3.0 M parameters, with gradients."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(175, 175, generator=g, requires_grad=True) for _ in range(98)]
    for p in params:
        p.grad = torch.randn(175, 175, generator=g)
    return params


def race(makers, rounds=25):
    """Median milliseconds of a step of each, taken in turn so that all see the same machine."""
    optimizers = {name: make(model()) for name, make in makers.items()}
    taken = {name: [] for name in makers}
    for i in range(rounds + 3):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if i >= 3:                                   # the first steps allocate the state
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in taken.items()}


def rows():
    import pytorch_optimizer

    torch.set_num_threads(1)
    homes = {symbol: paper.module for paper in load().of_chapter("optimizers") for symbol in paper.symbols if symbol in METHODS}
    for symbol, (ours, peer, theirs) in METHODS.items():
        cls = getattr(importlib.import_module(homes[symbol]), symbol)
        makers = {"ours": lambda p: cls(p, lr=1e-3, **ours), "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True)}
        if peer:
            makers["peer"] = lambda p: getattr(pytorch_optimizer, peer)(p, lr=1e-3, **theirs)
        ms = race(makers)
        note = f"{ms['ours'] / ms['AdamW']:.2f} of AdamW's time" + (f", {ms['ours'] / ms['peer']:.2f} of pytorch_optimizer's" if peer else "")
        yield f"{symbol}, one step", ms["ours"], "ms", note
