"""make new lays out page, module and test, and the result fails until it is filled in."""
import subprocess
import sys

import jupytext
import pytest

from lib.book import registry, scaffold


def planned():
    return next(p for p in registry.load().papers.values() if p.status == "planned")


def test_the_scaffold_is_whole_and_fails(tmp_path):
    paper = planned()
    texts = {path.name: text for path, text in scaffold.files(paper).items()}
    page, module, test = texts[f"{paper.slug}.md"], texts[f"{paper.slug}.py"], texts[f"test_{paper.slug}.py"]
    for section in scaffold.SECTIONS:
        assert f"\n## {section}\n" in page
    assert "TODO" in page and paper.title in page
    assert len(jupytext.reads(page, fmt="md:myst").cells) > 5
    (tmp_path / "lib" / paper.chapter).mkdir(parents=True)
    for folder in ("lib", f"lib/{paper.chapter}"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "lib" / f"{paper.key}.py").write_text(module)
    (tmp_path / "test_it.py").write_text(test)
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"], cwd=tmp_path, capture_output=True, text=True,
                            env={"PATH": "", "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1 and "is a scaffold" in result.stdout


def test_it_overwrites_nothing_and_knows_its_keys():
    done = next(p for p in registry.load().papers.values() if p.status == "page" and registry.page_exists(p.key))
    with pytest.raises(SystemExit, match="nothing written"):
        scaffold.main([done.key])
    with pytest.raises(SystemExit, match="not in the registry"):
        scaffold.main(["optimizers/nothing"])
