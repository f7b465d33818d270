"""Every built page, as a reader meets it: offline, on a phone, in the dark, by keyboard, with a screen reader, without JavaScript."""
import gzip
import pathlib
import re
import urllib.parse

import pytest

from lib.book.paths import BUILD
from lib.book.registry import load

HTML = BUILD / "html"


def built_pages():
    """All pages of the built book; the root index.html only redirects."""
    return sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob("*.html") if "_static" not in p.parts and p != HTML / "index.html")


PAGES = built_pages()
PAPERS = [f"chapters/{p.key}.html" for p in load().pages()]
FIRST_PAGE, FURTHER_PAGE = 1_500_000, 300_000      # bytes, gzipped


def test_all_registered_pages_are_built():
    assert set(PAPERS) <= set(PAGES), "run `make book`"


@pytest.mark.parametrize("path", PAGES)
def test_page_is_whole_and_quiet(path, site, visit):
    """No request leaves, nothing fails, nothing is said on the console; formulas are set; a phone does not scroll sideways."""
    tab = visit()
    page = tab.open(site + path)
    assert tab.problems == []
    assert page.locator("h1").count() >= 1
    formulas = page.locator(".math").count()
    assert page.locator("mjx-container").count() >= formulas
    assert page.locator("mjx-merror").count() == 0
    assert not re.search(r"\\\(|\\\[", page.locator("main").first.inner_text()), "a formula was left as source"
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(150)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "scrolls sideways at 390 px"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_page_is_accessible(path, scheme, site, visit):
    """axe-core finds no serious or critical violation."""
    from axe_playwright_python.sync_playwright import Axe

    page = visit(color_scheme=scheme).open(site + path)
    # a closed solution is not rendered, and what is not rendered is not checked; half faded in, its contrast would be that of the moment
    page.add_style_tag(content="*, *::before, *::after { transition: none !important; animation: none !important; }")
    page.evaluate("document.querySelectorAll('.admonition.toggle-hidden .toggle-button, details.toggle-details:not([open]) > summary').forEach((b) => b.click())")
    page.wait_for_timeout(300)
    found = Axe().run(page).response["violations"]
    bad = [(v["id"], v["impact"], [n["html"][:160] for n in v["nodes"][:3]]) for v in found if v["impact"] in ("serious", "critical")]
    assert bad == []


@pytest.mark.parametrize("path", PAPERS)
def test_explorer_moves_by_keyboard(path, site, visit):
    tab = visit()
    page = tab.open(site + path)
    explorers = page.locator("figure.xp")
    assert explorers.count() >= 1
    for i in range(explorers.count()):
        xp = explorers.nth(i)
        image, live = xp.locator("img.xp-img"), xp.locator(".xp-live")
        for slider in xp.locator("input[type=range]").all():
            assert slider.evaluate("e => e.labels.length === 1 && e.labels[0].innerText.trim().length > 0")
            before, said = image.get_attribute("src"), live.inner_text()
            slider.focus()
            page.keyboard.press("End" if slider.input_value() == "0" else "Home")
            page.wait_for_timeout(250)
            assert image.get_attribute("src") != before and live.inner_text() != said
            assert image.get_attribute("alt") == live.inner_text()
            assert image.evaluate("e => e.complete && e.naturalWidth > 100")
            assert slider.get_attribute("aria-valuetext")
    assert tab.problems == []


@pytest.mark.parametrize("path", PAPERS)
def test_explorer_without_javascript(path, site, visit):
    """A still picture, and a link for every other one."""
    page = visit(java_script_enabled=False).page
    page.goto(site + path)
    for xp in page.locator("figure.xp").all():
        assert xp.locator("img.xp-img").is_visible() and not xp.locator("form").is_visible()
        xp.locator("summary").click()
        links = xp.locator(".xp-all a")
        assert links.count() == int(xp.get_attribute("data-frames"))
        assert (HTML / path).parent.joinpath(links.first.get_attribute("href")).resolve().exists()


@pytest.mark.parametrize("path", PAPERS[:2])
def test_page_works_from_a_file(path, visit):
    """No server: the page is opened from the disk, its formulas are set and its explorer moves."""
    tab = visit()
    page = tab.open((HTML / path).as_uri())
    assert page.locator("mjx-container").count() > 0
    image = page.locator("figure.xp img.xp-img").first
    before = image.get_attribute("src")
    page.locator("figure.xp input[type=range]").first.focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(250)
    assert image.get_attribute("src") != before and image.evaluate("e => e.naturalWidth > 100")
    assert tab.problems == []


def test_search_finds_a_page(site, visit):
    page = visit().open(site + "search.html?q=AdaBelief")
    page.wait_for_selector("#search-results li a")
    assert any("adabelief.html" in a.get_attribute("href") for a in page.locator("#search-results li a").all())


def test_the_root_leads_to_the_landing_page(site, visit):
    page = visit().page
    page.goto(site)
    page.wait_for_url("**/chapters/index.html")
    assert page.locator("figure.book-map a").count() == 27         # 7 parts and 20 chapters


def bytes_of(urls):
    """Bytes on the wire: gzipped where a server would."""
    total = 0
    for url in urls:
        file = HTML / urllib.parse.unquote(urllib.parse.urlparse(url).path).lstrip("/")
        data = file.read_bytes()
        total += len(data) if file.suffix in (".webp", ".png", ".woff2") else len(gzip.compress(data, 6))
    return total


@pytest.mark.parametrize("path", ["chapters/index.html", *PAPERS])
def test_a_first_page_is_light(path, site, visit):
    tab = visit()
    tab.open(site + path)
    assert bytes_of(set(tab.urls)) <= FIRST_PAGE


def test_further_pages_are_light(site, visit):
    """Every page, opened one after the other from the landing page, in one visit."""
    tab = visit()
    tab.open(site + "chapters/index.html")
    seen = set(tab.urls)
    for path in PAPERS:
        tab.urls.clear()
        tab.open(site + path)
        assert bytes_of(set(tab.urls) - seen) <= FURTHER_PAGE, path
        seen |= set(tab.urls)


def test_links_inside_the_book_lead_somewhere():
    """Every local link of every page: the file is there, and so is the anchor."""
    ids = {}

    def anchors(file):
        if file not in ids:
            ids[file] = set(re.findall(r'\s(?:id|name)="([^"]+)"', file.read_text(encoding="utf8")))
        return ids[file]
    dead = []
    for path in PAGES:
        file = HTML / path
        for href in set(re.findall(r'\shref="([^"]+)"', file.read_text(encoding="utf8"))):
            url = urllib.parse.urlparse(href.replace("&amp;", "&"))
            if url.scheme or href.startswith("//") or href in ("#", ""):
                continue
            target = pathlib.Path(file.parent, urllib.parse.unquote(url.path)).resolve() if url.path else file
            if not target.exists() or (url.fragment and target.suffix == ".html" and urllib.parse.unquote(url.fragment) not in anchors(target)):
                dead.append(f"{path}: {href}")
    assert dead == []


def test_executed_notebooks_are_there_to_download():
    """Portable: no type of output that only this book knows, pictures as PNG."""
    for paper in load().pages():
        text = (HTML / "notebooks" / f"{paper.key}.ipynb").read_text()
        assert "vnd.book" not in text and "image/png" in text and "image/webp" not in text
