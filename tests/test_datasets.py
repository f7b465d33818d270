"""The shared data sets: what the catalogue promises is what comes out, from the installed packages alone."""

import subprocess
import sys

import numpy as np
import pytest

from lib import datasets


def measured_shape(row):
    if row.call == "digits":
        return (sum(len(datasets.digits(s)[0]) for s in ("train", "valid", "test")), 8, 8)
    if row.call == "shakespeare":
        return (sum(len(datasets.shakespeare(s)) for s in ("train", "valid")),)
    if row.call == "graph":
        g = datasets.graph(row.name)
        return (g.number_of_nodes(), g.number_of_edges())
    out = getattr(datasets, row.call)(row.name)
    return out.shape if row.call == "photo" else out.x.shape


@pytest.mark.parametrize("row", datasets.catalogue(), ids=lambda r: r.name)
def test_catalogue_tells_the_truth(row):
    assert measured_shape(row) == row.shape
    assert row.what and row.source and row.licence


def test_catalogue_names_are_unique():
    names = [r.name for r in datasets.catalogue()]
    assert len(names) == len(set(names))


def test_import_is_light():
    heavy = ("torch", "sklearn", "skimage", "statsmodels", "networkx", "pandas", "scipy")
    code = f"import sys, lib.datasets; sys.exit([m for m in {heavy!r} if m in sys.modules] and 1 or 0)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_digits_split_is_the_documented_rule():
    from sklearn.datasets import load_digits

    whole = load_digits()
    parts = {s: datasets.digits(s) for s in ("train", "valid", "test")}
    taken = {s: 0 for s in parts}
    seen = np.zeros(10, dtype=int)
    for image, label in zip(whole.images, whole.target):           # the rule again, one image at a time
        s = ("train", "train", "train", "valid", "test")[seen[label] % 5]
        x, y = parts[s]
        assert y[taken[s]] == label and np.array_equal(x[taken[s]] * 16, image)
        taken[s] += 1
        seen[label] += 1
    assert taken == {s: len(y) for s, (_, y) in parts.items()} == {"train": 1085, "valid": 357, "test": 355}


def test_digits_types_and_balance():
    x, y = datasets.digits("test")
    assert x.dtype == np.float32 and y.dtype == np.int64 and x.min() == 0 and x.max() == 1
    counts = np.bincount(y)
    assert counts.max() - counts.min() <= 2


def test_shakespeare_is_printable_ascii_without_tabs():
    for split in ("train", "valid"):
        assert set(datasets.shakespeare(split)) <= set("\n" + "".join(map(chr, range(32, 127))))
    assert "Leontes" in datasets.shakespeare("valid") and "Leontes" not in datasets.shakespeare("train")


def test_photos_are_in_the_unit_interval_and_gray_is_their_luma():
    colour, gray = datasets.photo("chelsea"), datasets.photo("chelsea", gray=True)
    assert colour.dtype == gray.dtype == np.float32 and colour.min() >= 0 and colour.max() <= 1
    luma = 0.299 * colour[..., 0].astype(float) + 0.587 * colour[..., 1] + 0.114 * colour[..., 2]
    np.testing.assert_allclose(gray, luma, atol=1e-6)              # three float32 products: 1e-7 each
    assert datasets.photo("camera", gray=True).shape == (512, 512)


def test_tables_name_their_columns_and_keep_the_target_out_of_x():
    for row in datasets.catalogue():
        if row.call == "table":
            t = datasets.table(row.name)
            assert len(t.columns) == t.x.shape[1] and t.x.dtype == np.float64
            assert (t.y is None) == (t.target is None)
            assert t.y is None or len(t.y) == len(t.x) and t.target not in t.columns
            assert np.isfinite(t.x).all()
    assert int(np.isnan(datasets.table("co2").y).sum()) == 59      # the weeks without a measurement, as the catalogue says


def test_graphs_carry_what_was_recorded():
    karate = datasets.graph("karate_club")
    assert {karate.nodes[n]["club"] for n in karate} == {"Mr. Hi", "Officer"}
    assert all("weight" in d for _, _, d in datasets.graph("les_miserables").edges(data=True))


@pytest.mark.parametrize("call, argument", [
    (datasets.photo, "eagle"), (datasets.photo, "wine"), (datasets.table, "camera"), (datasets.table, "iris"), (datasets.graph, "florentine")])
def test_an_unknown_name_lists_the_known_ones(call, argument):
    with pytest.raises(ValueError, match=f"name: no .* called '{argument}'; there are "):
        call(argument)


@pytest.mark.parametrize("call", [datasets.digits, datasets.shakespeare])
def test_an_unknown_split_lists_the_known_ones(call):
    with pytest.raises(ValueError, match="split must be one of train, valid.*was 'dev'"):
        call("dev")
