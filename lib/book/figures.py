"""One look for all figures: colour-blind-safe colours that never stand alone, letters that a phone can show, alt text always."""
import base64
import html
import io

import matplotlib
import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import display
from PIL import Image

from .paths import mode

# Okabe and Ito's palette without its yellow (too faint on white); black is kept for references and bounds.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), "-")

DPI = 130
STYLE = {
    "figure.figsize": (5.6, 3.3), "figure.dpi": DPI, "savefig.dpi": DPI, "figure.constrained_layout.use": True,
    "figure.facecolor": "white", "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "legend.fontsize": 9,
    "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.6, "lines.markersize": 4.5, "legend.frameon": False, "image.cmap": "cividis",
    "axes.prop_cycle": cycler(color=PALETTE) + cycler(linestyle=LINES),
}
plt.switch_backend("agg")            # a figure appears where `show` says so, and nowhere else
matplotlib.rcParams.update(STYLE)


def png(fig) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def webp(fig, colours=64) -> tuple[bytes, tuple[int, int]]:
    """The figure as WebP and its size in pixels; `colours=None` keeps them all (photographs, lossy)."""
    image = Image.open(io.BytesIO(png(fig))).convert("RGB")
    buffer = io.BytesIO()
    if colours is None:
        image.save(buffer, "WEBP", quality=85, method=4)
    else:
        image = image.quantize(colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        image.convert("RGB").save(buffer, "WEBP", lossless=True, quality=60, method=2)
    return buffer.getvalue(), image.size


def data_uri(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def img(uri, alt, size, photo=False, cls="") -> str:
    """An <img> that the dark theme inverts (hues kept), unless it is a photograph."""
    classes = " ".join(filter(None, ["dark-light", cls, "photo" if photo else "chart"]))
    return (f'<img class="{classes}" src="{uri}" alt="{html.escape(alt)}" width="{size[0]}" height="{size[1]}" '
            f'style="aspect-ratio:{size[0]}/{size[1]}">')


def need_figure(fig, who):
    if not isinstance(fig, matplotlib.figure.Figure):
        raise TypeError(f"{who}: expected a matplotlib Figure, got {type(fig).__name__}")
    return fig


def show(fig, alt: str, caption: str | None = None, photo: bool = False):
    """Show a figure, then close it.

    alt: what the figure says, for those who do not see it; may quote measured numbers. Required.
    caption: shown under the figure. photo: keep the dark theme from inverting it.
    """
    need_figure(fig, "show(fig)")
    if not isinstance(alt, str) or len(alt.split()) < 3:
        raise ValueError(f"alt={alt!r}: expected a sentence that says what the figure shows")
    try:
        if mode() == "static":
            data, size = webp(fig, None if photo else 64)
            cap = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
            display({"text/html": f'<figure class="book-figure">{img(data_uri(data), alt, size, photo)}{cap}</figure>',
                     "text/plain": f"[figure: {alt}]"}, raw=True)
        elif mode() == "live":
            display({"image/png": base64.b64encode(png(fig)).decode(), "text/plain": f"[figure: {alt}]"},
                    metadata={"image/png": {"alt": alt}}, raw=True)
            if caption:
                display({"text/markdown": f"*{caption}*", "text/plain": caption}, raw=True)
        else:
            fig.canvas.draw()
            print(f"[figure: {alt}]" + (f"\n{caption}" if caption else ""))
    finally:
        plt.close(fig)
