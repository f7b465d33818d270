"""The built book, served from localhost to a headless Chromium."""
import functools
import http.server
import os
import shutil
import threading

import pytest

from lib.book.paths import BUILD

HTML = BUILD / "html"
# without these flags Chromium calls home at every start
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def find_browser():
    names = [os.environ.get("BOOK_BROWSER"), "chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]
    return next((found for n in names if n and (found := shutil.which(n))), None)


@pytest.fixture(scope="session")
def site():
    """Base URL of the built book."""
    if not (HTML / "index.html").exists():
        pytest.fail("the book is not built: run `make book` first")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("no browser: install chromium, or name one in BOOK_BROWSER")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A tab that remembers what went wrong in it, and what it moved."""

    def __init__(self, context):
        self.page, self.problems, self.urls = context.new_page(), [], []
        self.page.on("request", self._request)
        self.page.on("requestfailed", lambda r: self.problems.append(f"failed: {r.url}"))
        self.page.on("response", lambda r: r.status >= 400 and self.problems.append(f"{r.status}: {r.url}"))
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.problems.append(f"console {m.type}: {m.text[:300]}"))
        self.page.on("pageerror", lambda e: self.problems.append(f"script error: {e}"))

    def _request(self, request):
        if request.url.startswith(("data:", "blob:")):
            return
        self.urls.append(request.url)
        if not request.url.startswith(("http://127.0.0.1:", "file:")):
            self.problems.append(f"left this machine: {request.url}")

    def open(self, url):
        self.page.goto(url, wait_until="networkidle")
        # formulas are set after loading; MathJax says when it is done
        self.page.evaluate("() => window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true")
        return self.page


@pytest.fixture
def visit(browser):
    """visit(width=1300, height=1000, color_scheme='light', ...) -> Visit"""
    contexts = []

    def make(width=1300, height=1000, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        return Visit(context)
    yield make
    for context in contexts:
        context.close()
