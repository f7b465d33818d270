"""Online allocation: requests, what hindsight could have earned, and the inputs on which algorithms are compared.

| symbol | name | shape |
|---|---|---|
| f_t | `rewards` | (..., T, A) reward of each action; doing nothing is always possible, earns 0 and costs 0 |
| b_t | `costs` | (..., T, A, m) what each action takes of each resource |
| rho | `rho` | (m,) budget per request; the whole budget is T rho |
| mu | `mu` | (..., m) price of each resource |
"""
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linprog


@dataclass(frozen=True)
class Requests:
    """A sequence of T requests (a batch of sequences, if there are leading axes). Raises ValueError for NaN or negative costs."""
    rewards: np.ndarray
    costs: np.ndarray

    def __post_init__(self):
        if self.costs.ndim < 3 or self.rewards.shape != self.costs.shape[:-1]:
            raise ValueError(f"costs has shape {self.costs.shape}, rewards {self.rewards.shape}: expected (..., T, A, m) and (..., T, A)")
        if not np.isfinite(self.rewards).all():
            raise ValueError("rewards contains NaN or infinity: expected finite numbers")
        if not (np.isfinite(self.costs).all() and (self.costs >= 0).all()):
            raise ValueError("costs contains negative numbers, NaN or infinity: expected finite numbers >= 0")

    @property
    def horizon(self) -> int:
        return self.rewards.shape[-2]

    def __getitem__(self, batch) -> "Requests":
        """One sequence of a batch."""
        return Requests(self.rewards[batch], self.costs[batch])


def dual_value(requests: Requests, rho, mu):
    """D(mu) = sum_t max(0, max_a f - mu b) + T rho mu: for every mu >= 0 an upper bound of what hindsight can earn.  (...,)"""
    mu = np.asarray(mu, float)
    surplus = requests.rewards - np.einsum("...tam,...m->...ta", requests.costs, mu)
    return surplus.max(axis=-1).clip(min=0).sum(axis=-1) + requests.horizon * (mu @ np.asarray(rho, float))


def hindsight(requests: Requests, rho):
    """(value, prices) of the linear program that knows all requests of one sequence: sum_a x_ta <= 1, sum_t b x <= T rho, x >= 0.

    The value is at least that of any integral choice; the prices, (m,), are the optimal dual multipliers. Raises RuntimeError if the solver fails.
    """
    T, A, m = requests.costs.shape
    once = sparse.kron(sparse.eye(T), np.ones((1, A)))
    spend = sparse.csr_matrix(requests.costs.reshape(T * A, m).T)
    result = linprog(-requests.rewards.ravel(), A_ub=sparse.vstack([once, spend], format="csr"),
                     b_ub=np.concatenate([np.ones(T), T * np.asarray(rho, float)]), method="highs")
    if result.status:
        raise RuntimeError(f"linear program failed: {result.message}")
    return -result.fun, np.maximum(-result.ineqlin.marginals[T:], 0.0)


def competitive_ratio(requests: Requests, rho) -> float:
    """alpha = max(1, max b / rho): the paper's guarantee under adversarial input is a share 1 / alpha of hindsight's reward."""
    return max(1.0, float((requests.costs / np.asarray(rho, float)).max()))


def _uniform(rng, batch, horizon, actions, resources):
    rewards = rng.random((batch, horizon, actions))
    costs = rng.random((batch, horizon, actions, resources)) * (rng.random((batch, horizon, actions, resources)) < 0.5)
    return rewards, costs


def iid_requests(rng, batch, horizon, actions=4, resources=5) -> Requests:
    """Independent requests: rewards uniform on [0, 1], each cost uniform on [0, 1] with probability 1/2 and 0 otherwise."""
    return Requests(*_uniform(rng, batch, horizon, actions, resources))


def periodic_requests(rng, batch, horizon, period=50, depth=1.0, actions=4, resources=5) -> Requests:
    """As `iid_requests`, with rewards scaled by (1 + depth sin(2 pi t / period - pi/2)) / (1 + depth): seasons, the cheap one first. depth in [0, 1]; 0 is i.i.d."""
    rewards, costs = _uniform(rng, batch, horizon, actions, resources)
    season = np.sin(2 * np.pi * np.arange(horizon) / period - np.pi / 2)
    return Requests(rewards * ((1 + depth * season) / (1 + depth))[:, None], costs)


def corrupted_requests(rng, batch, horizon, corrupted, factor=0.2, actions=4, resources=5) -> Requests:
    """As `iid_requests`, but an adversary has scaled the rewards of the first `corrupted` requests by `factor`."""
    rewards, costs = _uniform(rng, batch, horizon, actions, resources)
    return Requests(np.where(np.arange(horizon)[:, None] < corrupted, factor, 1.0) * rewards, costs)


def escalating_requests(horizon, alpha, phases, growth) -> Requests:
    """An adversary's input: `phases` blocks of T / alpha requests, each taking one unit of one resource (rho = 1 / alpha); rewards grow by `growth` from block to block,
    and after the last block nothing of value comes. Whoever knew would keep the whole budget for the last block.
    """
    block = np.arange(horizon) * alpha // horizon
    rewards = np.where(block < phases, float(growth) ** np.minimum(block, phases), 0.0)
    return Requests(rewards[:, None] / rewards.max(), np.ones((horizon, 1, 1)))
