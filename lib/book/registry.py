"""The registry `data/papers.yml`: parts, chapters, and one row a paper."""
import functools
from dataclasses import dataclass, field

import yaml

from .paths import CHAPTERS, ROOT

FILE = ROOT / "data" / "papers.yml"
STATUS = ("page", "planned")


@dataclass(frozen=True)
class Chapter:
    slug: str
    title: str
    part: str


@dataclass(frozen=True)
class Paper:
    key: str                      # 'chapter/slug'
    title: str
    year: int
    authors: str = ""
    arxiv: str = ""               # '2010.07468', or empty where not known
    code: str = ""                # 'owner/name' of the official code on GitHub
    module: str = ""              # 'lib.optimizers.adabelief'
    symbols: tuple = ()           # public names of the module
    status: str = "planned"
    scarce: str = ""              # pages only: what is scarce
    needs: tuple = ()             # pages only: what to know first; keys of pages, or plain words

    @property
    def chapter(self) -> str:
        return self.key.split("/")[0]

    @property
    def slug(self) -> str:
        return self.key.split("/")[1]


@dataclass(frozen=True)
class Registry:
    parts: dict                   # part -> list of chapter slugs, in the book's order
    chapters: dict                # slug -> Chapter
    papers: dict = field(repr=False)     # key -> Paper

    def of_chapter(self, slug):
        return [p for p in self.papers.values() if p.chapter == slug]

    def pages(self):
        return [p for p in self.papers.values() if p.status == "page"]


def parse(text: str) -> Registry:
    """Read a registry. Raises ValueError naming the row and what is wrong with it."""
    raw = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    parts, chapters = {}, {}
    for part in raw["parts"]:
        parts[part["name"]] = list(part["chapters"])
        for slug, title in part["chapters"].items():
            chapters[slug] = Chapter(slug, title, part["name"])
    papers = {}
    for row in raw["papers"]:
        key = row.get("key", "?")
        try:
            paper = Paper(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        except TypeError as error:
            raise ValueError(f"papers.yml: row {key!r}: {error}") from None
        if key in papers:
            raise ValueError(f"papers.yml: two rows have the key {key!r}")
        if paper.chapter not in chapters:
            raise ValueError(f"papers.yml: row {key!r} names the chapter {paper.chapter!r}, which no part has")
        if paper.status not in STATUS:
            raise ValueError(f"papers.yml: row {key!r} has status {paper.status!r}: expected one of {STATUS}")
        if paper.status == "page" and not (paper.module and paper.symbols and paper.scarce):
            raise ValueError(f"papers.yml: row {key!r} is a page: it needs module, symbols and scarce")
        papers[key] = paper
    return Registry(parts, chapters, papers)


@functools.lru_cache(maxsize=1)
def _load(stamp) -> Registry:
    from . import trace

    with trace.ignored():          # a page depends on its own row, not on the whole file: see `lookup`
        return parse(FILE.read_text(encoding="utf8"))


def load() -> Registry:
    """The registry, read once and again when the file changes."""
    return _load(FILE.stat().st_mtime_ns)


def lookup(key: str) -> Paper:
    """One row; the page that asks for it is remembered to depend on that row. Raises KeyError with the nearest keys."""
    import difflib

    from . import trace

    papers = load().papers
    if key not in papers:
        raise KeyError(f"{key!r} is not in the registry; near it: {difflib.get_close_matches(key, papers, 3, 0.3)}")
    trace.depend(f"data/papers.yml#{key}")
    return papers[key]


def bibtex() -> str:
    """A BibTeX entry for every paper, with its slug as the citation key."""
    out = []
    for p in load().papers.values():
        authors = " and ".join(a.strip() for a in p.authors.split(",") if a.strip())
        fields = {"author": authors or "{The authors}", "title": "{" + p.title + "}", "year": str(p.year)}
        if p.arxiv:
            fields |= {"journal": f"arXiv:{p.arxiv}", "url": f"https://arxiv.org/abs/{p.arxiv}"}
        body = ",\n".join(f"  {k} = {{{v}}}" for k, v in fields.items())
        out.append(f"@{'article' if p.arxiv else 'misc'}{{{p.slug},\n{body}\n}}")
    return "\n\n".join(out) + "\n"


def page_exists(key: str) -> bool:
    return (CHAPTERS / f"{key}.md").exists()
