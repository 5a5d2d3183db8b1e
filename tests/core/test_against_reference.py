"""Local SGD against an independent float64 implementation of Algorithm 1."""

import functools

import jax
import numpy as np
import optax
import pytest
from harness import reference_sgd
from harness.cases import mesh
from harness.reference_sgd import step_size
from harness.selection import in_full, keep

import localsgd_jax as lsgd

STEPS, DIMENSION, BATCH = 17, 5, 3
PROBLEMS = {
    "quadratic": (reference_sgd.quadratic_loss, reference_sgd.quadratic_gradient),
    "logistic": (reference_sgd.logistic_loss, reference_sgd.logistic_gradient),
}
SCHEDULES = [
    lsgd.every(1),
    lsgd.every(3),
    lsgd.every(8),
    lsgd.never(),
    lsgd.at_steps([2, 3, 7, 16]),
    lsgd.post_local(4, 5),
    lsgd.geometric(4),
]
FAST_SCHEDULES = ("every(3)", "never()", "at_steps([2, 3, 7, 16])")


def random_batches(workers):
    rng = np.random.default_rng(workers)
    return [
        (
            rng.normal(size=(workers, BATCH, DIMENSION)),
            np.sign(rng.normal(size=(workers, BATCH))),
        )
        for _ in range(STEPS)
    ]


@functools.cache
def cluster_of(problem, workers, placement):
    loss_fn, _ = PROBLEMS[problem]
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(step_size), rule=lsgd.average())
    if placement == "simulate":
        return lsgd.simulate(algorithm, workers)
    return lsgd.on_mesh(algorithm, mesh(worker=workers))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("workers", [1, 4, in_full(8)])
@pytest.mark.parametrize(
    "schedule", keep(SCHEDULES, lambda s: repr(s) in FAST_SCHEDULES), ids=repr
)
@pytest.mark.parametrize("placement", ["simulate", "mesh"])
def test_iterates_match_the_reference(problem, workers, schedule, placement):
    x0, batches = np.linspace(-1, 1, DIMENSION), random_batches(workers)
    gradient, due = PROBLEMS[problem][1], set(schedule.steps(STEPS))
    expected = reference_sgd.reference_local_sgd(gradient, x0, batches, step_size, due)
    with jax.enable_x64(True):
        cluster = cluster_of(problem, workers, placement)
        state = cluster.init(x0)
        for t, batch in enumerate(batches):
            state, _ = cluster.step(state, batch)
            if schedule(t + 1):
                state = cluster.sync(state)
            np.testing.assert_allclose(
                state.workers.params, expected[t + 1], rtol=1e-12, atol=1e-12
            )
    assert int(state.round) == len(due)
