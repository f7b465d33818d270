"""What the chapter's optimizers share: argument checks, gathering, decoupled decay, bias correction, foreach updates.

A method of this chapter is a subclass of `Optimizer` that says which buffers it keeps (`buffers`) and how one batch of
tensors moves (`update`). Everything a training loop expects of a `torch.optim.Optimizer` happens here, once:

- every option of every group is checked when the group is added and again before each step (a scheduler may have
  changed it), and every gradient is checked before the first tensor moves: an error leaves parameters and state alone;
- tensors of a group that share device, dtype and step count form a batch, so that bias corrections are plain floats
  although each parameter counts its own steps;
- on a CPU a batch is cut into runs that fit the cache, because an update makes about ten passes over each tensor;
- gradients are read, never written: coupled decay and `maximize` make new tensors.

The values of gradients are not inspected (`torch.optim` does not either): a NaN gradient makes a NaN parameter.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real

import torch

Tensors = list[torch.Tensor]
CACHE_ELEMENTS = 1 << 16  # elements of one run on a CPU: parameter, gradient and two buffers in float32 take 1 MiB


# -- checks ------------------------------------------------------------------------------------------------------------

def _number(name: str, value) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    return float(value)


def nonnegative(name: str, value) -> None:
    """`ValueError` unless value is a finite number >= 0."""
    if not 0.0 <= _number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def positive(name: str, value) -> None:
    """`ValueError` unless value is a finite number > 0."""
    if not 0.0 < _number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")


def fraction(name: str, value) -> None:
    """`ValueError` unless value lies in [0, 1): the decay rate of a moving average."""
    if not 0.0 <= _number(name, value) < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def fractions(n: int) -> Callable[[str, object], None]:
    """The check for a tuple of `n` decay rates."""
    def check(name, value):
        if not isinstance(value, (tuple, list)) or len(value) != n:
            raise ValueError(f"{name} must be {n} numbers in [0, 1), got {value!r}")
        for i, beta in enumerate(value):
            fraction(f"{name}[{i}]", beta)
    return check


def count(name: str, value) -> None:
    """`ValueError` unless value is an int >= 0: a number of rounds or steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value!r}")


def flag(name: str, value) -> None:
    """`TypeError` unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


CHECKS = {"lr": nonnegative, "weight_decay": nonnegative, "eps": nonnegative, "momentum": fraction,
          "betas": fractions(2), "maximize": flag, "amsgrad": flag, "nesterov": flag}


# -- pieces of an update -----------------------------------------------------------------------------------------------

def bias_correction(beta: float, step: int) -> float:
    """1 - beta^step: the weight that an average started at zero has gathered after `step` updates."""
    return 1.0 - beta ** step


def average_(averages: Tensors, values: Tensors, beta: float) -> None:
    """averages <- beta * averages + (1 - beta) * values, in place."""
    torch._foreach_lerp_(averages, values, 1.0 - beta)


def decay_(params: Tensors, lr: float, weight_decay: float) -> None:
    """Decoupled decay, params <- (1 - lr * weight_decay) * params, in place."""
    if weight_decay != 0.0:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)


def coupled(params: Tensors, grads: Tensors, weight_decay: float) -> Tensors:
    """The gradients of loss + weight_decay / 2 * |params|^2, as new tensors (the same ones without decay)."""
    return torch._foreach_add(grads, params, alpha=weight_decay) if weight_decay != 0.0 else grads


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that any torch optimizer holds in its state (counted, not quoted)."""
    return sum(v.numel() * v.element_size() for state in optimizer.state.values()
               for v in state.values() if isinstance(v, torch.Tensor))


@dataclass(frozen=True)
class Batch:
    """Tensors of one group that share device, dtype and step count; `step` is 1 in a parameter's first update."""

    params: Tensors
    grads: Tensors
    state: dict[str, Tensors]  # one list for each name in `buffers(group)`, aligned with `params`
    step: int


class Optimizer(torch.optim.Optimizer):
    """A drop-in `torch.optim.Optimizer` whose subclass gives `buffers` and `update`, and `checks` for its own options."""

    checks: dict[str, Callable[[str, object], None]] = {}

    def __init__(self, params, **defaults):
        self._check_options(defaults)
        super().__init__(params, defaults)

    # -- what a subclass writes

    def buffers(self, group: dict) -> tuple[str, ...]:
        """Names of the tensors kept for each parameter of the group."""
        raise NotImplementedError

    def start(self, name: str, param: torch.Tensor, grad: torch.Tensor, group: dict) -> torch.Tensor:
        """First value of a buffer: zeros, unless the method says otherwise."""
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def update(self, batch: Batch, group: dict) -> None:
        """Move `batch.params` in place. Called under `no_grad`, with `maximize` already applied to `batch.grads`."""
        raise NotImplementedError

    def check(self, group: dict) -> None:
        """Checks that concern several options, or options and parameters; raises before anything has changed."""

    # -- what torch and the training loop call

    def add_param_group(self, param_group: dict) -> None:
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        group = {**self.defaults, **param_group, "params": params}
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        for p in tensors:
            if isinstance(p, torch.Tensor) and (not p.is_floating_point() or p.layout != torch.strided):
                raise TypeError(f"params must be dense real floating-point tensors, got {p.dtype} with {p.layout}")
        self._check_options(group)
        self.check({**group, "params": tensors})
        super().add_param_group({**param_group, "params": params})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns what `closure` returns, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_options(group)
            self.check(group)
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise TypeError(f"gradients must be dense, got {p.grad.layout} for a parameter of shape "
                                    f"{tuple(p.shape)}: use torch.optim.SparseAdam")
        for group in self.param_groups:
            options = {**group, "lr": float(group["lr"])} if "lr" in group else group
            for batch in self._batches(group):
                self.update(batch, options)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but a buffer keeps the dtype it was saved with (torch casts it to the parameter's)."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, torch.Tensor) and self.state[p][name].dtype != value.dtype:
                        self.state[p][name] = value.to(p.device, copy=True)

    # -- gathering

    def _check_options(self, options: dict) -> None:
        for name, check in {**CHECKS, **self.checks}.items():
            if name in options:
                check(name, options[name])

    def _batches(self, group: dict) -> Iterator[Batch]:
        names = self.buffers(group)
        batches: dict[tuple, tuple[Tensors, Tensors, list[dict]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            for name in names:
                if name not in state:
                    state[name] = self.start(name, p, p.grad, group)
            state["step"] = state.get("step", 0) + 1
            params, grads, states = batches.setdefault((p.device, p.dtype, state["step"]), ([], [], []))
            params.append(p)
            grads.append(p.grad)
            states.append(state)
        for (device, _, step), (params, grads, states) in batches.items():
            for run in _runs(params) if device.type == "cpu" else [slice(None)]:
                run_grads = torch._foreach_neg(grads[run]) if group.get("maximize") else grads[run]
                yield Batch(params[run], run_grads, {n: [s[n] for s in states[run]] for n in names}, step)


def _runs(params: Tensors) -> Iterator[slice]:
    """Slices of the list, each of about CACHE_ELEMENTS elements (a larger tensor stands alone)."""
    begin = size = 0
    for end, p in enumerate(params):
        if size and size + p.numel() > CACHE_ELEMENTS:
            yield slice(begin, end)
            begin, size = end, 0
        size += p.numel()
    yield slice(begin, len(params))
