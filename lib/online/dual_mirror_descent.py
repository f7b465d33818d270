"""The Best of Many Worlds: Dual Mirror Descent for Online Allocation Problems (2020, arXiv:2011.10124).

Requests come one by one; each is answered at once, from budgets that must last. DualMirrorDescent prices the resources, takes the action with the largest reward net of prices,
and moves the prices by mirror descent on the dual: up when it wanted more than the per-request budget, down when it wanted less.

| symbol | name | shape |
|---|---|---|
| rho, T | `rho`, `horizon` | (m,) budget per request, number of requests |
| mu_t | `mu` | (..., m) prices |
| B_t | `budget` | (..., m) what is left |
| eta | `lr` | step size; 1 / sqrt(T) by default |
| h | `reference` | 'euclidean' (dual subgradient descent) or 'entropy' (multiplicative weights) |

Deviations from the paper: ties between actions go to the one that consumes least in sum; the exponent of the entropy step is capped at 50.
Cost: one argmax over the actions and O(m) a request. Leading axes run many sequences side by side.
"""
import math
from dataclasses import dataclass

import numpy as np

from .allocation import Requests
from .mirror import REFERENCES

VOID = -1                       # the action that earns nothing and costs nothing


@dataclass(frozen=True)
class Allocation:
    """What was done with a sequence: actions (..., T) with VOID = -1, reward (...,), spent (..., m), the prices before each request (..., T, m), and what was left (..., T, m)."""
    actions: np.ndarray
    reward: np.ndarray
    spent: np.ndarray
    prices: np.ndarray
    left: np.ndarray


def choose(rewards, costs, mu):
    """argmax_a f(a) - mu b(a), with the void action at 0; ties go to the smaller consumption.  (..., A), (..., A, m), (..., m) -> (...,)"""
    value = rewards - np.einsum("...am,...m->...a", costs, mu)                       # Alg. 1: reward net of prices
    best = value.max(axis=-1, keepdims=True)
    cheapest = np.where(value == best, costs.sum(axis=-1), np.inf).argmin(axis=-1)
    return np.where(best[..., 0] > 0, cheapest, VOID)


class DualMirrorDescent:
    """Answers requests online.

    rho: (m,) > 0, budget of each resource per request; horizon: number of requests T >= 1; lr: step size >= 0 (0 keeps the prices fixed: a static bid price, or greedy with mu=0);
    mu: first prices, >= 0 (default 0, or 1 for the entropy reference, which needs > 0); batch: leading shape. Raises ValueError naming the argument.
    """

    def __init__(self, rho, horizon, lr=None, reference="euclidean", mu=None, batch=()):
        rho = np.atleast_1d(np.asarray(rho, float))
        if rho.ndim != 1 or rho.size == 0 or not (np.isfinite(rho).all() and (rho > 0).all()):
            raise ValueError(f"rho={rho}: expected (m,) finite numbers > 0")
        if isinstance(horizon, bool) or not isinstance(horizon, (int, np.integer)) or horizon < 1:
            raise ValueError(f"horizon={horizon!r}: expected an integer >= 1")
        if reference not in REFERENCES:
            raise ValueError(f"reference={reference!r}: expected one of {sorted(REFERENCES)}")
        lr = 1 / math.sqrt(horizon) if lr is None else lr
        if not (np.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr={lr!r}: expected a finite number >= 0")
        mu = (1.0 if reference == "entropy" else 0.0) if mu is None else np.asarray(mu, float)
        if not np.isfinite(mu).all() or np.min(mu) < 0 or (reference == "entropy" and lr > 0 and np.min(mu) == 0):
            raise ValueError(f"mu={mu}: expected finite prices >= 0 (> 0 for the entropy reference, whose step would never leave 0)")
        self.rho, self.horizon, self.lr, self.step_prices = rho, int(horizon), float(lr), REFERENCES[reference]
        self.mu = np.broadcast_to(mu, (*batch, len(rho))).copy()
        self.budget = np.broadcast_to(horizon * rho, (*batch, len(rho))).copy()
        self.t = 0

    def act(self, rewards, costs):
        """Answer one request.  rewards (..., A), costs (..., A, m) >= 0 -> action (...,), VOID = -1.

        Raises ValueError (and changes nothing) for wrong shapes, NaN or negative costs, or after the horizon.
        """
        rewards, costs = np.asarray(rewards, float), np.asarray(costs, float)
        if costs.shape != (*rewards.shape, len(self.rho)) or rewards.shape[:-1] != self.mu.shape[:-1]:
            raise ValueError(f"rewards has shape {rewards.shape}, costs {costs.shape}: expected {(*self.mu.shape[:-1], 'A')} and one more axis of length {len(self.rho)}")
        if not np.isfinite(rewards).all() or not np.isfinite(costs).all() or costs.min(initial=0) < 0:
            raise ValueError("rewards or costs: expected finite numbers, costs >= 0")
        if self.t >= self.horizon:
            raise ValueError(f"request {self.t + 1} after the horizon of {self.horizon}")
        return self._answer(rewards, costs)[0]

    def _answer(self, rewards, costs):
        wish = choose(rewards, costs, self.mu)
        desired = np.where((wish >= 0)[..., None], np.take_along_axis(costs, np.maximum(wish, 0)[..., None, None], axis=-2)[..., 0, :], 0.0)
        fits = (desired <= self.budget).all(axis=-1)                                 # every resource, or nothing: no second-best action
        action = np.where(fits, wish, VOID)
        self.budget = self.budget - np.where(fits[..., None], desired, 0.0)
        grad = self.rho - desired                                                    # the *desired* action, also when it did not fit
        self.mu = self.step_prices(self.mu, grad, self.lr)
        self.t += 1
        return action, np.where(action >= 0, np.take_along_axis(rewards, np.maximum(action, 0)[..., None], axis=-1)[..., 0], 0.0)

    def run(self, requests: Requests) -> Allocation:
        """Answer a whole sequence (or a batch of them, side by side). Raises ValueError if it does not fit the horizon or the batch."""
        if requests.horizon != self.horizon - self.t or requests.costs.shape[-1] != len(self.rho) or requests.rewards.shape[:-2] != self.mu.shape[:-1]:
            raise ValueError(f"requests has rewards of shape {requests.rewards.shape} and {requests.costs.shape[-1]} resources: expected "
                             f"{(*self.mu.shape[:-1], self.horizon - self.t, 'A')} and {len(self.rho)}")
        start, earned, actions, prices, left = self.budget, [], [], [], []
        for t in range(requests.horizon):                                            # time is sequential; everything else is not
            prices.append(self.mu)
            action, reward = self._answer(requests.rewards[..., t, :], requests.costs[..., t, :, :])
            actions.append(action)
            earned.append(reward)
            left.append(self.budget)
        return Allocation(np.stack(actions, -1), np.sum(earned, axis=0), start - self.budget, np.stack(prices, -2), np.stack(left, -2))
