"""Problems, batches and event traces of the asynchronous tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness.reference_sgd import quadratic_loss, step_size

import localsgd_jax as lsgd
from localsgd_jax import asynchronous

DIMENSION, BATCH = 5, 3


def linear_loss(x, batch):
    """A linear loss: its gradient is the batch, independent of x."""
    return jnp.sum(x * batch)


def make_algorithm(loss_fn, optimizer=None):
    """Local SGD with the step sizes of the reference unless given an optimizer."""
    optimizer = optimizer or optax.sgd(step_size)
    return lsgd.local_sgd(loss_fn, optimizer, rule=lsgd.average())


def gaussian_batches(steps, workers, seed=0):
    """Rows and labels ±1, float64, with leaves (T, K, B, ...)."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(steps, workers, BATCH, DIMENSION)),
        np.sign(rng.normal(size=(steps, workers, BATCH))),
    )


def float32_batches(steps, workers):
    """The Gaussian batches in float32."""
    return jax.tree.map(np.float32, gaussian_batches(steps, workers))


def host_batches(steps, workers=4):
    """The float32 batches as a list over time, as `run` of threads takes them."""
    return list(zip(*float32_batches(steps, workers), strict=True))


def integer_batches(steps, workers):
    """Small integers; float32 sums quarters of them without rounding."""
    rng = np.random.default_rng(5)
    return rng.integers(-8, 9, (steps, workers, 3)).astype(np.float32)


@functools.cache
def thread_cluster(loss_fn=quadratic_loss, rate=step_size, workers=4):
    """Threads that are compiled once for all tests of a process."""
    algorithm = make_algorithm(loss_fn, optax.sgd(rate))
    return asynchronous.on_threads(algorithm, jax.devices()[:workers])


def random_rates(seed, steps=12, workers=4):
    """Uniform numbers in [0.3, 3), (T, K)."""
    return np.random.default_rng(seed).uniform(0.3, 3, (steps, workers))


# Arguments of `simulate_events` for four workers.
TRACES = {
    "equal": dict(steps=12, schedule=3),
    "one slow": dict(steps=12, schedule=3, speed=[1, 1, 1, 0.25]),
    "all delayed": dict(steps=12, schedule=3, delay=2.0),
    "delay above period": dict(steps=12, schedule=2, delay=5.0),
    "delayed and slow": dict(
        steps=12, schedule=4, speed=[3, 1, 2, 1], delay=[0, 4, 1, 2]
    ),
    "schedules per worker": dict(
        steps=12,
        schedule=[1, lsgd.at_steps([2, 7]), lsgd.geometric(8), lsgd.never()],
        delay=0.5,
    ),
    "steps per worker": dict(steps=[12, 3, 7, 1], schedule=2, speed=[12, 3, 7, 1]),
    "random speeds": dict(steps=12, schedule=3, speed=random_rates(0), delay=1.0),
    "random": dict(
        steps=12, schedule=[2, 3, 4, 5], speed=random_rates(1), delay=random_rates(2)
    ),
    "random, long delay": dict(
        steps=12, schedule=1, speed=random_rates(3), delay=9 * random_rates(4)
    ),
}
