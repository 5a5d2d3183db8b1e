"""The library agrees with an independent float64 Algorithm 1, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twin
from cases import mesh

import localsgd_jax as lsgd

STEPS, DIMENSION, BATCH = 17, 5, 3


def quadratic_loss(x, batch):
    rows, targets = batch
    return 0.5 * jnp.mean((rows @ x - targets) ** 2)


def logistic_loss(x, batch, decay=0.01):
    rows, labels = batch
    return jnp.mean(jnp.logaddexp(0, -labels * (rows @ x))) + decay / 2 * x @ x


PROBLEMS = {
    "quadratic": (quadratic_loss, twin.quadratic_gradient),
    "logistic": (logistic_loss, twin.logistic_gradient),
}


def eta(t):
    return 0.4 / (1 + 0.1 * t)


def data(workers):
    rng = np.random.default_rng(workers)
    return [
        (
            rng.normal(size=(workers, BATCH, DIMENSION)),
            np.sign(rng.normal(size=(workers, BATCH))),
        )
        for _ in range(STEPS)
    ]


@functools.cache
def cluster(problem, workers, place):
    made = lsgd.local_sgd(PROBLEMS[problem][0], optax.sgd(eta), rule=lsgd.average())
    if place == "simulate":
        return lsgd.simulate(made, workers)
    return lsgd.on_mesh(made, mesh(worker=workers))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("workers", [1, 4, 8])
@pytest.mark.parametrize(
    "schedule",
    [
        lsgd.every(1),
        lsgd.every(3),
        lsgd.every(8),
        lsgd.never(),
        lsgd.at([2, 3, 7, 16]),
        lsgd.post_local(4, 5),
        lsgd.growing(4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", ["simulate", "mesh"])
def test_step_by_step(problem, workers, schedule, place):
    start = np.linspace(-1, 1, DIMENSION)
    expected = twin.local_sgd(
        PROBLEMS[problem][1], start, data(workers), eta, set(schedule.steps(STEPS))
    )
    with jax.enable_x64(True):
        verbs = cluster(problem, workers, place)
        state = verbs.init(start)
        for t, batch in enumerate(data(workers)):
            state, _ = verbs.step(state, batch)
            if schedule(t + 1):
                state = verbs.sync(state)
            np.testing.assert_allclose(
                state.workers.params, expected[t + 1], rtol=1e-12, atol=1e-12
            )
    assert int(state.round) == len(schedule.steps(STEPS))
