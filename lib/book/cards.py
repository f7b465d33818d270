"""The card under a page's title, and the source of an object for readers who use JupyterLab."""
import html
import inspect
import os

from IPython.display import Code, display

from . import registry
from .paths import mode


def _link(key: str, from_key: str) -> str:
    """A link to another page of the book, as seen from the page `from_key`; plain words stay words."""
    if "/" not in key:
        return html.escape(key)
    paper = registry.lookup(key)
    if not registry.page_exists(key):
        return html.escape(paper.title)
    suffix = ".html" if mode() == "static" else ".md"
    target = os.path.relpath(key, os.path.dirname(from_key)).replace(os.sep, "/")
    return f'<a href="{target}{suffix}">{html.escape(paper.title)}</a>'


def card(key: str):
    """Render the card of a page: what is scarce, the paper, what to know first, the time to read and to run it."""
    paper = registry.lookup(key)
    where = []
    if paper.arxiv:
        where.append(f'<a href="https://arxiv.org/abs/{paper.arxiv}">arXiv:{paper.arxiv}</a>')
    if paper.code:
        where.append(f'<a href="https://github.com/{paper.code}">official code</a>')
    cite = f"{html.escape(paper.authors)}: <cite>{html.escape(paper.title)}</cite> ({paper.year})" if paper.authors else \
        f"<cite>{html.escape(paper.title)}</cite> ({paper.year})"
    rows = [
        ("What is scarce", html.escape(paper.scarce)),
        ("The paper", ". ".join([cite, ", ".join(where)] if where else [cite])),
        ("Know first", ", ".join(_link(k, key) for k in paper.needs) or "nothing special"),
        ("Code", f"<code>{html.escape(paper.module)}</code>: " + ", ".join(f"<code>{html.escape(s)}</code>" for s in paper.symbols)),
    ]
    if mode() == "static":     # filled in by the build, which knows: lib/book/sphinx_ext.py
        rows.append(("Time", "<!--card-time-->"))
    body = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    plain = f"{paper.title} ({paper.year}), {paper.module}"
    display({"text/html": f'<dl class="page-card">{body}</dl>', "text/plain": plain}, raw=True)


def source(obj):
    """Show the source of a function, class or module. The built book shows it by `literalinclude` and hides this cell."""
    display(Code(inspect.getsource(obj), language="python"))
