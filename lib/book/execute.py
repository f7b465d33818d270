"""Execute the pages, two at a time, into a cache that knows what each page read.

`python -m lib.book.execute` runs every stale page; the Sphinx extension calls `execute` before it reads anything. A page is stale when its code cells, a `lib`
module or a file that it read in its last run, its registry row, the installed versions of the pinned packages, or BOOK_SEED changed.
"""
import concurrent.futures as futures
import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from . import trace
from .claims import MIME as CLAIMS_MIME
from .paths import BUILD, CACHE, CHAPTERS, MANIFESTS, ROOT, page_key, page_path

WORKERS = 2
TIMEOUT_S = 180               # a cell that takes this long hangs: the budget below is 20 CPU seconds for a whole page
PAGE_CPU_S, FRAMES_CPU_S = 20.0, 10.0
ENVIRONMENT = {"BOOK_MODE": "static", "BOOK_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
               "PYTHONHASHSEED": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


class PageError(RuntimeError):
    """One or more pages did not run; the message has page, cell and traceback."""


def is_notebook(path) -> bool:
    """Is this a MyST-markdown notebook (and not plain markdown)?"""
    return "format_name: myst" in Path(path).read_text(encoding="utf8")[:600]


def all_keys():
    """Keys of all executable pages, 'chapter/slug', in alphabetical order."""
    return sorted(page_key(p) for p in CHAPTERS.rglob("*.md") if ".ipynb_checkpoints" not in p.parts and is_notebook(p))


def read(path):
    """The notebook as myst-nb reads it (so that the cache's keys agree), without outputs."""
    from myst_nb.core.config import NbParserConfig
    from myst_nb.core.read import create_nb_reader
    from myst_parser.config.main import MdParserConfig

    text = Path(path).read_text(encoding="utf8")
    return create_nb_reader(str(path), MdParserConfig(), NbParserConfig(), text).read(text)


@functools.lru_cache(maxsize=1)
def versions() -> str:
    """Python and the installed versions of what requirements.txt names."""
    names = [m[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if (m := re.match(r"[A-Za-z0-9_.-]+", line))]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return json.dumps([platform.python_version(), found])


def fingerprint(notebook, deps) -> str:
    """Digest of all that an execution depends on."""
    parts = [versions(), os.environ.get("BOOK_SEED", "0"), *(c.source for c in notebook.cells if c.cell_type == "code"),
             *(f"{d}={trace.digest(d)}" for d in deps)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def manifest(key) -> dict | None:
    """What the last successful execution of a page left behind, or None."""
    file = MANIFESTS / f"{key}.json"
    return json.loads(file.read_text()) if file.exists() else None


def manifests() -> dict:
    return {key: m for key in all_keys() if (m := manifest(key))}


def _cache():
    """The store of executed notebooks; one that a killed process left half made is thrown away."""
    from jupyter_cache import get_cache

    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        cache = get_cache(CACHE)
        cache.list_cache_records()
    except RuntimeError:
        shutil.rmtree(CACHE)
        CACHE.mkdir()
        cache = get_cache(CACHE)
    return cache


@contextlib.contextmanager
def _alone():
    """One build at a time: a second one waits for the first."""
    try:
        import fcntl
    except ImportError:               # not on Windows, where nobody guards against a second build
        yield
        return
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fresh(key, notebook, cache) -> bool:
    last = manifest(key)
    if not last or last["fingerprint"] != fingerprint(notebook, last["deps"]):
        return False
    try:
        cache.match_cache_notebook(notebook)
    except KeyError:
        return False
    return True


def _prepare_worker():
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _run(key, notebook):
    """In a worker process: execute one page with the recorder around it. Returns (notebook, trace) or (error text, None)."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    nb = copy.deepcopy(notebook)
    first = nbformat.v4.new_code_cell("from lib.book import trace as _trace; _trace.start()")
    last = nbformat.v4.new_code_cell("_trace.display_result()")
    nb.cells = [first, *nb.cells, last]
    client = NotebookClient(nb, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(page_path(key).parent)}},
                            record_timing=False)       # timing goes into the cells' metadata, and those are part of the cache's key
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        number = sum(c.cell_type == "code" and c.get("execution_count") is not None for c in nb.cells) - 1
        return f"chapters/{key}.md, code cell {number}:\n" + re.sub(r"\x1b\[[0-9;]*m", "", str(error)), None
    record = next(o.data[trace.MIME] for o in last.outputs if trace.MIME in o.get("data", {}))
    nb.cells = nb.cells[1:-1]
    for count, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    return nb, record


def _claims(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if CLAIMS_MIME in output.get("data", {}):
                return output["data"][CLAIMS_MIME]["claims"]
    return []


def _save(key, notebook, record, cache):
    from jupyter_cache.base import CacheBundleIn

    bundle = CacheBundleIn(notebook, str(page_path(key)), data={"execution_seconds": record["wall_s"]})
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    file = MANIFESTS / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {"fingerprint": fingerprint(notebook, record["deps"]), **record, "claims": _claims(notebook)}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(file)            # a page counts as executed only once this is there: a killed build goes on from here


def over_budget(key, record) -> str | None:
    """What a page spent too much of, or None. BOOK_TIME_FACTOR widens the budget on slow machines."""
    factor = float(os.environ.get("BOOK_TIME_FACTOR", "1"))
    for what, spent, limit in (("page", record["cpu_s"], PAGE_CPU_S), ("explorer frames", record["frames_cpu_s"], FRAMES_CPU_S)):
        if spent > limit * factor:
            return f"chapters/{key}.md: the {what} took {spent:.1f} CPU s, the budget is {limit * factor:.0f} s (BOOK_TIME_FACTOR={factor:g})"
    return None


def execute(keys=None, workers=WORKERS, log=print) -> list:
    """Run the stale ones among `keys` (all pages by default); returns the keys that ran. Raises PageError after all have been tried."""
    with _alone():
        return _execute(keys, workers, log)


def _execute(keys, workers, log):
    cache = _cache()
    notebooks = {key: read(page_path(key)) for key in (all_keys() if keys is None else keys)}
    stale = {key: nb for key, nb in notebooks.items() if not _fresh(key, nb, cache)}
    problems = []
    # spawned, not forked: a worker starts without the threads and state of the process that builds the book
    with futures.ProcessPoolExecutor(max(1, min(workers, len(stale))), multiprocessing.get_context("spawn"), _prepare_worker) as pool:
        jobs = {pool.submit(_run, key, nb): key for key, nb in stale.items()}
        for job in futures.as_completed(jobs):
            key = jobs[job]
            result, record = job.result()
            if record is None:
                problems.append(result)
                log(f"{key}: failed")
                continue
            _save(key, result, record, cache)
            log(f"{key}: {record['cpu_s']:.1f} CPU s, {record['frames']} frames in {record['frames_cpu_s']:.1f} CPU s")
    for key in notebooks:
        if (record := manifest(key)) and (text := over_budget(key, record)):
            problems.append(text)
    if problems:
        raise PageError("\n\n".join(problems))
    return list(stale)


def export(outdir, keys=None):
    """Write the executed pages as .ipynb: figures and explorers' first frames as PNG, so that any notebook viewer shows them."""
    import nbformat

    cache = _cache()
    for key in all_keys() if keys is None else keys:
        notebook = read(page_path(key))
        try:
            _, notebook = cache.merge_match_into_notebook(notebook)
        except KeyError:
            continue
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                if "data" in output:
                    output["data"] = _portable(output["data"])
        target = Path(outdir, f"{key}.ipynb")
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)


_IMG = re.compile(r'<img class="[^"]*" src="data:image/webp;base64,([^"]+)"')


def _portable(data):
    """One output without the book's own HTML and types."""
    import base64
    import io

    from PIL import Image

    data = {k: v for k, v in data.items() if not k.startswith("application/vnd.book")}
    html = data.get("text/html", "")
    if found := _IMG.search(html if isinstance(html, str) else "".join(html)):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(found[1]))).save(buffer, "PNG", optimize=True)
        return {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": data.get("text/plain", "")}
    return data


def main():
    BUILD.mkdir(exist_ok=True)
    try:
        ran = execute(sys.argv[1:] or None)
    except PageError as error:
        sys.exit(f"\n{error}")
    print(f"{len(ran)} page(s) executed, the rest is up to date")


if __name__ == "__main__":
    main()
