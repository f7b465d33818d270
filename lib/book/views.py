"""What the book says about itself: the map, the list of papers, the scorecard, the execution times. Each returns HTML.

`to(docname)` turns a target such as 'chapters/optimizers/index.html' into a link from the page that shows the view.
"""
import html
import re
from collections import Counter

from . import bench as _bench
from . import execute, registry
from .claims import FAIL, NOT_TESTED, PASS, _math
from .paths import page_path

GLOSS = {
    "Bits": "fewer of them in each number", "Parameters": "a model you cannot afford to hold or to change", "Steps": "every gradient costs",
    "Messages": "machines that can hardly talk", "Decisions": "now, once, and not to be taken back", "Trust": "data that people may not show, and answers they can rely on",
    "Samples": "few, costly, or drawn from something unknown",
}


def reading_minutes(key) -> int:
    """At 200 words a minute; a line of code counts as eight words."""
    text = page_path(key).read_text(encoding="utf8").split("---", 2)[-1]
    code = re.findall(r"^```\{(?:code-cell|code-block)\}.*?^```", text, re.S | re.M)
    prose = re.sub(r"^```\{(?:code-cell|code-block)\}.*?^```", "", text, flags=re.S | re.M)
    return max(1, round((len(prose.split()) + 8 * sum(c.count("\n") for c in code)) / 200))


def _title(key) -> str:
    """The first heading of a page."""
    return re.search(r"^# (.+)$", page_path(key).read_text(encoding="utf8"), re.M)[1]


def _has_index(slug):
    return registry.page_exists(f"{slug}/index")


def bookmap(to) -> str:
    """The book as a picture: a row a chapter, a dot a paper (filled: finished), parts and chapters are links."""
    reg = registry.load()
    y, rows = 8, []
    for part, chapters in reg.parts.items():
        y += 26
        rows.append(f'<a href="{to("chapters/papers.html")}#part-{part.lower()}"><text class="map-part" x="8" y="{y}">{part}'
                    f'<tspan class="map-gloss" dx="8">{html.escape(GLOSS[part])}</tspan></text></a>')
        for slug in chapters:
            y += 24
            papers = sorted(reg.of_chapter(slug), key=lambda p: p.status != "page")
            done = sum(p.status == "page" for p in papers)
            target = to(f"chapters/{slug}/index.html") if _has_index(slug) else f'{to("chapters/papers.html")}#chapter-{slug}'
            dots = "".join(f'<circle class="map-{p.status}" cx="{236 + 13 * i}" cy="{y - 4}" r="4.5"><title>{html.escape(p.title)}</title></circle>'
                           for i, p in enumerate(papers))
            label = f"{reg.chapters[slug].title}: {done} of {len(papers)} pages finished"
            rows.append(f'<a href="{target}" aria-label="{html.escape(label)}"><rect class="map-row" x="4" y="{y - 16}" width="422" height="23" rx="4"/>'
                        f'<text class="map-chapter" x="18" y="{y}">{html.escape(reg.chapters[slug].title)}</text>{dots}</a>')
    return (f'<figure class="book-map"><svg viewBox="0 0 430 {y + 14}" role="group" aria-label="Map of the book: parts, chapters and papers">{"".join(rows)}</svg>'
            f'<figcaption>A row a chapter, a dot a paper; filled dots are finished pages.</figcaption></figure>')


def _paper_row(paper, to):
    title = html.escape(paper.title)
    if paper.status == "page" and registry.page_exists(paper.key):
        title = f'<a href="{to(f"chapters/{paper.key}.html")}">{html.escape(_title(paper.key))}</a><br><small>{title}</small>'
    arxiv = f'<a href="https://arxiv.org/abs/{paper.arxiv}">{paper.arxiv}</a>' if paper.arxiv else ""
    return f'<tr class="paper-{paper.status}"><td>{title}</td><td>{paper.year}</td><td>{arxiv}</td><td>{paper.status}</td></tr>'


_HEAD = "<thead><tr><th>Paper</th><th>Year</th><th>arXiv</th><th>Status</th></tr></thead>"


def pages(to, slug) -> str:
    """The papers of one chapter, finished pages first."""
    rows = sorted(registry.load().of_chapter(slug), key=lambda p: p.status != "page")
    return f'<div class="table-scroll"><table class="papers">{_HEAD}<tbody>{"".join(_paper_row(p, to) for p in rows)}</tbody></table></div>'


def papers(to) -> str:
    """All papers by part and chapter."""
    reg, out = registry.load(), []
    for part, chapters in reg.parts.items():
        out.append(f'<section id="part-{part.lower()}"><h2>{part}</h2>')
        for slug in chapters:
            title = html.escape(reg.chapters[slug].title)
            link = f'<a href="{to(f"chapters/{slug}/index.html")}">{title}</a>' if _has_index(slug) else title
            out.append(f'<h3 id="chapter-{slug}">{link}</h3>{pages(to, slug)}')
        out.append("</section>")
    return "".join(out)


def scorecard(to) -> str:
    """Every claim of every finished page with its verdict, and the sums."""
    records = execute.manifests()
    total = Counter(c["verdict"] for r in records.values() for c in r["claims"])
    cells = "".join(f'<div><span class="verdict verdict-{v.lower().replace(" ", "-")}">{v}</span> {total[v]}</div>' for v in (PASS, FAIL, NOT_TESTED))
    out = [f'<div class="score-total">{cells}<div>{len(records)} pages, {sum(total.values())} claims</div></div>']
    for key, record in records.items():
        if not record["claims"]:
            continue
        url = to(f"chapters/{key}.html")
        rows = "".join(f'<tr><td><span class="verdict verdict-{c["verdict"].lower().replace(" ", "-")}">{c["verdict"]}</span></td>'
                       f'<td><a href="{url}#claim-{c["id"]}">{c["id"]}</a></td><td>{_math(c["says"])}'
                       + (f'<p class="claim-note">Why: {_math(c["why"])}</p>' if c["why"] else "") + "</td></tr>" for c in record["claims"])
        out.append(f'<h2 id="{key.replace("/", "-")}"><a href="{url}">{html.escape(_title(key))}</a></h2><table class="claims mathjax_process">'
                   f'<thead><tr><th>Verdict</th><th>Claim</th><th>The paper says</th></tr></thead><tbody>{rows}</tbody></table>')
    return "".join(out)


def times(to) -> str:
    """CPU seconds of each page in this build."""
    rows = "".join(
        f'<tr><td><a href="{to(f"chapters/{k}.html")}">{html.escape(_title(k))}</a></td><td>{r["cpu_s"]:.1f}</td><td>{r["child_cpu_s"]:.1f}</td>'
        f'<td>{r["frames"]}</td><td>{r["frames_cpu_s"]:.1f}</td><td>{r["wall_s"]:.1f}</td></tr>' for k, r in execute.manifests().items())
    head = ("<thead><tr><th>Page</th><th>CPU s</th><th>CPU s of compilers</th><th>Explorer frames</th><th>CPU s for frames</th><th>Wall s</th></tr></thead>")
    return f'<div class="table-scroll"><table class="times">{head}<tbody>{rows}</tbody></table></div>'


def bench(to, chapter=None) -> str:
    """The committed benchmark table (of one chapter), with the machine it was measured on."""
    out = []
    for name, record in _bench.load().items():
        if chapter in (None, name):
            rows = "".join(f"<tr><td>{html.escape(what)}</td><td>{number:.4g} {html.escape(unit)}</td><td>{html.escape(note)}</td></tr>" for what, number, unit, note in record["rows"])
            where = ", ".join(f"{k} {v}" for k, v in record["machine"].items())
            out.append(f'<div class="table-scroll"><table class="times"><thead><tr><th>{html.escape(registry.load().chapters[name].title)}</th><th>Measured</th><th>Note</th></tr></thead>'
                       f"<tbody>{rows}</tbody></table></div><p><small>Measured on: {html.escape(where)}.</small></p>")
    return "".join(out) or "<p>Nothing has been measured yet: run <code>make bench</code>.</p>"


VIEWS = {"bookmap": (bookmap, "registry"), "papers": (papers, "registry"), "pages": (pages, "registry"), "scorecard": (scorecard, "verdicts"), "times": (times, "verdicts"),
         "bench": (bench, "bench")}
