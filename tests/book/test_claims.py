"""Claims: every verdict can come out either way, and an unexpected one breaks the page."""
import numpy as np
import pytest

from lib.book import ClaimError, Claims


def claims():
    return Claims("optimizers/adabelief")


def report(c, capsys):
    c.report()
    return capsys.readouterr().out


def test_a_check_passes_and_is_reported(capsys):
    c = claims()
    c.check("bound", "the error stays below $S/2$", {"worst": 0.25}, lambda m: m["worst"] <= 0.5, tolerance="exact")
    report(c, capsys)
    assert "PASS        bound" in c.plain() and "worst: 0.25" in c.plain()
    assert r"\(S/2\)" in c.as_html() and 'id="claim-bound"' in c.as_html()


@pytest.mark.parametrize("holds", [False, np.bool_(False), lambda m: m > 1])
def test_a_check_that_does_not_hold_breaks_the_page(holds):
    c = claims()
    c.check("bound", "says", 1.0, holds)
    with pytest.raises(ClaimError, match="'bound' came out FAIL, expected PASS"):
        c.report()


def test_an_expected_fail_that_holds_breaks_the_page():
    c = claims()
    c.expect_fail("faster", "it is always faster", 1.0, True, why="it is not")
    with pytest.raises(ClaimError, match="'faster' came out PASS, expected FAIL"):
        c.report()


def test_an_expected_fail_and_an_untested_claim_are_fine(capsys):
    c = claims()
    c.expect_fail("faster", "it is always faster", 1.0, False, why="it is not")
    c.not_tested("imagenet", "it wins on ImageNet", why="needs a GPU cluster")
    report(c, capsys)
    assert "FAIL        faster" in c.plain() and "NOT TESTED  imagenet" in c.plain()


@pytest.mark.parametrize("holds", [1, "yes", None, np.array([True, True]), lambda m: None])
def test_a_verdict_is_a_bool(holds):
    c = claims()
    with pytest.raises(TypeError, match="holds"):
        c.check("bound", "says", 1.0, holds)
    assert c.rows == []


@pytest.mark.parametrize("id", ["Bound", "a b", "", "a_b", "-a"])
def test_ids_are_kebab_case(id):
    with pytest.raises(ValueError, match="kebab"):
        claims().check(id, "says", 1, True)


def test_ids_are_unique():
    c = claims()
    c.check("a", "says", 1, True)
    with pytest.raises(ValueError, match="already"):
        c.not_tested("a", "says", "why")


def test_reasons_are_required():
    with pytest.raises(ValueError, match="why"):
        claims().not_tested("a", "says", " ")
    with pytest.raises(ClaimError, match="no claim"):
        claims().report()


def test_markup_is_escaped():
    c = claims()
    c.check("a", "x < y & <script>", "<b>", True)
    assert "<script>" not in c.as_html() and "&lt;script&gt;" in c.as_html()
