"""Synchronisation of plain arrays, for comparisons of rules with NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import mesh

import localsgd_jax as lsgd

K, N = 4, 37  # Workers, and numbers per worker.
WEIGHTS = [
    np.array([1, 2, 0, 0.5]),
    np.array([0, 1, 1, 1]),
    np.array([1.0, 1, 1, 1]),
    np.array([3.0, 0, 0, 1]),
]
with_and_without_weights = pytest.mark.parametrize(
    "weights", [None, WEIGHTS], ids=["equal", "weighted"]
)


def set_params_algorithm(rule):
    """Returns an algorithm that replaces the parameters by the batch in each step."""
    return lsgd.from_train_step(lambda s, batch: ({"params": batch}, {}), rule)


def on_two_devices(algorithm):
    """Places K workers on a mesh of two devices."""
    return lsgd.on_mesh(algorithm, mesh(worker=2), workers=K)


def sync_arrays(rule, rounds, weights=None, start=None, placement=None):
    """Synchronises one `(K, N)` array per round.

    Args:
      rule: the rule.
      rounds: trees of the workers before each synchronisation, `(rounds, K, N)`.
      weights: one vector of weights per round, or None.
      start: initial parameters, `(N,)`; zeros by default.
      placement: from an algorithm to a cluster; `simulate` by default.

    Returns:
      The arrays after each synchronisation, `(rounds, K, N)`, and the last state.
    """
    rounds = np.asarray(rounds, np.float32)
    placement = placement or (lambda made: lsgd.simulate(made, rounds.shape[1]))
    cluster = placement(set_params_algorithm(rule))
    start = np.zeros(rounds.shape[2:]) if start is None else start
    state, results = cluster.init({"params": jnp.asarray(start, jnp.float32)}), []
    for i, values in enumerate(rounds):
        state, _ = cluster.step(state, values)
        state = cluster.sync(state, None if weights is None else weights[i])
        results.append(np.asarray(state.workers["params"]))
    return np.array(results), state


def random_rounds(rounds=4, workers=K, seed=0):
    """Returns normal numbers, `(rounds, workers, N)`."""
    return np.random.default_rng(seed).normal(size=(rounds, workers, N))


def weights_of_round(weights, i):
    """Returns the weights of round i, ones by default."""
    return np.ones(K) if weights is None else weights[i]


def weighted_mean(x, w):
    """Returns the weighted mean over the first axis."""
    return np.tensordot(w, x, 1) / w.sum()


def sync_tree(rule, tree=None, workers=K):
    """Initialises a cluster with a tree and synchronises it once."""
    tree = {"w": jnp.zeros(3)} if tree is None else tree
    cluster = lsgd.simulate(set_params_algorithm(rule), workers)
    return cluster.sync(cluster.init({"params": tree}))
