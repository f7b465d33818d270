"""python -m lib.book.run [PAGE.md ...] [--seeds "0 1 2"]: run pages without a kernel, and print what they say.

For authors, for `make seeds`, and for the tests that break a module on purpose. Exit status 1 if a cell fails or a verdict is not the expected one.
"""
import argparse
import concurrent.futures as futures
import os
import subprocess
import sys
import time


def run_here(path) -> bool:
    """Execute one page in this process, in the page's folder as Jupyter does. True if every cell ran."""
    import jupytext
    from IPython.core.interactiveshell import InteractiveShell

    from . import offline
    from .explorer import spent

    offline.block_network()
    notebook = jupytext.read(path)
    shell = InteractiveShell.instance()
    shell.colors = "nocolor"
    os.chdir(os.path.dirname(os.path.abspath(path)))
    t0 = time.process_time()
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        if not shell.run_cell(cell.source, store_history=False).success:
            print(f"{path}: code cell {number} failed:\n{cell.source}")
            return False
    total, frames = time.process_time() - t0, spent["cpu_s"]
    print(f"{path}: {total - frames:.1f} CPU s, and {frames:.1f} CPU s for {spent['frames']} explorer frames")
    return True


def run_apart(path, seed) -> subprocess.CompletedProcess:
    """One page in a process of its own."""
    env = os.environ | {"BOOK_SEED": str(seed), "BOOK_MODE": "script", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "lib.book.run", "--here", str(path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="paths of pages; all of them by default")
    parser.add_argument("--seeds", default=os.environ.get("BOOK_SEED", "0"), help='such as "0 1 2"')
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        sys.exit(0 if run_here(args.pages[0]) else 1)
    from .execute import all_keys
    from .paths import page_path

    jobs = [(p, s) for p in args.pages or [page_path(k) for k in all_keys()] for s in args.seeds.split()]
    failed = []
    with futures.ThreadPoolExecutor(2) as pool:
        for (page, seed), done in zip(jobs, pool.map(lambda job: run_apart(*job), jobs)):
            print(f"--- {page}, BOOK_SEED={seed}\n{done.stdout}")
            if done.returncode:
                failed.append(f"{page} with BOOK_SEED={seed}")
    sys.exit("failed: " + ", ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
