"""The federated round: who is there works locally, all at once, and a server adds up what they send.

One array axis stands for the clients, so a round costs the same few numpy calls for ten clients as for a thousand.
The parts are exchangeable: a problem (`problems.py`), a table of who is present (`participation.py`), a local solver
(`LocalSGD`) and a server rule (an `Aggregator`). Floats sent and floats stored are counted.

    symbol          name        shape
    N, d            n_clients   int, int (dim)
    x_t             x           (dim,)                 the global model
    I_t^n           present     (rounds, n_clients)    who takes part
    Delta_t^n       deltas      (n_present, dim)       local result minus x_t, one row for each present client
    gamma, eta      lr          float (LocalSGD), server_lr of `run`
"""
from dataclasses import dataclass

import numpy as np

from lib.federated.participation import checked_probabilities


@dataclass(frozen=True)
class LocalSGD:
    """Plain local gradient steps: from the global model, `steps` times y <- y - lr * gradient."""

    lr: float
    steps: int = 1

    def __post_init__(self):
        if not 0.0 < self.lr < np.inf:
            raise ValueError(f"lr must be finite and > 0, got {self.lr!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, (int, np.integer)) or self.steps < 1:
            raise ValueError(f"steps must be an integer >= 1, got {self.steps!r}")

    def __call__(self, problem, x, clients, rng) -> np.ndarray:
        y = np.repeat(x[None, :], len(clients), axis=0)  # (n_present, dim)
        for _ in range(self.steps):
            y -= self.lr * problem.gradient(y, clients, rng)
        return y - x


class Aggregator:
    """A server rule. `aggregate` checks what arrives, before anything changes, and returns the step of the global model."""

    def __init__(self, n_clients: int, dim: int):
        for name, value in (("n_clients", n_clients), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.n_clients, self.dim = int(n_clients), int(dim)

    def aggregate(self, deltas, clients) -> np.ndarray:
        """The step (dim,) from the updates `deltas` (n_present, dim) of the clients numbered `clients` (n_present,).

        A round without clients is a round: both are empty, and rules that count rounds count it.
        Raises ValueError or TypeError for unknown or repeated clients, other shapes, and updates that are not finite.
        """
        clients = np.asarray(clients)
        if clients.size == 0:
            clients = clients.astype(int)
        if not np.issubdtype(clients.dtype, np.integer):
            raise TypeError(f"clients must be integers, got {clients.dtype}")
        if clients.ndim != 1 or len(np.unique(clients)) != len(clients):
            raise ValueError(f"clients must be a list without repetitions, got {clients}")
        if len(clients) and not 0 <= clients.min() <= clients.max() < self.n_clients:
            raise ValueError(f"clients must lie in 0..{self.n_clients - 1}, got {clients.min()}..{clients.max()}")
        deltas = np.asarray(deltas, dtype=float)
        if deltas.shape != (len(clients), self.dim):
            raise ValueError(f"deltas must have shape {(len(clients), self.dim)}, got {deltas.shape}")
        if not np.isfinite(deltas).all():
            bad = clients[~np.isfinite(deltas).all(axis=1)]
            raise ValueError(f"deltas must be finite, got NaN or infinity from client {bad[0]}")
        return self.combine(deltas, clients)

    def combine(self, deltas: np.ndarray, clients: np.ndarray) -> np.ndarray:
        """The rule itself, on checked input."""
        raise NotImplementedError

    @property
    def memory_floats(self) -> int:
        """Numbers that the rule keeps between rounds, on the server and on the clients together."""
        return 0


class AverageParticipating(Aggregator):
    """FedAvg as it is mostly run: the mean over those who came."""

    def combine(self, deltas, clients):
        return deltas.mean(axis=0) if len(clients) else np.zeros(self.dim)


class AverageAll(Aggregator):
    """The sum over those who came, divided by all N: an absent client counts as an update of zero."""

    def combine(self, deltas, clients):
        return deltas.sum(axis=0) / self.n_clients


class KnownProbabilities(Aggregator):
    """The oracle: updates divided by the true probabilities, then by N. Its expected step is the full average."""

    def __init__(self, p, dim: int):
        self.p = checked_probabilities(p)
        super().__init__(self.p.size, dim)

    def combine(self, deltas, clients):
        return (1.0 / self.p[clients]) @ deltas / self.n_clients

    @property
    def memory_floats(self):
        return self.n_clients


class _Stored(Aggregator):
    """Rules that keep every client's last update, zero before its first."""

    def __init__(self, n_clients, dim):
        super().__init__(n_clients, dim)
        self.last = np.zeros((self.n_clients, self.dim))

    @property
    def memory_floats(self):
        return self.last.size


class MIFA(_Stored):
    """The mean of all clients' last updates, however old."""

    def combine(self, deltas, clients):
        self.last[clients] = deltas
        return self.last.mean(axis=0)


class FedVARP(_Stored):
    """The mean of the last updates, corrected by the mean change that those who came report.

    The stored mean is the one before the round. A round without clients makes no step.
    """

    def combine(self, deltas, clients):
        if not len(clients):
            return np.zeros(self.dim)
        step = (deltas - self.last[clients]).mean(axis=0) + self.last.mean(axis=0)
        self.last[clients] = deltas
        return step


@dataclass(frozen=True)
class Run:
    """What a run leaves: the models x_0 .. x_T, and what was sent and kept on the way."""

    x: np.ndarray  # (rounds + 1, dim)
    floats_down: int  # models sent to clients
    floats_up: int  # updates sent to the server
    memory_floats: int  # kept between rounds by the server rule


def run(problem, solver, server: Aggregator, present, x0, rng: np.random.Generator, server_lr: float = 1.0) -> Run:
    """Rounds of federated learning: x <- x + server_lr * server.aggregate(solver(problem, x, who is present)).

    present: (rounds, n_clients) of bool. The same table and a generator in the same state give two server rules the
    same clients and the same noise. Raises ValueError before the first round if the parts do not fit together.
    """
    present, x = np.asarray(present), np.array(x0, dtype=float)
    if present.dtype != bool or present.ndim != 2 or present.shape[1] != problem.n_clients:
        raise ValueError(f"present must be bool with shape (rounds, {problem.n_clients}), got {present.dtype} {present.shape}")
    if x.shape != (problem.dim,) or not np.isfinite(x).all():
        raise ValueError(f"x0 must be finite with shape {(problem.dim,)}, got {x0!r}")
    if (server.n_clients, server.dim) != (problem.n_clients, problem.dim):
        raise ValueError(f"server must be made for {problem.n_clients} clients and dim {problem.dim}, got "
                         f"{server.n_clients} and {server.dim}")
    if not 0.0 < server_lr < np.inf:
        raise ValueError(f"server_lr must be finite and > 0, got {server_lr!r}")
    path = np.empty((len(present) + 1, problem.dim))
    path[0] = x
    for t, row in enumerate(present):
        clients = np.flatnonzero(row)
        path[t + 1] = path[t] + server_lr * server.aggregate(solver(problem, path[t], clients, rng), clients)
    sent = int(present.sum()) * problem.dim
    return Run(path, floats_down=sent, floats_up=sent, memory_floats=server.memory_floats)
