"""python -m lib.book.scaffold chapter/slug: lay out page, module and test of a registered paper (`make new`).

The scaffold fails the tests until it is filled in: the module raises, the test says so, and the structure test finds every `TODO`.
"""
import sys

from . import registry
from .paths import ROOT, page_path

SECTIONS = ("The problem", "The idea", "The implementation", "The experiment", "Explore", "Claims", "Limits", "Exercises")

_FRONT = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  name: python3
  display_name: Python 3 (ipykernel)
  language: python
---
"""


def page(paper) -> str:
    body = {
        "The problem": "TODO: a small case where the obvious method fails, with a figure.",
        "The idea": f"TODO: the derivation, after {{cite:t}}`{paper.slug}`.",
        "The implementation": f"```{{literalinclude}} ../../lib/{paper.key}.py\n:language: python\n:pyobject: todo\n```\n\n"
                              f"```{{code-cell}} ipython3\n:tags: [remove-cell]\n\nfrom lib.book import source\nfrom lib.{paper.key.replace('/', '.')} import todo\nsource(todo)\n```",
        "The experiment": "TODO: the smallest honest run against the baseline, with its spread over seeds.",
        "Explore": "TODO: a question to answer before the slider moves, then `explore(...)`.",
        "Claims": f"```{{code-cell}} ipython3\n:tags: [nbval-check-output]\n\nfrom lib.book import Claims\nclaims = Claims(\"{paper.key}\")\nclaims.report()\n```",
        "Limits": "TODO: deviations, reconstructions, where the official code is.",
        "Exercises": "TODO: three or more, one of them code with a checker.",
    }
    sections = "\n\n".join(f"## {name}\n\n{body[name]}" for name in SECTIONS)
    return (f"{_FRONT}\n# TODO the idea in the reader's words: {paper.title}\n\n```{{code-cell}} ipython3\n:tags: [remove-input]\n\n"
            f"from lib.book import card\ncard(\"{paper.key}\")\n```\n\n{sections}\n")


def module(paper) -> str:
    arxiv = f", arXiv:{paper.arxiv}" if paper.arxiv else ""
    return (f'"""{paper.title} ({paper.year}{arxiv}).\n\nTODO: what is implemented; symbol -> name -> shape; deviations from the paper; cost.\n"""\n\n\n'
            f'def todo():\n    """TODO"""\n    raise NotImplementedError("{paper.key} is a scaffold")\n')


def test(paper) -> str:
    return (f'"""{paper.key}: invariants, limit cases, parity, bad input."""\nfrom lib.{paper.key.replace("/", ".")} import todo\n\nBREAKS = []\n\n\n'
            f"def test_scaffold_is_filled_in():\n    todo()\n")


def files(paper) -> dict:
    """Path -> text of what a new paper needs."""
    return {page_path(paper.key): page(paper), ROOT / "lib" / f"{paper.key}.py": module(paper),
            ROOT / "tests" / paper.chapter / f"test_{paper.slug}.py": test(paper)}


def main(argv=None):
    keys = argv or sys.argv[1:]
    if len(keys) != 1:
        sys.exit("usage: python -m lib.book.scaffold chapter/slug")
    try:
        paper = registry.lookup(keys[0])
    except KeyError as error:
        sys.exit(error.args[0])
    new = files(paper)
    there = [p for p in new if p.exists()]
    if there:
        sys.exit(f"nothing written: {', '.join(str(p.relative_to(ROOT)) for p in there)} exist already")
    (ROOT / "lib" / paper.chapter).mkdir(exist_ok=True)
    (ROOT / "lib" / paper.chapter / "__init__.py").touch()
    for path, text in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")
        print(f"wrote {path.relative_to(ROOT)}")
    print(f"next: give {paper.key} a module, symbols, scarce and status: page in data/papers.yml, and a line in _toc.yml")


if __name__ == "__main__":
    main()
