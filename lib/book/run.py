"""python -m lib.book.run PAGE.md ...: run a page's cells in this process, without a kernel, and print what it says.

For authors, and for the tests that break a module on purpose. Exit status 1 at the first cell that fails.
"""
import argparse
import os
import sys
import time


def run_page(path, show_code=False) -> bool:
    """Execute one page; True if every cell ran. Works in the page's folder, as Jupyter does."""
    import jupytext
    from IPython.core.interactiveshell import InteractiveShell

    from .explorer import spent
    from .paths import ROOT

    path = os.path.abspath(path)
    notebook = jupytext.read(path)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    os.chdir(os.path.dirname(path))
    t0 = time.process_time()
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        result = shell.run_cell(cell.source, store_history=False)
        if not result.success:
            print(f"{path}: cell {number} failed:\n{cell.source}", file=sys.stderr)
            return False
    total, frames = time.process_time() - t0, spent["cpu_s"]
    print(f"{path}: {total - frames:.1f} CPU s, and {frames:.1f} CPU s for {spent['frames']} explorer frames")
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs=1, help="path of one page")
    args = parser.parse_args(argv)
    os.environ["BOOK_MODE"] = "script"
    sys.exit(0 if run_page(args.pages[0]) else 1)


if __name__ == "__main__":
    main()
