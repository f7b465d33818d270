"""Where things are, and in which of its three lives a page is running."""
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ROOT / "chapters"
BUILD = ROOT / "_build"
MANIFESTS = BUILD / ".pages"          # one JSON a page: what it read, how long it took, what it claims
CACHE = BUILD / ".jupyter_cache"      # executed notebooks


def mode() -> str:
    """'live': JupyterLab, with ipywidgets. 'static': the built book. 'script': `python -m lib.book.run`, no display at all."""
    value = os.environ.get("BOOK_MODE", "live")
    if value not in ("live", "static", "script"):
        raise ValueError(f"BOOK_MODE={value!r}: expected live, static or script")
    return value


def page_path(key: str) -> Path:
    """'optimizers/adan' -> .../chapters/optimizers/adan.md"""
    return CHAPTERS / f"{key}.md"


def page_key(path) -> str:
    """.../chapters/optimizers/adan.md -> 'optimizers/adan'"""
    return Path(path).resolve().relative_to(CHAPTERS).with_suffix("").as_posix()
