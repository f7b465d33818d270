"""What every optimizer of the chapter must do to be a drop-in `torch.optim.Optimizer`.

    class TestConformance(Conformance):
        optimizer = AdaBelief
        options = {"lr": 0.05}
        floats_per_parameter = 2

A method without `betas` or `weight_decay` overrides `bad_options`.
"""
import copy
import io

import pytest
import torch

from lib.optimizers import base

NAN = float("nan")


def tensors(dtype=torch.float64, seed=0, shapes=((3, 4), (5,), (), (0, 2), (2, 1, 3))):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def set_grads(params, seed):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


def snapshot(opt):
    return ([p.detach().clone() for g in opt.param_groups for p in g["params"]], copy.deepcopy(opt.state_dict()))


def same(a, b):
    """Equality of nested containers, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


class Conformance:
    optimizer: type
    options: dict = {"lr": 0.05}
    floats_per_parameter: int | None = None  # None: the method's own test counts its state
    bad_options = [("lr", -1e-3), ("lr", NAN), ("lr", float("inf")), ("lr", "fast"), ("betas", (1.0, 0.9)),
                   ("betas", (0.9, -0.1)), ("betas", (0.9, NAN)), ("betas", (0.9,)), ("eps", -1e-8), ("eps", NAN),
                   ("weight_decay", -0.1), ("weight_decay", NAN), ("maximize", "yes")]

    def make(self, params, **options):
        return self.optimizer(params, **{**self.options, **options})

    def run(self, params, steps=5, first=0, **options):
        opt = self.make(params, **options)
        for t in range(first, first + steps):
            set_grads(params, t)
            opt.step()
        return opt

    # -- a training loop

    def test_descends_a_quadratic(self):
        x = torch.tensor([3.0, -2.0], requires_grad=True)
        opt = self.make([x])
        for _ in range(20):
            opt.zero_grad()
            (0.5 * x.square().sum()).backward()
            opt.step()
        assert x[0] < 3.0 and x[1] > -2.0 and x.square().sum() < 13.0

    def test_closure_gives_loss_and_gradients(self):
        x = torch.tensor([3.0], requires_grad=True)
        opt = self.make([x])

        def closure():
            opt.zero_grad()
            loss = x.square().sum()
            loss.backward()
            return loss

        assert opt.step(closure).item() == 9.0
        assert x.item() != 3.0

    def test_groups_keep_their_own_options(self):
        a, b = tensors(shapes=((3,), (3,)))
        before = b.detach().clone()
        opt = self.make([{"params": [a]}, {"params": [b], "lr": 0.0}])
        alone = a.detach().clone().requires_grad_()
        reference = self.make([alone])
        for t in range(3):
            set_grads([a, b], t)
            alone.grad = a.grad.clone()
            opt.step()
            reference.step()
        assert torch.equal(a, alone) and torch.equal(b, before)

    def test_named_parameters_and_late_groups(self):
        model = torch.nn.Linear(3, 2)
        opt = self.make(model.named_parameters())
        extra = torch.ones(2, requires_grad=True)
        opt.add_param_group({"params": [("extra", extra)], "lr": 0.5})
        set_grads([*model.parameters(), extra], 0)
        opt.step()
        assert (extra != 1).all() and opt.param_groups[1]["lr"] == 0.5

    def test_scheduler_changes_lr_between_steps(self):
        a, b = tensors(seed=1), tensors(seed=1)
        scheduled, by_hand = self.make(a), self.make(b)
        scheduler = torch.optim.lr_scheduler.StepLR(scheduled, step_size=2, gamma=0.1)
        for t in range(6):
            set_grads(a, t)
            set_grads(b, t)
            by_hand.param_groups[0]["lr"] = self.options["lr"] * 0.1 ** (t // 2)
            scheduled.step()
            scheduler.step()
            by_hand.step()
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # the scheduler multiplies 0.1 up in floats

    def test_tensor_lr_is_the_float(self):
        a, b = tensors(), tensors()
        self.run(a)
        self.run(b, lr=torch.tensor(self.options["lr"], dtype=torch.float64))
        assert same(a, b)

    def test_maximize_is_descent_on_the_negated_gradient(self):
        a, b = tensors(), tensors()
        up, down = self.make(a, maximize=True), self.make(b)
        for t in range(5):
            set_grads(a, t)
            for p, q in zip(a, b, strict=True):
                q.grad = -p.grad
            up.step()
            down.step()
        assert same(a, b)

    def test_compiled_model_trains_alike(self):
        results = []
        for compiled in (False, True):
            model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
            for i, p in enumerate(model.parameters()):
                torch.nn.init.constant_(p, 0.1 * (i + 1))
            run = torch.compile(model, backend="eager") if compiled else model
            opt = self.make(model.parameters())
            x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
            for _ in range(3):
                opt.zero_grad()
                run(x).square().mean().backward()
                opt.step()
            results.append([p.detach() for p in model.parameters()])
        assert same(*results)

    # -- tensors of every kind

    def test_parameters_without_gradients_rest(self):
        a, b = tensors(shapes=((3,), (3,)))
        before = b.detach().clone()
        opt = self.make([a, b], **({"weight_decay": 0.1} if "weight_decay" in opt_defaults(self) else {}))
        set_grads([a], 0)
        opt.step()
        assert torch.equal(b, before) and b not in opt.state

    def test_each_parameter_counts_its_own_steps(self):
        early, late = tensors(shapes=((3,), (4,)))
        alone = late.detach().clone().requires_grad_()
        opt = self.make([early, late])
        for t in range(3):
            set_grads([early], t)
            opt.step()
        set_grads([early, late], 3)
        alone.grad = late.grad.clone()
        opt.step()
        self.make([alone]).step()
        assert torch.equal(late, alone) and opt.state[early]["step"] == 4 and opt.state[late]["step"] == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_low_precision(self, dtype):
        exact, low = tensors(), tensors(dtype)
        self.run(exact, steps=10)
        self.run(low, steps=10)
        # bfloat16 keeps 8 bits: ten steps of size lr on values of order 1 lose at most a few roundings of 2^-8 each
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
        for p, q in zip(exact, low, strict=True):
            assert q.dtype == dtype and torch.isfinite(q).all()
            torch.testing.assert_close(q.double(), p, rtol=tolerance, atol=tolerance)

    def test_strided_tensors_as_contiguous_ones(self):
        a = torch.arange(12, dtype=torch.float64).reshape(3, 4).t().requires_grad_()
        b = a.detach().contiguous().requires_grad_()
        opts = [self.make([a]), self.make([b])]
        for t in range(3):
            set_grads([b], t)
            a.grad = b.grad.clone()
            for opt in opts:
                opt.step()
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)  # a vectorized loop may round in another order

    def test_runs_of_the_cache_change_nothing(self, monkeypatch):
        a, b = tensors(), tensors()
        self.run(a)
        monkeypatch.setattr(base, "CACHE_ELEMENTS", 4)
        self.run(b)
        assert same(a, b)

    def test_gradients_are_read_only(self):
        params = tensors()
        opt = self.make(params, maximize=True)
        set_grads(params, 0)
        before = [p.grad.clone() for p in params]
        opt.step()
        assert same(before, [p.grad for p in params])

    # -- state

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_state_dict_continues_bit_for_bit(self, dtype):
        whole, first = tensors(dtype), tensors(dtype)
        self.run(whole, steps=7)
        saved = io.BytesIO()
        torch.save(self.run(first, steps=4).state_dict(), saved)
        saved.seek(0)
        second = [p.detach().clone().requires_grad_() for p in first]
        opt = self.make(second, lr=9.0)
        opt.load_state_dict(torch.load(saved, weights_only=True))
        for t in range(4, 7):
            set_grads(second, t)
            opt.step()
        assert same(whole, second)

    def test_deep_copy_continues_bit_for_bit(self):
        params = tensors()
        opt = self.run(params)
        twin = copy.deepcopy(opt)
        copies = twin.param_groups[0]["params"]
        set_grads(params, 9)
        set_grads(copies, 9)
        opt.step()
        twin.step()
        assert same(params, copies)

    def test_counted_state(self):
        if self.floats_per_parameter is None:
            pytest.skip("counted in the method's own test")
        params = tensors(torch.float32)
        opt = self.run(params, steps=2)
        assert base.state_bytes(opt) == 4 * self.floats_per_parameter * sum(p.numel() for p in params)

    # -- bad input: the error names the argument, and nothing has changed

    def test_bad_options_are_refused(self):
        for name, value in self.bad_options:
            with pytest.raises((ValueError, TypeError), match=name):
                self.make(tensors(), **{name: value})
            params = tensors()
            with pytest.raises((ValueError, TypeError), match=name):
                self.make([{"params": params, name: value}])
            opt = self.run(params)
            before = snapshot(opt)
            with pytest.raises((ValueError, TypeError), match=name):
                opt.add_param_group({"params": torch.ones(2, requires_grad=True), name: value})
            assert same(before, snapshot(opt))

    def test_option_spoilt_between_steps(self):
        params, extra = tensors(), torch.ones(2, requires_grad=True)
        opt = self.make([{"params": params}, {"params": [extra]}])
        set_grads([*params, extra], 0)
        opt.step()
        before = snapshot(opt)
        opt.param_groups[1]["lr"] = NAN
        with pytest.raises(ValueError, match="lr"):
            opt.step()
        opt.param_groups[1]["lr"] = self.options["lr"]
        assert same(before, snapshot(opt))

    def test_sparse_gradients_are_refused(self):
        dense, table = torch.ones(3, requires_grad=True), torch.nn.Embedding(4, 2, sparse=True)
        opt = self.make([dense, table.weight])
        dense.grad = torch.ones(3)
        table(torch.tensor([1])).sum().backward()
        before = snapshot(opt)
        with pytest.raises(TypeError, match="gradients must be dense"):
            opt.step()
        assert same(before, snapshot(opt))

    def test_complex_parameters_are_refused(self):
        opt = self.make(tensors())
        before = snapshot(opt)
        number = torch.ones(2, dtype=torch.complex64, requires_grad=True)
        with pytest.raises(TypeError, match="params must be dense real"):
            opt.add_param_group({"params": [number]})
        with pytest.raises(TypeError, match="params must be dense real"):
            self.make([number])
        assert same(before, snapshot(opt))


def opt_defaults(case):
    return case.make([torch.ones(1, requires_grad=True)]).defaults
