"""What makes a page a page: its seed, its card, its figures, its explorer, its claims.

Pages import from here; the modules of `lib/<chapter>` never do. Names are loaded on first use, so that importing the package costs nothing.
"""
import importlib as _importlib
import os as _os

if _os.environ.get("BOOK_OFFLINE") == "1":
    from . import offline as _offline

    _offline.block_network()

_HOME = {
    "seed": "seeds", "rng": "seeds", "generator": "seeds",
    "Claims": "claims", "ClaimError": "claims",
    "explore": "explorer",
    "show": "figures", "PALETTE": "figures", "MARKERS": "figures", "LINES": "figures",
    "card": "cards", "source": "cards",
    "gpu_table": "bench_gpu",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(_importlib.import_module(f"lib.book.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lib.book' has no attribute {name!r}; it has {', '.join(__all__)}")
