"""The shipped results of the race are whole, and a part of them can be run again."""
import importlib.util
import json
import math
import statistics

import pytest

from lib.book.paths import ROOT
from lib.book.registry import load

RESULTS = json.loads((ROOT / "data" / "race_optimizers.json").read_text())


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("race_optimizers", ROOT / "data" / "race_optimizers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_ran_on_every_bed(script):
    assert RESULTS["beds"].keys() == script.BEDS.keys() and len(RESULTS["seeds"]) >= 3
    for bed in RESULTS["beds"].values():
        assert bed["methods"].keys() == script.METHODS.keys()
        for row in bed["methods"].values():
            assert len(row["scores"]) == len(RESULTS["seeds"]) and row["lr"] > 0 and row["bytes"] >= 0
            assert math.isfinite(statistics.median(row["scores"]))


def test_the_chapter_s_optimizers_take_part(script):
    """Every finished paper whose module holds an optimizer for ordinary training; the others say on the page why they do not."""
    source = (ROOT / "data" / "race_optimizers.py").read_text()
    left_out = {"schedule_refinement", "classp", "adadagrad"}        # a schedule, a method for sequences of tasks, a rule for batch sizes
    for paper in load().of_chapter("optimizers"):
        if paper.status == "page" and paper.slug not in left_out:
            assert f'"{paper.slug}"' in source, paper.key


def test_the_page_says_what_the_results_say():
    """The sentences under "When is each worth it?"; a new run that changes them must change the page."""
    median = {bed: {n: statistics.median(m["scores"]) for n, m in rows["methods"].items()} for bed, rows in RESULTS["beds"].items()}
    quad, cnn, lm = (median[b] for b in ("quadratic", "digits CNN", "language model"))
    place = lambda bed, name: sorted(bed.values()).index(bed[name])
    for name in ("Muon", "Hybrid-AuON", "SinkGD", "SWAN"):
        assert cnn[name] < cnn["AdamW"] / 2 and lm[name] < lm["AdamW"] and quad[name] > 1.3 * quad["AdamW"], name
    assert cnn["Lion"] < cnn["AdamW"] and lm["Lion"] < lm["AdamW"] and quad["Lion"] > 2 * quad["AdamW"]
    assert quad["SGD + momentum"] < 1.1 * min(quad.values()) and place(lm, "SGD + momentum") >= len(lm) - 4
    assert quad["SGD, clipped"] <= 1.02 * quad["SGD + momentum"] and lm["SGD, clipped"] < lm["SGD + momentum"]
    assert all(3 <= place(bed, "AdamW") <= len(bed) - 3 for bed in (quad, cnn, lm))
    assert cnn["MKOR"] < cnn["SGD + momentum"] and lm["MKOR"] < lm["SGD + momentum"] and quad["MKOR"] == pytest.approx(quad["SGD + momentum"], rel=1e-3)
    mean = {n: math.prod(bed[n] / bed["AdamW"] for bed in (quad, cnn, lm)) for n in lm}
    assert {"Adan", "SGD-SaI"} == set(sorted(mean, key=mean.get)[-2:])
    assert RESULTS["beds"]["language model"]["methods"]["SinkGD"]["bytes"] == 0


@pytest.mark.parametrize("name", ["SGD + momentum", "AdamW", "Lion", "SinkGD"])
def test_a_part_of_the_race_can_be_run_again(script, name):
    """The quadratic, from seeds: other processors and versions add in another order, and 200 steps let that grow to a per cent or so."""
    make, steps = script.BEDS["quadratic"]
    again, shipped = script.enter(script.METHODS[name], make(), steps), RESULTS["beds"]["quadratic"]["methods"][name]
    assert again["lr"] == pytest.approx(shipped["lr"]) and again["bytes"] == shipped["bytes"]
    assert statistics.median(again["scores"]) == pytest.approx(statistics.median(shipped["scores"]), rel=0.05)
