"""The tests are tested: each break that a test file names, applied to a copy of the book, must turn that file red, and the first one a claim of the page too."""
import ast
import os
import shutil
import subprocess
import sys

import pytest

from lib.book.paths import ROOT
from lib.book.registry import load

PAGES = [p for p in load().pages() if (ROOT / "tests" / p.chapter / f"test_{p.slug}.py").exists()]


def breaks(paper):
    """BREAKS of a test file, read without importing it; it may name constants defined above it."""
    tree = ast.parse((ROOT / "tests" / paper.chapter / f"test_{paper.slug}.py").read_text())
    plain = (ast.Constant, ast.Name, ast.Tuple, ast.List, ast.Load, ast.Store, ast.BinOp, ast.Add)
    tree.body = [n for n in tree.body if isinstance(n, ast.Assign) and all(isinstance(x, (*plain, ast.Assign)) for x in ast.walk(n))]
    names = {}
    exec(compile(tree, "BREAKS", "exec"), {"__builtins__": {}}, names)
    return names.get("BREAKS", [])


# Each break costs a run of a test file. `make test` tries the first two of each paper; BOOK_ALL_BREAKS=1 (`make breaks`, weekly) tries all of them.
MOST = None if os.environ.get("BOOK_ALL_BREAKS") == "1" else 2
CASES = [pytest.param(p, i, b, id=f"{p.key}: {b[0]}") for p in PAGES for i, b in enumerate(breaks(p)[:MOST])]


@pytest.fixture
def copy_of_the_book(tmp_path):
    """A copy in which one file can be broken; data is linked, built things stay behind."""
    for name in ("lib", "tests", "chapters"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "browser", "static"))
    for name in ("data", "pyproject.toml", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(copy, *command, seed):
    # seed 2: the build uses seed 0 and the page tests seed 1, so three seeds are seen in one `make test`
    env = os.environ | {"PYTHONPATH": str(copy), "BOOK_SEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-m", *command], cwd=copy, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("paper", PAGES, ids=[p.key for p in PAGES])
def test_a_test_file_names_its_breaks(paper):
    assert breaks(paper), "name at least one break that the tests must catch"


@pytest.mark.slow
@pytest.mark.parametrize("paper, number, broken", CASES)
def test_break_is_caught(paper, number, broken, copy_of_the_book):
    what, file, old, new = broken
    path = copy_of_the_book / file
    text = path.read_text()
    assert text.count(old) == 1, f"{what}: {old!r} occurs {text.count(old)} times in {file}"
    path.write_text(text.replace(old, new))
    tests = run(copy_of_the_book, "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{paper.chapter}/test_{paper.slug}.py", seed="2")
    assert tests.returncode == 1, f"{what}: the tests stayed green, or did not run\n{tests.stdout[-2000:]}{tests.stderr[-1000:]}"
    if number == 0:
        page = run(copy_of_the_book, "lib.book.run", f"chapters/{paper.key}.md", seed="2")
        assert page.returncode != 0 and "ClaimError" in page.stdout, f"{what}: no claim of the page failed\n{page.stdout[-2000:]}"
