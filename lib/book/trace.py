"""What does a page really read? Its `lib` modules and the project's files that it opens, recorded while it runs."""
import contextlib
import hashlib
import os
import resource
import sys
import threading
import time

from .paths import ROOT

MIME = "application/vnd.book.trace+json"
_opened, _extra = set(), set()
_recording = False
_quiet = threading.local()
_t0 = None
_SKIP = ("_build", ".venv", ".git")


def _hook(event, args):
    if not _recording or event != "open" or getattr(_quiet, "on", False):
        return
    path, mode = args[0], args[1]
    if isinstance(path, (str, os.PathLike)) and (mode is None or "r" in str(mode)):
        path = os.path.abspath(path)
        if path.startswith(str(ROOT)) and not path.endswith((".pyc", ".pyo")):
            _opened.add(path)


@contextlib.contextmanager
def ignored():
    """Files opened in this block are not dependencies."""
    before = getattr(_quiet, "on", False)
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = before


def depend(name: str):
    """Add a dependency by name: a path relative to the root, or 'data/papers.yml#key' for one row of the registry."""
    _extra.add(name)


def start():
    """First cell of a build: begin to record, and to count CPU time."""
    global _recording, _t0
    if _t0 is None:
        sys.addaudithook(_hook)
    _recording, _t0 = True, (time.process_time(), time.perf_counter())


def finish() -> dict:
    """Last cell of a build: {'deps': [...], 'cpu_s', 'frames_cpu_s', 'frames', 'child_cpu_s', 'wall_s'}."""
    global _recording
    _recording = False
    from .explorer import spent

    modules = {m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] == "lib" and getattr(m, "__file__", None)}
    deps = set(_extra)
    for path in modules | _opened:
        try:
            rel = type(ROOT)(path).resolve().relative_to(ROOT)
        except ValueError:
            continue
        if rel.parts[0] not in _SKIP and (ROOT / rel).is_file():
            deps.add(rel.as_posix())
    kids = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() - _t0[0]
    return {"deps": sorted(deps), "cpu_s": round(cpu - spent["cpu_s"], 2), "frames_cpu_s": round(spent["cpu_s"], 2), "frames": spent["frames"],
            "child_cpu_s": round(kids.ru_utime + kids.ru_stime, 2), "wall_s": round(time.perf_counter() - _t0[1], 2)}


def display_result():
    """Leave the record in the notebook's last output, where the executor picks it up."""
    from IPython.display import display

    display({MIME: finish(), "text/plain": "trace"}, raw=True)


def digest(name: str) -> str:
    """Content of one dependency; 'missing' if it is gone."""
    path, _, row = name.partition("#")
    if row:
        from . import registry

        papers = registry.load().papers
        text = repr(papers.get(row))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    file = ROOT / path
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "missing"
