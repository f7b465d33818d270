"""The harness is fair: same weights, same batches, same budget; and its beds are what they say."""
import math

import numpy as np
import pytest
import torch

from lib import models
from lib.optimizers import harness
from lib.optimizers.adabelief import AdaBelief
from lib.optimizers.harness import Problem, Weights, digits, language, linear_decay, quadratic, race, run_once, step_seconds

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


BEDS = [quadratic, digits, lambda: digits("bn"), lambda: digits("cnn"), language]


@pytest.mark.parametrize("bed", BEDS)
def test_a_bed_draws_from_its_generators_alone(bed):
    problem, before = bed(), torch.get_rng_state()
    a, b, c = (problem.init(gen(s)) for s in (3, 3, 4))
    losses = [problem.loss(m, gen(s)).item() for m, s in ((a, 5), (b, 5), (b, 6), (c, 5))]
    assert losses[0] == losses[1] and losses[0] != losses[2] and losses[0] != losses[3]
    d, e = (problem.init(gen(3)).eval() for _ in "de")
    assert problem.evaluate(d) == problem.evaluate(e) and math.isfinite(problem.evaluate(c.eval()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bed", BEDS)
def test_a_bed_can_be_learned(bed):
    problem = bed()
    start = problem.evaluate(problem.init(gen(2)).eval())  # the run of seed 1 starts here
    assert run_once(problem, AdaBelief, 0.01, seed=1, steps=40)[0] < start


@pytest.mark.parametrize("rotate", [True, False])
def test_the_quadratic_has_the_spectrum_it_says(rotate):
    problem = quadratic(shape=(3, 4), condition=100.0, noise=0.0, rotate=rotate)
    model = Weights(torch.zeros(3, 4))
    columns = []
    for i in range(12):
        model.w.data.zero_().view(-1)[i] = 1.0
        columns.append(torch.autograd.grad(problem.loss(model, gen()), model.w)[0].flatten())
    H = torch.stack(columns).double().numpy()
    np.testing.assert_allclose(np.linalg.eigvalsh(H), np.logspace(-2, 0, 12), rtol=1e-4)  # float32 entries
    assert np.allclose(H, np.diag(np.diag(H))) is not rotate


def test_the_noise_of_the_quadratic():
    problem = quadratic(noise=0.5)
    model = Weights(torch.zeros(16, 16))
    g = gen(7)
    grads = torch.stack([torch.autograd.grad(problem.loss(model, g), model.w)[0] for _ in range(200)])
    assert grads.std().item() == pytest.approx(0.5, rel=0.02)  # 51200 draws: standard error 0.3 %


def test_fresh_networks_of_the_full_size_are_the_books():
    mine, books = language(d=128, layers=4, heads=4, hidden=384).init(gen(1)), models.shakespeare_lm(gen(1))
    for (name, p), (other, q) in zip(mine.named_parameters(), books.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)


def test_batch_norm_starts_as_torch_starts_it():
    norm = digits("bn").init(gen())[2]
    assert torch.equal(norm.weight, torch.ones(32)) and torch.equal(norm.bias, torch.zeros(32))
    assert torch.equal(norm.running_mean, torch.zeros(32)) and torch.equal(norm.running_var, torch.ones(32))


def test_training_is_repeatable_and_equals_a_loop_by_hand():
    problem = quadratic(shape=(4, 4))
    score, losses, _ = run_once(problem, SGD, 0.1, seed=2, steps=10, schedule=linear_decay)
    assert (score, losses) == run_once(problem, SGD, 0.1, seed=2, steps=10, schedule=linear_decay)[:2]
    model, batches = problem.init(gen(4)), gen(5)
    for t in range(10):
        g, = torch.autograd.grad(problem.loss(model, batches), model.w)
        model.w.data.add_(g, alpha=-0.1 * (1 - t / 10))
    assert problem.evaluate(model) == pytest.approx(score, rel=1e-6)  # float32


def test_schedule_keeps_the_ratio_of_groups():
    def two(params, lr):
        return SGD([{"params": [params[0][1]], "lr": lr}, {"params": [params[1][1]], "lr": 0.0}], lr=lr)
    bed = Problem("pair", "sum", lambda g: torch.nn.Linear(1, 1), lambda m, g: m.weight.sum() + m.bias.sum(), lambda m: m.bias.item())
    torch.manual_seed(0)  # nn.Linear draws from the global state, here in a test
    start = torch.nn.Linear(1, 1).bias.item()
    torch.manual_seed(0)
    assert run_once(bed, two, 0.1, 0, 5, linear_decay)[0] == start


def test_race_reports_median_spread_and_state():
    problem = quadratic(shape=(4, 4))
    result = race(problem, {"SGD": SGD, "AdaBelief": AdaBelief}, {"SGD": (0.1, 1.0, 100.0), "AdaBelief": (1e-3, 1e-2, 1e-1)}, range(3), 30)
    sgd = result["SGD"]
    assert [r.lr for r in sgd.rates] == [0.1, 1.0, 100.0]
    assert sgd.rates[2].scores == (math.inf,) * 3  # rate 100 on curvature 1 blows up, and the run stays in the table
    scores = [run_once(problem, SGD, 0.1, s, 30)[0] for s in range(3)]
    assert sgd.rates[0].scores == tuple(scores)
    assert sgd.rates[0].median == sorted(scores)[1] and sgd.rates[0].spread == (min(scores), max(scores))
    assert sgd.best.median == min(r.median for r in sgd.rates) and sgd.best_is_inside is (sgd.best.lr == 1.0)
    assert sgd.bytes_per_parameter == 0 and result["AdaBelief"].bytes_per_parameter == 8
    assert len(sgd.rates[0].curves) == 3 and len(sgd.rates[0].curves[0]) == 30


@pytest.mark.parametrize("change", [{"rates": {"a": (0.1,), "b": (0.1, 0.2)}}, {"rates": ()}, {"seeds": ()}, {"steps": 0}, {"methods": {}}])
def test_an_unequal_or_empty_budget_is_refused(change):
    arguments = {"methods": {"a": SGD, "b": SGD}, "rates": (0.1,), "seeds": (0,), "steps": 1} | change
    with pytest.raises(ValueError, match="rates must|seeds must"):
        race(quadratic(shape=(2, 2)), **arguments)


def test_bad_beds_are_refused():
    with pytest.raises(ValueError, match="network"):
        digits("resnet")
    with pytest.raises(ValueError, match="condition"):
        quadratic(condition=0.5)


def test_step_seconds_takes_each_method_on_its_own_copy():
    model = torch.nn.Linear(8, 8)
    before = [p.detach().clone() for p in model.parameters()]
    times = step_seconds({"SGD": SGD, "AdamW": AdamW}, model, repeats=3)
    assert set(times) == {"SGD", "AdamW"} and all(t > 0 for t in times.values())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_language_never_reads_its_own_answer():
    """The held-out windows predict the next token: shifting them must change the score of a trained model's input."""
    problem = language(windows=4)
    model = problem.init(gen()).eval()
    assert problem.evaluate(model) == pytest.approx(math.log(512), abs=0.3)  # an untrained model knows nothing
    assert harness.constant_rate(0.3) == 1.0


def test_a_method_that_gives_up_scores_infinity():
    """As MKOR does when a factor is no longer finite; the run ends, the race goes on."""
    class GivesUp(torch.optim.SGD):
        def step(self, closure=None):
            raise FloatingPointError("not finite")
    score, losses, _ = run_once(quadratic(), GivesUp, 0.1, seed=0, steps=5)
    assert score == math.inf and losses[-1] == math.inf and len(losses) == 2


def test_a_method_that_watches_is_shown_the_model():
    shown = []

    class Watching(torch.optim.SGD):
        def watch(self, model):
            shown.append(type(model))
            return self
    run_once(quadratic(), Watching, 0.1, seed=0, steps=1)
    assert shown == [Weights]
