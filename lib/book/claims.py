"""A paper's claims, each with a verdict that can come out either way."""
import html
import json
import numbers
import re

import numpy as np

PASS, FAIL, NOT_TESTED = "PASS", "FAIL", "NOT TESTED"
MIME = "application/vnd.book.claims+json"


class ClaimError(AssertionError):
    """A verdict is not the one that the page expects."""


def _text(value) -> str:
    """Numbers to four digits, dicts as 'name: value' pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_text(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)) or isinstance(value, np.ndarray) and value.ndim:
        return ", ".join(_text(v) for v in value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, numbers.Integral)):
        return f"{value:.4g}"
    return str(value)


def _math(text: str) -> str:
    r"""HTML-escape, with $...$ turned into the \(...\) that MathJax reads and `...` into code."""
    text = re.sub(r"\$([^$]+)\$", r"\\(\1\\)", html.escape(text, quote=False))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


class Claims:
    """Collects the claims of one page.

    key: the paper's address, 'optimizers/adabelief'. Ids are unique within a page.
    """

    def __init__(self, key: str):
        if not re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", key):
            raise ValueError(f"key={key!r}: expected 'chapter/slug'")
        self.key, self.rows = key, []

    def _add(self, id, says, **row):
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id):
            raise ValueError(f"id={id!r}: expected kebab-case")
        if any(r["id"] == id for r in self.rows):
            raise ValueError(f"id={id!r}: this page has a claim of that name already")
        for name, value in (("says", says), ("why", row.get("why"))):
            if value is not None and not str(value).strip():
                raise ValueError(f"{name}={value!r} of claim {id!r}: expected a sentence")
        self.rows.append({"id": id, "says": says, "measured": "", "tolerance": "", "why": "", **row})

    def _verdict(self, id, measured, holds):
        if callable(holds):
            holds = holds(measured)
        if not isinstance(holds, (bool, np.bool_)):
            raise TypeError(f"holds={holds!r} of claim {id!r}: expected True, False or a function of `measured` that returns one of them")
        return PASS if holds else FAIL

    def check(self, id, says, measured, holds, tolerance=""):
        """The claim is expected to hold. `holds`: a bool, or a function of `measured`; `tolerance`: what counts as holding, and why."""
        self._add(id, says, measured=_text(measured), verdict=self._verdict(id, measured, holds), expected=PASS, tolerance=tolerance)

    def expect_fail(self, id, says, measured, holds, why):
        """What the paper says does not hold here, and `why`. That it suddenly holds is an error too."""
        self._add(id, says, measured=_text(measured), verdict=self._verdict(id, measured, holds), expected=FAIL, why=why)

    def not_tested(self, id, says, why):
        """The claim cannot be tested here, and `why`."""
        self._add(id, says, verdict=NOT_TESTED, expected=NOT_TESTED, why=why)

    def plain(self) -> str:
        """One verdict line a claim ('PASS  id'), each followed by indented details."""
        out = []
        for r in self.rows:
            out.append(f"{r['verdict']:<10}  {r['id']}")
            for label, value in (("says", r["says"]), ("measured", r["measured"]), ("tolerance", r["tolerance"]), ("why", r["why"])):
                if value:
                    out.append(f"    {label}: {value}")
        return "\n".join(out)

    def as_html(self) -> str:
        """The table of the page; MathJax reads the formulas in it."""
        def row(r):
            small = "".join(f'<p class="claim-note">{label}: {_math(r[k])}</p>'
                            for label, k in (("Holds if", "tolerance"), ("Why", "why")) if r[k])
            slug = r["verdict"].lower().replace(" ", "-")
            return (f'<tr id="claim-{r["id"]}"><td><span class="verdict verdict-{slug}">{r["verdict"]}</span></td>'
                    f'<td><p>{_math(r["says"])}</p><p class="claim-id"><code>{r["id"]}</code></p></td>'
                    f'<td><p>{_math(r["measured"]) or "&#8211;"}</p>{small}</td></tr>')
        head = "<thead><tr><th>Verdict</th><th>The paper says</th><th>We measured</th></tr></thead>"
        return f'<table class="claims mathjax_process">{head}<tbody>{"".join(map(row, self.rows))}</tbody></table>'

    def report(self):
        """Display the table. Raises ClaimError if a verdict is not the expected one."""
        from IPython.display import display

        if not self.rows:
            raise ClaimError(f"{self.key} reports no claim")
        data = {"key": self.key, "claims": self.rows}
        display({"text/plain": self.plain(), "text/html": self.as_html(), MIME: json.loads(json.dumps(data))}, raw=True)
        wrong = [r for r in self.rows if r["verdict"] != r["expected"]]
        if wrong:
            raise ClaimError("\n".join(
                f"{self.key}: claim {r['id']!r} came out {r['verdict']}, expected {r['expected']} (measured {r['measured']})" for r in wrong))
