"""explore and show: frames, errors that name the point, alt text that is required."""
import json
import re

import matplotlib.pyplot as plt
import pytest

from lib.book import explore, show
from lib.book.explorer import ExploreError


def draw(bits, clip=1.0):
    fig, ax = plt.subplots()
    ax.plot([0, bits], [0, clip])
    return fig


def describe(bits, clip=1.0):
    return f"{bits} bits, clip {clip}"


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, in the life of a page that the test asks for."""
    got = []
    for module in ("explorer", "figures"):
        monkeypatch.setattr(f"lib.book.{module}.display", lambda *a, **k: got.append(a[0]))
    return got


def test_static_frames(monkeypatch, shown):
    monkeypatch.setenv("BOOK_MODE", "static")
    explore(draw, describe=describe, start={"bits": 3, "clip": 0.5}, bits=[2, 3, 4], clip=[0.5, 1.0])
    text = shown[0]["text/html"]
    spec = json.loads(re.search(r'class="xp-spec">(.*?)</script>', text)[1])
    assert spec["values"] == [["2", "3", "4"], ["0.5", "1"]]
    assert spec["texts"][2] == "3 bits, clip 0.5"          # the last parameter varies fastest
    assert len(re.findall(r"<li><a", text)) == 6
    first = re.search(r'<img[^>]*src="([^"]+)" alt="([^"]+)"', text)
    links = re.findall(r'<li><a href="([^"]+)">', text)
    assert first[1] == links[2] and first[2] == "3 bits, clip 0.5"
    assert text.count('type="range"') == 2 and 'aria-live="polite"' in text
    assert not plt.get_fignums(), "no figure stays open"


def test_frames_are_small(monkeypatch, shown):
    monkeypatch.setenv("BOOK_MODE", "static")
    explore(draw, describe=describe, bits=[1, 2, 3, 4])
    assert len(shown[0]["text/html"]) / 5 < 14_000, "base64 of about 5 kB a frame, plus the start frame"


def test_live_widget_moves(monkeypatch, shown):
    monkeypatch.setenv("BOOK_MODE", "live")
    explore(draw, describe=describe, bits=[2, 3, 4])
    box = shown[-1]
    slider = box.children[0]
    assert slider.value == 3
    before = len(shown)
    slider.value = 4
    drawn = [d for d in shown[before:] if isinstance(d, dict)]
    assert any("4 bits" in d.get("text/plain", "") for d in drawn)


@pytest.mark.parametrize("mode", ["static", "script"])
def test_a_draw_that_raises_names_the_point(monkeypatch, shown, mode):
    monkeypatch.setenv("BOOK_MODE", mode)

    def broken(bits):
        if bits == 4:
            raise ZeroDivisionError("four")
        return draw(bits)
    with pytest.raises(ExploreError, match=r"\{'bits': 4\}: ZeroDivisionError: four"):
        explore(broken, describe=describe, bits=[2, 3, 4])
    assert not plt.get_fignums()


@pytest.mark.parametrize("kwargs, message", [
    (dict(), "at least one parameter"),
    (dict(bits=[]), "at least one value"),
    (dict(bits=range(201)), "at most 200"),
    (dict(bits=[1, 2], start={"bits": 3}), "expected one of"),
    (dict(bits=[1, 2], start={"bit": 1}), "does not have"),
    (dict(bits=[1, 2], labels={"bit": "Bits"}), "does not have"),
])
def test_bad_grids(monkeypatch, shown, kwargs, message):
    monkeypatch.setenv("BOOK_MODE", "static")
    with pytest.raises(ValueError, match=message):
        explore(draw, describe=describe, **kwargs)
    assert shown == []


def test_not_a_figure_and_no_text(monkeypatch, shown):
    monkeypatch.setenv("BOOK_MODE", "static")
    with pytest.raises(ExploreError, match="expected a matplotlib Figure"):
        explore(lambda bits: None, describe=describe, bits=[1])
    with pytest.raises(ExploreError, match="expected a sentence"):
        explore(draw, describe=lambda bits: "", bits=[1])
    plt.close("all")


@pytest.mark.parametrize("alt", [None, "", "a figure", 3])
def test_alt_text_is_required(alt):
    fig = draw(1)
    with pytest.raises(ValueError, match="alt"):
        show(fig, alt=alt)
    plt.close(fig)


@pytest.mark.parametrize("mode, mime", [("static", "text/html"), ("live", "image/png")])
def test_show_carries_the_alt_text(monkeypatch, shown, mode, mime):
    monkeypatch.setenv("BOOK_MODE", mode)
    show(draw(1), alt='one line "rising" to 1 & more')
    assert mime in shown[0]
    if mode == "static":
        assert 'alt="one line &quot;rising&quot; to 1 &amp; more"' in shown[0][mime]
    assert not plt.get_fignums()
