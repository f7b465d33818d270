"""The cache knows what a page read: only what changed runs again, failures name page and cell, a killed build goes on."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from lib.book.execute import over_budget
from lib.book.nbval_myst import verdicts
from lib.book.paths import ROOT

FRONT = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  name: python3
  display_name: Python 3 (ipykernel)
  language: python
---

# A page

"""


def cell(code):
    return f"```{{code-cell}} ipython3\n{code}\n```\n\n"


@pytest.fixture
def book(tmp_path):
    """A book of two pages that import different modules; a third file is read by one of them."""
    shutil.copytree(ROOT / "lib" / "book", tmp_path / "lib" / "book")
    shutil.copy(ROOT / "lib" / "__init__.py", tmp_path / "lib")
    for name in ("requirements.txt", "_toc.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "papers.yml", tmp_path / "data" / "papers.yml")
    (tmp_path / "data" / "numbers.txt").write_text("1 2 3")
    (tmp_path / "lib" / "one.py").write_text("VALUE = 1\n")
    (tmp_path / "lib" / "two.py").write_text("VALUE = 2\n")
    chapter = tmp_path / "chapters" / "c"
    chapter.mkdir(parents=True)
    (chapter / "a.md").write_text(FRONT + cell("from lib.one import VALUE\nprint(VALUE, open('../../data/numbers.txt').read())"))
    (chapter / "b.md").write_text(FRONT + cell("from lib.two import VALUE\nprint(VALUE)"))
    return tmp_path


def build(book, **env):
    return subprocess.run([sys.executable, "-m", "lib.book.execute"], cwd=book, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(book)} | env)


def ran(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return {line.split(":")[0] for line in result.stdout.splitlines() if "CPU s" in line}


@pytest.mark.slow
def test_only_what_changed_runs_again(book):
    assert ran(build(book)) == {"c/a", "c/b"}
    assert ran(build(book)) == set()
    (book / "lib" / "one.py").write_text("VALUE = 10\n")
    assert ran(build(book)) == {"c/a"}, "only the page that imports the module"
    (book / "data" / "numbers.txt").write_text("4")
    assert ran(build(book)) == {"c/a"}, "only the page that opened the file"
    (book / "chapters" / "c" / "b.md").write_text((book / "chapters" / "c" / "b.md").read_text().replace("# A page", "# New prose"))
    assert ran(build(book)) == set(), "prose is not code"
    assert ran(build(book, BOOK_SEED="1")) == {"c/a", "c/b"}
    manifest = json.loads((book / "_build" / ".pages" / "c" / "a.json").read_text())
    assert {"lib/one.py", "data/numbers.txt"} <= set(manifest["deps"]) and "lib/two.py" not in manifest["deps"]


@pytest.mark.slow
def test_a_failing_cell_stops_the_build_and_the_others_are_kept(book):
    page = book / "chapters" / "c" / "a.md"
    good = page.read_text()
    page.write_text(good + cell("x = 1") + cell("1 / 0"))
    failed = build(book)
    assert failed.returncode != 0
    assert "chapters/c/a.md, code cell 3" in failed.stderr and "ZeroDivisionError" in failed.stderr
    page.write_text(good)
    assert ran(build(book)) == {"c/a"}, "page b was executed by the build that failed, and is not executed again"


@pytest.mark.slow
def test_a_page_cannot_reach_the_network(book):
    (book / "chapters" / "c" / "a.md").write_text(FRONT + cell("import lib.book, urllib.request\nurllib.request.urlopen('http://192.0.2.1')"))
    failed = build(book)
    assert failed.returncode != 0 and "NetworkBlocked" in failed.stderr


def test_the_budget():
    fine = {"cpu_s": 19.0, "frames_cpu_s": 9.0}
    assert over_budget("c/a", fine) is None
    assert "the page took 21.0 CPU s" in over_budget("c/a", fine | {"cpu_s": 21.0})
    assert "explorer frames took 11.0" in over_budget("c/a", fine | {"frames_cpu_s": 11.0})


def test_verdict_lines_are_read_from_any_output():
    outputs = [{"output_type": "stream", "text": "PASS        a-b\n    says: PASS is good\nnoise\n"},
               {"output_type": "display_data", "data": {"text/plain": "NOT TESTED  c\n    why: big\nFAIL        d"}}]
    assert verdicts(outputs) == ["PASS a-b", "NOT TESTED c", "FAIL d"]
