"""explore(draw, **grid): sliders that live in Jupyter through ipywidgets, and in the built book through frames drawn beforehand."""
import html
import itertools
import json
import time

import matplotlib.pyplot as plt
from IPython.display import display

from . import figures
from .paths import mode

MAX_FRAMES = 200
COLOURS = 32                 # lossless WebP with 32 colours: about 5 kB a frame
spent = {"frames": 0, "cpu_s": 0.0}      # this process's bill for frames, read by the executor


class ExploreError(RuntimeError):
    """A draw or a describe failed at a point of the grid; the message names the point."""


def _checked(grid, start, labels):
    if not grid:
        raise ValueError("explore(draw, **grid): expected at least one parameter, such as bits=[2, 3, 4]")
    grid = {name: list(values) for name, values in grid.items()}
    for name, values in grid.items():
        if not values:
            raise ValueError(f"{name}=[]: expected at least one value")
    frames = 1
    for values in grid.values():
        frames *= len(values)
    if frames > MAX_FRAMES:
        raise ValueError(f"the grid has {frames} points: at most {MAX_FRAMES}")
    for what, given in (("start", start or {}), ("labels", labels or {})):
        unknown = set(given) - set(grid)
        if unknown:
            raise ValueError(f"{what} names {sorted(unknown)}, which the grid does not have")
    at = {}
    for name, values in grid.items():
        value = (start or {}).get(name, values[len(values) // 2])
        if value not in values:
            raise ValueError(f"start[{name!r}]={value!r}: expected one of {values}")
        at[name] = values.index(value)
    return grid, at


def _point(draw, describe, point):
    """Figure and text at one point, or an error that says which point it was."""
    try:
        text = describe(**point)
        fig = figures.need_figure(draw(**point), "draw")
    except Exception as error:
        plt.close("all")
        raise ExploreError(f"explore failed at {point}: {type(error).__name__}: {error}") from error
    if not isinstance(text, str) or not text.strip():
        raise ExploreError(f"describe returned {text!r} at {point}: expected a sentence")
    return fig, text


def _points(grid):
    return [dict(zip(grid, combo)) for combo in itertools.product(*grid.values())]


def _shown(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _static(draw, describe, grid, at, labels) -> str:
    uris, texts, size = [], [], (1, 1)
    for point in _points(grid):
        fig, text = _point(draw, describe, point)
        data, size = figures.webp(fig, COLOURS)
        plt.close(fig)
        uris.append(figures.data_uri(data))
        texts.append(text)
    first = 0
    for name, values in grid.items():
        first = first * len(values) + at[name]

    def control(name, values):
        label, value = html.escape(labels.get(name, name)), html.escape(_shown(values[at[name]]))
        return (f'<label class="xp-row"><span class="xp-name">{label}</span>'
                f'<input type="range" min="0" max="{len(values) - 1}" step="1" value="{at[name]}" aria-valuetext="{value}">'
                f'<output class="xp-val">{value}</output></label>')
    spec = json.dumps({"values": [[_shown(v) for v in values] for values in grid.values()], "texts": texts}).replace("</", "<\\/")
    links = "".join(f'<li><a href="{u}">{html.escape(t)}</a></li>' for u, t in zip(uris, texts))
    return (f'<figure class="xp" data-frames="{len(uris)}">{figures.img(uris[first], texts[first], size, cls="xp-img")}'
            f'<figcaption class="xp-live" aria-live="polite">{html.escape(texts[first])}</figcaption>'
            f'<form class="xp-controls" hidden>{"".join(control(n, v) for n, v in grid.items())}</form>'
            f'<details class="xp-all"><summary>All {len(uris)} settings as pictures</summary><ul>{links}</ul></details>'
            f'<script type="application/json" class="xp-spec">{spec}</script></figure>')


def _live(draw, describe, grid, at, labels):
    import ipywidgets as w

    sliders = {
        name: w.SelectionSlider(options=[(_shown(v), v) for v in values], value=values[at[name]], continuous_update=False,
                                description=labels.get(name, name), style={"description_width": "initial"}, layout={"width": "min(100%, 30rem)"})
        for name, values in grid.items()}

    def update(**point):
        fig, text = _point(draw, describe, point)
        figures.show(fig, alt=f"{text} (explorer frame)", caption=text)
    return w.VBox([*sliders.values(), w.interactive_output(update, sliders)])


def explore(draw, *, describe, start=None, labels=None, **grid):
    """Let the reader move parameters.

    draw(**point) -> matplotlib Figure; describe(**point) -> str, the live text and the frame's alt text.
    start: {name: value}, the middle of each list by default. labels: {name: text beside the slider}.
    grid: name=[values, ...], at most 200 points in all.
    Raises ValueError for a bad grid, ExploreError (naming the point) if a point cannot be drawn.
    """
    grid, at = _checked(grid, start, labels)
    labels = labels or {}
    plain = f"explore({', '.join(f'{name}: {len(values)} values' for name, values in grid.items())})"
    before, t0 = spent["cpu_s"], time.process_time()
    if mode() == "static":
        display({"text/html": _static(draw, describe, grid, at, labels), "text/plain": plain}, raw=True)
    elif mode() == "live":
        display(_live(draw, describe, grid, at, labels))
    else:
        for point in _points(grid):
            fig, text = _point(draw, describe, point)
            fig.canvas.draw()
            plt.close(fig)
        print(f"[{plain}] last frame: {text}")
    spent["cpu_s"] = before + time.process_time() - t0
    spent["frames"] += len(_points(grid))
