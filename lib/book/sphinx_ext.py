"""The book's side of Sphinx: execute ahead, frames into files, and the pages that are made from the registry and from the verdicts."""
import base64
import hashlib
import html
import json
import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from . import bench, execute, registry, views
from .paths import BUILD, CACHE, ROOT, page_path

STATIC = Path(__file__).parent / "static"
BIB = BUILD / "papers.bib"
URI = re.compile(r"data:image/webp;base64,([A-Za-z0-9+/=]+)")


# --- execution

def _keys(app):
    """Pages that this build contains."""
    docs = app.project.discover(app.config.exclude_patterns, app.config.include_patterns)
    return [d.removeprefix("chapters/") for d in docs if d.startswith("chapters/") and execute.is_notebook(page_path(d.removeprefix("chapters/")))]


def execute_ahead(app):
    app.env.mystnb_config = app.env.mystnb_config.copy(execution_cache_path=str(CACHE))
    try:
        execute.execute(sorted(_keys(app)))
    except execute.PageError as error:
        raise ExtensionError(f"the book was not built\n\n{error}") from None


def _state(app, docname) -> str:
    """Digest of what a document shows beyond its own text: its execution, the registry, all verdicts."""
    key = docname.removeprefix("chapters/")
    record = execute.manifest(key) if docname.startswith("chapters/") else None
    parts = [record["fingerprint"] if record else ""]
    for kind in sorted(getattr(app.env, "book_views", {}).get(docname, ())):
        parts.append({"registry": registry.FILE.read_text, "verdicts": lambda: json.dumps(execute.manifests(), sort_keys=True),
                      "bench": lambda: json.dumps(bench.load())}[kind]())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def outdated(app, env, added, changed, removed):
    """Documents whose text did not change but whose execution, registry or verdicts did."""
    seen = getattr(env, "book_states", {})
    return [d for d in env.found_docs if d in seen and seen[d] != _state(app, d)]


def remember(app, env):
    env.book_states = {d: _state(app, d) for d in env.found_docs}
    return []


def purge(app, env, docname):
    getattr(env, "book_views", {}).pop(docname, None)


# --- pages

def finish_page(app, pagename, templatename, context, doctree):
    """Frames become files, the card learns its times, and sphinx-thebe (always on, names a CDN) goes."""
    context["script_files"] = [js for js in context["script_files"]
                               if "thebe" not in str(getattr(js, "filename", js) or "").lower() and "THEBE" not in (getattr(js, "attributes", {}).get("body") or "")]
    context["css_files"] = [c for c in context["css_files"] if "thebe" not in str(getattr(c, "filename", c))]
    body = context.get("body")
    if not body or app.builder.format != "html":
        return
    body = re.sub(r'<script type="text/x-thebe-config">.*?</script>(\s*<script>kernelName = .*?</script>)?', "", body, flags=re.S)
    folder = Path(app.outdir, "_images", "xp")

    def to_file(match):
        data = base64.b64decode(match[1])
        name = hashlib.sha256(data).hexdigest()[:16] + ".webp"
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return context["pathto"]("_images/xp/" + name, resource=True)
    body = URI.sub(to_file, body)
    key = pagename.removeprefix("chapters/")
    if "<!--card-time-->" in body and (record := execute.manifest(key)):
        notebook = context["pathto"](f"notebooks/{key}.ipynb", resource=True)
        body = body.replace("<!--card-time-->", f'{views.reading_minutes(key)} min to read, {record["cpu_s"]:.0f} s to run '
                                                f'(<a href="{notebook}" download>executed notebook</a>)')
    context["body"] = body


def export_notebooks(app, error):
    if not error and app.builder.format == "html":
        execute.export(Path(app.outdir, "notebooks"), _keys(app))


class View(SphinxDirective):
    """A part of a page that is made from the registry or from the verdicts; {bookmap}, {papers}, {pages}, {scorecard}, {times}, {bench}."""
    has_content = False
    optional_arguments = 1

    def run(self):
        make, kind = views.VIEWS[self.name]
        deps = getattr(self.env, "book_views", {})
        deps.setdefault(self.env.docname, set()).add(kind)
        self.env.book_views = deps
        here = os.path.dirname(self.env.docname)
        text = make(lambda target: os.path.relpath(target, here or ".").replace(os.sep, "/"), *self.arguments)
        return [nodes.raw("", text, format="html")]


def merge(app, env, docnames, other):
    views_ = getattr(env, "book_views", {})
    views_.update({d: v for d, v in getattr(other, "book_views", {}).items() if d in docnames})
    env.book_views = views_


def setup(app):
    os.environ.update(execute.ENVIRONMENT)
    BUILD.mkdir(exist_ok=True)
    bib = registry.bibtex()
    if not BIB.exists() or BIB.read_text(encoding="utf8") != bib:      # untouched when nothing changed: no needless re-render
        BIB.write_text(bib, encoding="utf8")
    for name in views.VIEWS:
        app.add_directive(name, View)
    app.connect("builder-inited", execute_ahead, priority=900)
    app.connect("builder-inited", lambda a: a.config.html_static_path.append(str(STATIC)))
    app.connect("env-get-outdated", outdated)
    app.connect("env-purge-doc", purge)
    app.connect("env-merge-info", merge)
    app.connect("env-updated", remember)
    app.connect("html-page-context", finish_page, priority=901)
    app.connect("build-finished", export_notebooks)
    app.set_html_assets_policy("always")      # MathJax comes with the first page and is cached: later pages stay small
    app.add_css_file("book.css")
    app.add_js_file("book.js", loading_method="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
