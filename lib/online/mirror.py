"""Mirror steps on the nonnegative orthant: argmin_{mu >= 0} <g, mu> + V_h(mu, mu_t) / lr for two reference functions h.

A step acts on the last axis only through its entries, so any batch of problems may stand before it.
"""
import numpy as np

_MAX_EXPONENT = 50.0        # exp(50) is 5e21: far beyond any price, far below overflow when steps multiply


def euclidean_step(mu, grad, lr):
    """h = ||mu||^2 / 2: a projected gradient step, [mu - lr g]_+.  (..., m), (..., m) -> (..., m)"""
    return np.maximum(mu - lr * grad, 0.0)


def entropy_step(mu, grad, lr):
    """h = sum mu log mu: a multiplicative step, mu exp(-lr g); zero stays zero.  (..., m), (..., m) -> (..., m)"""
    return mu * np.exp(np.clip(-lr * grad, -_MAX_EXPONENT, _MAX_EXPONENT))


REFERENCES = {"euclidean": euclidean_step, "entropy": entropy_step}
