"""python -m lib.book.bench_gpu [slug ...]: on a machine with a GPU, time the book's kernels beside cuBLAS, SDPA and the like (`make bench-gpu`).

A paper's cases are in tests/kernels/gpu_<slug>.py: `cases(xp, tiny)` yields `Case`s over arrays of `xp` (cupy here; with numpy and tiny=True the tests run the same cases on a processor, where only the results count).
The result is data/bench_gpu.json, with the GPU and the versions it was measured on; the pages show it through `gpu_table(key)`, and say so where nothing has been measured.
"""
import importlib.util
import json
import sys
from dataclasses import dataclass
from html import escape
from typing import Callable

from .paths import ROOT

FILE = ROOT / "data" / "bench_gpu.json"


@dataclass(frozen=True)
class Case:
    """One kernel beside one peer. run, peer_run: () -> array, the same result; rtol: how near (relative Frobenius norm), checked before anything is timed;
    bytes, operations: what the kernel must at least move through global memory and do, for the roofline."""
    what: str
    run: Callable
    peer: str
    peer_run: Callable
    bytes: int
    operations: int
    rtol: float


def files() -> dict:
    """slug -> path of its cases"""
    return {p.stem.removeprefix("gpu_"): p for p in sorted((ROOT / "tests" / "kernels").glob("gpu_*.py"))}


def cases(slug, xp, tiny=False):
    """The cases of one paper, as a list."""
    spec = importlib.util.spec_from_file_location(f"gpu_{slug}", files()[slug])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.cases(xp, tiny))


def as_torch(x):
    """A tensor on the same memory as a NumPy or CuPy array."""
    import numpy as np
    import torch

    return torch.as_tensor(x, device="cpu" if isinstance(x, np.ndarray) else "cuda")


def difference(a, b) -> float:
    """Relative Frobenius norm of the difference of two results (arrays or tensors of any kind)."""
    import numpy as np

    a, b = (np.asarray(x.get() if hasattr(x, "get") else x.detach().cpu().float() if hasattr(x, "detach") else x, dtype=np.float64) for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"results have shapes {a.shape} and {b.shape}")
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def microseconds(run, cp, repeats=50) -> float:
    """Median time of a call on the GPU, by events around each call, after three warm-up calls."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(repeats):
        start, stop = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        taken.append(1000 * cp.cuda.get_elapsed_time(start, stop))
    return sorted(taken)[len(taken) // 2]


def measure(slug, cp) -> list:
    """[[what, microseconds, peer, microseconds of the peer, bytes, operations], ...]. Raises ValueError when a kernel and its peer differ."""
    import torch

    rows = []
    with torch.cuda.stream(torch.cuda.ExternalStream(cp.cuda.get_current_stream().ptr)):        # one stream, so that events see both
        for c in cases(slug, cp):
            off = difference(c.run(), c.peer_run())
            if not off <= c.rtol:
                raise ValueError(f"{slug}: {c.what}: differs from {c.peer} by {off:.2g}, allowed {c.rtol:.2g}")
            rows.append([c.what, microseconds(c.run, cp), c.peer, microseconds(c.peer_run, cp), c.bytes, c.operations])
            print(f"{slug}: {c.what}: {rows[-1][1]:.1f} us; {c.peer}: {rows[-1][3]:.1f} us", flush=True)
    return rows


def load() -> dict:
    """{slug: {"machine": {...}, "rows": [...]}}, empty where nothing has been measured."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


class GpuTable:
    """What `gpu_table` shows."""

    def __init__(self, slug, record):
        self.slug, self.record = slug, record

    def __repr__(self):
        if not self.record:
            return f"No GPU time has been measured yet for {self.slug}: on a machine with one, run make bench-gpu."
        where = self.record["machine"]
        return "\n".join([f"{where['gpu']}, CUDA {where['cuda']}, torch {where['torch']}, cupy {where['cupy']}, {where['date']}",
                          *(f"{what}: {t:.1f} us; {peer}: {u:.1f} us" for what, t, peer, u, *_ in self.record["rows"])])

    def _repr_html_(self):
        if not self.record:
            return "<p class=\"gpu-times\">No GPU time has been measured yet: on a machine with a GPU, <code>make bench-gpu</code> fills this table.</p>"
        where = self.record["machine"]
        rows = "".join(f"<tr><td>{escape(what)}</td><td>{t:.1f}</td><td>{escape(peer)}</td><td>{u:.1f}</td><td>{t / u:.2f}</td><td>{b / t / 1e3:.0f}</td></tr>" for what, t, peer, u, b, _ in self.record["rows"])
        return (f"<table class=\"gpu-times\"><caption>Measured on {escape(where['gpu'])} with CUDA {escape(where['cuda'])}, torch {escape(where['torch'])}, cupy {escape(where['cupy'])}, {escape(where['date'])}; medians.</caption>"
                "<thead><tr><th>kernel</th><th>µs</th><th>peer</th><th>µs</th><th>ratio</th><th>GB/s</th></tr></thead><tbody>" + rows + "</tbody></table>")


def gpu_table(key) -> GpuTable:
    """The measured GPU times of a paper's kernels, or a sentence that there are none. key: "kernels/mixpe"."""
    slug = key.split("/")[-1]
    if slug not in files():
        raise ValueError(f"key={key!r}: there are no GPU cases for it; there are for {sorted(files())}")
    return GpuTable(slug, load().get(slug))


def main(argv=None):
    from ..cuda import gpu_available

    slugs = argv or sys.argv[1:] or list(files())
    unknown = set(slugs) - set(files())
    if unknown:
        sys.exit(f"no GPU cases for {sorted(unknown)}; there are for {sorted(files())}")
    there, why = gpu_available()
    if not there:
        sys.exit(f"bench-gpu needs a GPU: {why}")
    import cupy as cp
    import torch

    from .bench import machine

    props = cp.cuda.runtime.getDeviceProperties(0)
    where = machine() | {"gpu": props["name"].decode(), "cuda": str(cp.cuda.runtime.runtimeGetVersion()), "cupy": cp.__version__}
    if not torch.cuda.is_available():
        sys.exit(f"bench-gpu needs a torch that sees the GPU, for its peers; this is {torch.__version__}")
    kept = load()
    for slug in slugs:
        kept[slug] = {"machine": where, "rows": measure(slug, cp)}
        FILE.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
