"""pytest plugin: nbval on the MyST sources. `pytest -p lib.book.nbval_myst --nbval-lax chapters`

Each page is executed afresh, as a reader's Jupyter does (live widgets), never from the book's cache. The cell tagged `nbval-check-output` is compared by its
verdict lines with tests/expected/<chapter>/<slug>.txt; measured numbers may differ between machines, verdicts may not. BOOK_UPDATE_EXPECTED=1 writes those files.
"""
import os
import re

import jupytext
import nbformat
from nbval import plugin as nbval

from .execute import ENVIRONMENT
from .paths import CHAPTERS, ROOT

EXPECTED = ROOT / "tests" / "expected"
VERDICT = re.compile(r"^(PASS|FAIL|NOT TESTED)\s+(\S+)\s*$", re.M)


def pytest_configure(config):
    os.environ.update(ENVIRONMENT | {"BOOK_MODE": "live"})
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def verdicts(outputs) -> list[str]:
    """The verdict lines in a cell's outputs: ['PASS bound', ...]."""
    texts = []
    for output in outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        texts.append("".join(text))
    return [f"{verdict} {id}" for verdict, id in VERDICT.findall("\n".join(texts))]


def _expected_path(path):
    return EXPECTED / path.resolve().relative_to(CHAPTERS).with_suffix(".txt")


def _compare(item, outputs, _reference, skip_compare=None):
    """Stands in for nbval's comparison, which skips silently the cells of a notebook that holds no outputs - all of ours."""
    file, got = _expected_path(item.parent.path), verdicts(outputs)
    if os.environ.get("BOOK_UPDATE_EXPECTED") == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(got) + "\n")
        return True
    want = file.read_text().splitlines() if file.exists() else []
    if got and got == want:
        return True
    item.comparison_traceback = [f"verdicts differ from {file.relative_to(ROOT)} (BOOK_UPDATE_EXPECTED=1 rewrites it)",
                                 *(f"  - {line}" for line in want if line not in got), *(f"  + {line}" for line in got if line not in want)]
    return False


nbval.IPyNbCell.compare_outputs = _compare      # a subclass would be the tidy way; pytest 9 refuses nbval's non-cooperative __init__


class PageFile(nbval.IPyNbFile):
    """A MyST page, collected by nbval."""

    def collect(self):
        def read(path, as_version=4):
            notebook = jupytext.read(path)
            for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
                cell.execution_count = number          # None would mean "never run", and nbval would not compare
            return notebook
        genuine, nbformat.read = nbformat.read, read
        try:
            items = list(super().collect())
        finally:
            nbformat.read = genuine
        return items


def pytest_collect_file(file_path, parent):
    option = parent.config.option
    if (option.nbval or option.nbval_lax) and file_path.suffix == ".md" and "format_name: myst" in file_path.read_text(encoding="utf8")[:600]:
        return PageFile.from_parent(parent, path=file_path)
