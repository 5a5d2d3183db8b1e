"""A logistic regression as a decoupled job, for tests with and without processes."""

import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax import decoupled

FEATURES, BATCH, EVERY = 20, 8, 4


def data(count=512, seed=0):
    """Returns inputs and labels of a logistic regression."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, FEATURES)).astype(np.float32)
    noise = rng.normal(size=count)
    labels = np.sign(inputs @ np.linspace(-1, 1, FEATURES) + noise)
    return inputs, labels.astype(np.float32)


def loss_fn(params, batch):
    """Returns the logistic loss with regularisation."""
    inputs, labels = batch
    margins = labels * (inputs @ params["w"] + params["b"])
    return jnp.mean(jnp.logaddexp(0, -margins)) + 0.01 * jnp.sum(params["w"] ** 2)


def algorithm():
    """Returns local SGD on the logistic regression."""
    return lsgd.local_sgd(loss_fn, optax.sgd(0.1), rule=lsgd.average())


def initial_params():
    """Returns the parameters at the start."""
    return {"w": jnp.zeros(FEATURES), "b": jnp.zeros(())}


def batches(learner, start):
    """Yields batches of one worker from batch `start` of the job on."""
    del learner
    return lsgd.shuffled_batches(data(), 1, BATCH, examples_seen=start * BATCH)


def make_job(**changes):
    """Returns the job, with some arguments replaced."""
    arguments = {"every": EVERY, "steps": 160, "merge": decoupled.immediate()}
    arguments |= {"batches": batches, "params": initial_params()} | changes
    return decoupled.Job(algorithm(), **arguments)


def full_loss(params):
    """Returns the loss on all examples."""
    return float(loss_fn(params, data()))
