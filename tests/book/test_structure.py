"""The house stands: registry, page, module, test and table of contents agree; pages have their sections; modules keep their place."""
import ast
import re

import jupytext
import pytest
import yaml

from lib.book import registry, scaffold
from lib.book.paths import CHAPTERS, ROOT

REG = registry.load()
PAGES = REG.pages()
MODULES = sorted(p for p in (ROOT / "lib").rglob("*.py") if p.parent.name in REG.chapters)
FOUNDATION = sorted((ROOT / "lib").glob("*.py"))
BUILT_FROM_VIEWS = {"papers", "scorecard", "times", "bibliography"}


def ids(things):
    return [str(getattr(t, "key", None) or t.relative_to(ROOT)) for t in things]


def text_of(paper):
    return (CHAPTERS / f"{paper.key}.md").read_text(encoding="utf8")


def code_cells(paper):
    return [c for c in jupytext.read(CHAPTERS / f"{paper.key}.md").cells if c.cell_type == "code"]


def toc_files():
    def walk(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("file", "root"):
                    yield value
                else:
                    yield from walk(value)
        elif isinstance(node, list):
            for item in node:
                yield from walk(item)
    return list(walk(yaml.safe_load((ROOT / "_toc.yml").read_text())))


# --- the registry

def test_registry_holds_the_whole_book():
    assert len(REG.papers) == 170 and len(REG.chapters) == 20 and len(REG.parts) == 7
    assert len({p.slug for p in REG.papers.values()}) == 170, "slugs are citation keys: they are unique in the whole book"


def test_registry_has_no_abstracts():
    assert max(len(line) for line in registry.FILE.read_text().splitlines()) < 400


@pytest.mark.parametrize("change, message", [
    (("year: 2021", "yeer: 2021"), "quantization_survey"),
    (("  status: page", "  status: done"), "expected one of"),
    (("- key: number_formats/lmul", "- key: number_formats/quantization_survey"), "two rows"),
    (("- key: number_formats/lmul", "- key: nowhere/lmul"), "which no part has"),
])
def test_registry_errors_name_the_row(change, message):
    text = registry.FILE.read_text()
    assert change[0] in text
    with pytest.raises(ValueError, match=message):
        registry.parse(text.replace(*change, 1))


def test_lookup_of_an_unknown_key_suggests():
    with pytest.raises(KeyError, match="adabelief"):
        registry.lookup("optimizers/adabelif")


# --- one paper, one address

@pytest.mark.parametrize("paper", PAGES, ids=ids(PAGES))
def test_page_module_and_test_are_in_place(paper):
    assert (CHAPTERS / f"{paper.key}.md").exists()
    assert (ROOT / "lib" / f"{paper.key}.py").exists()
    assert (ROOT / "tests" / paper.chapter / f"test_{paper.slug}.py").exists()
    assert paper.module == "lib." + paper.key.replace("/", ".")


@pytest.mark.parametrize("paper", PAGES, ids=ids(PAGES))
def test_registered_symbols_are_defined_in_the_module(paper):
    tree = ast.parse((ROOT / "lib" / f"{paper.key}.py").read_text())
    defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert set(paper.symbols) <= defined


def test_every_page_is_registered_and_in_the_table_of_contents():
    files = {f.relative_to(CHAPTERS).with_suffix("").as_posix() for f in CHAPTERS.rglob("*.md") if ".ipynb_checkpoints" not in f.parts}
    toc = [f.removeprefix("chapters/") for f in toc_files()]
    assert sorted(toc) == sorted(files) and len(set(toc)) == len(toc)
    for key in files:
        slug = key.split("/")[-1]
        if "/" in key and slug != "index" and slug not in COMPANIONS:
            assert REG.papers[key].status == "page", f"{key} is a page, but the registry calls it planned"


# pages of a chapter that are no paper's: its opening beside the index, and its closing comparison
COMPANIONS = {"race", "price_of_privacy", "reading_a_kernel"}


def test_no_module_without_a_page():
    """A module is a paper's or a foundation; a paper's module without page would be a paper half done."""
    for path in MODULES:
        key = f"{path.parent.name}/{path.stem}"
        if key in REG.papers:
            assert REG.papers[key].status == "page", f"lib/{key}.py exists, but its page is only planned"


@pytest.mark.parametrize("chapter", sorted({p.chapter for p in PAGES}))
def test_chapter_index_lists_the_chapter(chapter):
    assert f"```{{pages}} {chapter}" in (CHAPTERS / chapter / "index.md").read_text()


# --- the anatomy of a page

@pytest.mark.parametrize("paper", PAGES, ids=ids(PAGES))
def test_sections_are_there_and_in_order(paper):
    outside = re.sub(r"^(```|~~~|:::).*?^\1", "", text_of(paper), flags=re.S | re.M)
    assert re.findall(r"^## (.+)$", outside, re.M) == list(scaffold.SECTIONS)
    assert len(re.findall(r"^# (.+)$", outside, re.M)) == 1
    assert code_cells(paper)[0].source.endswith(f'card("{paper.key}")')


@pytest.mark.parametrize("paper", PAGES, ids=ids(PAGES))
def test_page_has_what_a_page_has(paper):
    text = text_of(paper)
    assert "TODO" not in text
    assert 150 <= text.split("---\n", 2)[2].count("\n") <= 350, "lines below the front matter"
    assert f"../../lib/{paper.chapter}/" in text and "{literalinclude}" in text
    assert re.search(r"\{prf:(definition|theorem|proposition|lemma|algorithm)\}", text)
    assert text.count("{exercise}") >= 3 and text.count("{exercise}") == text.count("{solution}")
    assert f"`{paper.slug}`" in text, "the paper is cited by its slug"
    checked = [c for c in code_cells(paper) if "nbval-check-output" in c.metadata.get("tags", [])]
    assert len(checked) == 1 and "report()" in checked[0].source


@pytest.mark.parametrize("paper", PAGES, ids=ids(PAGES))
def test_code_cells_are_short_and_figures_go_through_show(paper):
    for cell in code_cells(paper):
        assert cell.source.count("\n") + 1 <= 12, f"a cell of more than 12 lines:\n{cell.source}"
        assert "plt.show" not in cell.source and "%matplotlib" not in cell.source and "savefig" not in cell.source
        assert not re.search(r"^\s*[!%]?\s*pip install", cell.source, re.M)


@pytest.mark.parametrize("paper", PAGES, ids=ids(PAGES))
def test_first_figure_is_in_the_first_screen(paper):
    """Code before it is folded away, and there is little prose."""
    before = text_of(paper).split("## The problem")[1].split("\nshow(")[0]
    assert before.count("```{code-cell} ipython3\n") == before.count(":tags: [hide-input]"), "tag the cells up to the first figure hide-input"
    prose = re.sub(r"^```.*?(^```|\Z)", "", before, flags=re.S | re.M)
    assert len(prose.split()) <= 130, f"{len(prose.split())} words before the first figure"


@pytest.mark.parametrize("paper", PAGES, ids=ids(PAGES))
def test_page_defines_nothing_that_its_modules_have(paper):
    """The implementation is in lib, once."""
    names = set()
    for path in (ROOT / "lib" / paper.chapter).glob("*.py"):
        names |= {n.name for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for cell in code_cells(paper):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.name not in names, f"{node.name} is defined on the page and in lib/{paper.chapter}"


@pytest.mark.parametrize("paper", PAGES, ids=ids(PAGES))
def test_saving_the_page_in_jupyter_leaves_it_unchanged(paper):
    path = CHAPTERS / f"{paper.key}.md"
    config = jupytext.config.load_jupytext_configuration_file(str(ROOT / "jupytext.toml"))
    notebook = jupytext.read(path, config=config)
    assert path.read_text(encoding="utf8").startswith(scaffold._FRONT), "the front matter is what JupyterLab writes"
    # a saved notebook carries its kernel's language_info and, after a run, execution counts: neither may reach the file
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11"}
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number
    assert jupytext.writes(notebook, fmt="md:myst", config=config) == path.read_text(encoding="utf8")


def test_labels_are_unique_in_the_book():
    labels = [label for f in CHAPTERS.rglob("*.md") for label in re.findall(r"^:label: *(\S+)|^:name: *(\S+)|^\(([\w-]+)\)=$", f.read_text(), re.M)]
    flat = ["".join(label) for label in labels]
    assert len(flat) == len(set(flat)), sorted(x for x in flat if flat.count(x) > 1)


# --- the modules

def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("lib." if node.level else "") + (node.module or "")


@pytest.mark.parametrize("path", MODULES + FOUNDATION, ids=ids(MODULES + FOUNDATION))
def test_modules_stay_below_the_book(path):
    tree = ast.parse(path.read_text())
    for name in imports(tree):
        assert not name.startswith(("lib.book", "matplotlib", "ipywidgets", "IPython")), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_modules_do_not_print_read_or_touch_global_state(path):
    """No printing, no files, no global seed or default; randomness comes in as a generator."""
    tree = ast.parse(path.read_text())
    banned = {"print", "open", "input", "manual_seed", "set_default_dtype", "set_default_device", "set_num_threads", "seed", "urlopen", "seterr"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            on_generator = isinstance(node.func, ast.Attribute) and name in ("manual_seed", "seed") and "Generator" in ast.unparse(node.func.value)
            assert name not in banned or on_generator, f"{path.name}:{node.lineno} calls {ast.unparse(node.func)}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            assert node.attr in ("Generator", "default_rng", "SeedSequence", "BitGenerator"), f"{path.name}:{node.lineno} uses global numpy randomness"


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=ids([p for p in MODULES if p.stem != "__init__"]))
def test_modules_are_short_and_say_what_they_are(path):
    text = path.read_text()
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree)
    assert docstring
    key = f"{path.parent.name}/{path.stem}"
    # source lines: not blank, not comment, not docstring
    doc_lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            first = node.body[0]
            doc_lines |= set(range(first.lineno, first.end_lineno + 1))
    lines = [n for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#") and n not in doc_lines]
    assert len(lines) <= 220, f"{len(lines)} source lines"
    if key in REG.papers:
        paper = REG.papers[key]
        assert paper.title.split(":")[0] in " ".join(docstring.split()), "the docstring names the paper"
        assert not paper.arxiv or paper.arxiv in docstring
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_data_is_small_and_has_no_pickle():
    files = [p for p in (ROOT / "data").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 8 * 2**20
    assert not [p for p in files if p.suffix in (".pkl", ".pickle", ".pt", ".pth", ".joblib")]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "LICENSE-TEXT", "CITATION.cff", "CONTRIBUTING.md", "requirements.txt", "Makefile", ".ci/run"])
def test_what_a_project_has(name):
    assert (ROOT / name).stat().st_size > 100
