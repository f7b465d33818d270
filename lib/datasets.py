"""The few real data sets that all pages share. Nothing is downloaded: each comes out of an installed package or of `data/`.

    digits(split)          images [n, 8, 8] float32 in 0..1 and labels [n] int64
    shakespeare(split)     fourteen plays ("train"), or The Winter's Tale ("valid"), as one string of printable ASCII
    photo(name, gray)      float32 in 0..1: [height, width, 3], or [height, width]
    table(name)            a Table: x [n, d], y [n] (or None), the names of the columns
    graph(name)            a networkx.Graph
    catalogue()            one Row for each of them: what it is, where it comes from, under which licence, its shape

Importing this module loads numpy alone; the package that holds a set is imported when the set is asked for.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Row:
    """One line of the catalogue."""

    name: str
    call: str
    what: str
    source: str
    licence: str
    shape: tuple


@dataclass(frozen=True)
class Table:
    """x: float64 [n, d] with the d names of `columns`; y: [n] and what it is (`target`), or None. Missing values are NaN."""

    x: np.ndarray
    columns: tuple
    y: np.ndarray | None
    target: str | None


_UCI = "CC BY 4.0 (UCI Machine Learning Repository)"
_PD = "public domain"
_CATALOGUE = (
    Row("digits", "digits", "handwritten digits, 8x8 pixels of 17 grey levels", "sklearn.datasets.load_digits", _UCI, (1797, 8, 8)),
    Row("shakespeare", "shakespeare", "fifteen plays of William Shakespeare, modern spelling", "data/shakespeare_*.txt", _PD, (1999949,)),
    Row("camera", "photo", "a photographer at work, grey", "skimage.data.camera", "CC0", (512, 512)),
    Row("chelsea", "photo", "a cat's face", "skimage.data.chelsea", "CC0", (300, 451, 3)),
    Row("coffee", "photo", "a cup of coffee", "skimage.data.coffee", "CC0", (400, 600, 3)),
    Row("astronaut", "photo", "the astronaut Eileen Collins (NASA)", "skimage.data.astronaut", _PD, (512, 512, 3)),
    Row("rocket", "photo", "a rocket on its launch pad (SpaceX)", "skimage.data.rocket", _PD, (427, 640, 3)),
    Row("breast_cancer", "table", "cell nuclei measured in 569 biopsies; malignant or benign", "sklearn.datasets.load_breast_cancer", _UCI, (569, 30)),
    Row("diabetes", "table", "ten measurements of 442 patients; the disease a year later", "sklearn.datasets.load_diabetes",
        "none stated by its authors (Efron et al., 2004); distributed with scikit-learn, BSD-3-Clause", (442, 10)),
    Row("wine", "table", "chemistry of 178 wines of three growers", "sklearn.datasets.load_wine", _UCI, (178, 13)),
    Row("randhie", "table", "RAND health insurance experiment; visits to a doctor", "statsmodels.datasets.randhie", _PD, (20190, 9)),
    Row("anes96", "table", "American election survey of 1996; party identification", "statsmodels.datasets.anes96", _PD, (944, 10)),
    Row("elnino", "table", "monthly sea surface temperature, 1950-2010", "statsmodels.datasets.elnino", _PD, (61, 13)),
    Row("sunspots", "table", "yearly sunspot activity, 1700-2008", "statsmodels.datasets.sunspots", _PD, (309, 1)),
    Row("modechoice", "table", "210 travellers between four means of transport", "statsmodels.datasets.modechoice", _PD, (840, 8)),
    Row("co2", "table", "weekly CO2 at Mauna Loa, 1958-2001, 59 weeks missing", "statsmodels.datasets.co2", _PD, (2284, 1)),
    Row("fair", "table", "a survey of marriages; affairs", "statsmodels.datasets.fair", "by permission of the author: load it, don't copy it", (6366, 8)),
    Row("karate_club", "graph", "friendships in a karate club that split in two", "networkx.karate_club_graph",
        "none stated by its author (Zachary, 1977); distributed with networkx, BSD-3-Clause", (34, 78)),
    Row("les_miserables", "graph", "characters of the novel who share a chapter", "networkx.les_miserables_graph",
        "Stanford GraphBase (Knuth, 1993), free to use unchanged; distributed with networkx, BSD-3-Clause", (77, 254)),
)


def catalogue():
    """All data sets as a tuple of Rows. `shape`: of the images, the text in characters, a table's x, or a graph's (nodes, edges)."""
    return _CATALOGUE


def _row(name, call):
    names = [r.name for r in _CATALOGUE if r.call == call]
    if name not in names:
        raise ValueError(f"name: no {call} called {name!r}; there are {', '.join(names)}")


def _split(split, allowed):
    if split not in allowed:
        raise ValueError(f"split must be one of {', '.join(allowed)}, was {split!r}")


def digits(split="train"):
    """Images [n, 8, 8] float32 in 0..1 and labels [n] int64 of "train" (1085), "valid" (357) or "test" (355).

    The rule: count the images of each class in the order of the file; every fifth, beginning with the fourth, is for validation,
    every fifth, beginning with the fifth, is for testing, and the rest is for training. No random number is involved, and the
    classes are as balanced in each part as in the whole.
    """
    from sklearn.datasets import load_digits

    _split(split, ("train", "valid", "test"))
    data = load_digits()
    nth = np.empty(len(data.target), dtype=np.int64)               # how many of its class came before an image
    for c in range(10):
        nth[data.target == c] = np.arange((data.target == c).sum())
    part = np.array([0, 0, 0, 1, 2])[nth % 5]
    keep = part == ("train", "valid", "test").index(split)
    return (data.images[keep] / 16).astype(np.float32), data.target[keep].astype(np.int64)


def shakespeare(split="train"):
    """The "train" plays (fourteen, 1.85 million characters) or the "valid" one (The Winter's Tale, 0.15 million)."""
    _split(split, ("train", "valid"))
    return (DATA / f"shakespeare_{split}.txt").read_text(encoding="ascii")


def photo(name, gray=False):
    """A photograph, float32 in 0..1: [height, width, 3], or [height, width] when it is grey or `gray` is asked for (ITU-R 601 luma)."""
    _row(name, "photo")
    import skimage.data

    image = (getattr(skimage.data, name)() / 255).astype(np.float32)
    return image @ np.array([0.299, 0.587, 0.114], dtype=np.float32) if gray and image.ndim == 3 else image


def table(name):
    """A Table. The target is the one its package names; a series has time alone as its x, or (elnino) no target."""
    _row(name, "table")
    if name in ("breast_cancer", "diabetes", "wine"):
        import sklearn.datasets

        data = getattr(sklearn.datasets, f"load_{name}")()
        target = "progression after a year" if name == "diabetes" else "class"
        return Table(data.data.astype(np.float64), tuple(map(str, data.feature_names)), data.target, target)
    from importlib import import_module

    frame = import_module(f"statsmodels.datasets.{name}").load().data
    if name == "co2":                                              # the index holds the week
        frame = frame.assign(week=np.arange(len(frame)))
    target = {"randhie": "mdvis", "anes96": "PID", "sunspots": "SUNACTIVITY", "modechoice": "choice", "co2": "co2", "fair": "affairs"}.get(name)
    x = frame.drop(columns=[target] if target else [])
    y = frame[target].to_numpy(dtype=np.float64) if target else None
    return Table(x.to_numpy(dtype=np.float64), tuple(map(str, x.columns)), y, target)


def graph(name):
    """A networkx.Graph with what its authors recorded (node attribute `club` in karate_club; edge `weight` in both)."""
    _row(name, "graph")
    import networkx

    return getattr(networkx, f"{name}_graph")()
