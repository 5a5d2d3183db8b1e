"""Smoothing for a single worker: SNOO and generalised primal averaging (GPA).

    python examples/gpa.py

trains a small network on the perturbed outputs of a random one, with AdamW alone, with
an outer Nesterov step after every 8 steps (`snoo`), and with GPA, which smooths after
every step: 1 minute on two cores. Expected: mean test losses over three seeds of 0.050,
0.056 and 0.040.

GPA keeps two sequences besides the point y at which gradients are taken:

    y = μ_y x + (1 − μ_y) z
    z ← z + optimizer(∇f(y))
    x ← μ_x x + (1 − μ_x) z

x is the model. With μ_x = 0.9^(1/H) its memory is that of an outer momentum of 0.9 with
period H; μ_x = 0 is the optimizer itself. It has no rounds and works for one worker
only, so it is an optax optimizer here and no synchronisation rule. The equations follow
a secondary description of arXiv:2512.17131.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd


class GpaState(NamedTuple):
    """State of `gpa`.

    Attributes:
      x: averaged iterate, the model to evaluate.
      z: iterate of the base optimizer.
      base: state of the base optimizer.
    """

    x: optax.Params
    z: optax.Params
    base: optax.OptState


def gpa(
    base: optax.GradientTransformation, period: int = 8, mu_y: float = 0.7
) -> optax.GradientTransformation:
    """Wraps an optimizer in generalised primal averaging; the parameters are y."""
    mu_x = 0.9 ** (1 / period)

    def init(params):
        return GpaState(params, params, base.init(params))

    def update(grads, state, params):
        updates, base_state = base.update(grads, state.base, params)
        z = optax.apply_updates(state.z, updates)
        x = interpolate(state.x, z, mu_x)
        y = interpolate(x, z, mu_y)
        return jax.tree.map(jnp.subtract, y, params), GpaState(x, z, base_state)

    return optax.GradientTransformation(init, update)


def interpolate(x: optax.Params, z: optax.Params, mu: float) -> optax.Params:
    """Returns μ x + (1 − μ) z."""
    return jax.tree.map(lambda x, z: mu * x + (1 - mu) * z, x, z)


def network(params: dict, inputs: jax.Array) -> jax.Array:
    """Applies a network with one hidden layer."""
    return jnp.tanh(inputs @ params["hidden"]) @ params["out"]


def loss_fn(params: dict, batch: tuple) -> jax.Array:
    """Returns the mean squared error."""
    inputs, targets = batch
    return jnp.mean((network(params, inputs) - targets) ** 2)


def make_params(rng: np.random.Generator, width: int) -> dict:
    """Returns random parameters."""
    hidden = rng.normal(size=(16, width)) / 4
    out = rng.normal(size=width) / np.sqrt(width)
    return jax.tree.map(np.float32, {"hidden": hidden, "out": out})


def run(
    optimizer: optax.GradientTransformation,
    rule: lsgd.SyncRule,
    model: Callable,
    seed: int,
    steps: int,
) -> float:
    """Trains one worker in rounds of eight steps and returns the test loss.

    Args:
      optimizer: inner optimizer.
      rule: rule for the parameters.
      model: from the train state of the worker to the parameters to evaluate.
      seed: of the data and of the initial parameters.
      steps: local steps.
    """
    rng = np.random.default_rng(seed)
    teacher = make_params(rng, 32)
    inputs = rng.normal(size=(6144, 16)).astype(np.float32)
    targets = np.asarray(network(teacher, inputs))
    labels = targets + rng.normal(size=targets.shape).astype(np.float32)
    cluster = lsgd.simulate(lsgd.local_sgd(loss_fn, optimizer, rule), workers=1)
    state, _ = lsgd.train(
        cluster,
        cluster.init(make_params(rng, 64)),
        lsgd.shuffled_batches((inputs[:4096], labels[:4096]), workers=1, batch=32),
        schedule=8,
        steps=steps,
        progress=False,
    )
    worker = jax.tree.map(lambda leaf: leaf[0], state.workers)
    return float(loss_fn(model(worker), (inputs[4096:], targets[4096:])))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints the test loss of the three methods and returns it by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=512, help="local steps")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    options = parser.parse_args(arguments)
    inner, none = optax.adamw(3e-3), lsgd.identity()
    methods = {
        "AdamW": (inner, none, lambda worker: worker.params),
        "SNOO": (inner, lsgd.snoo(), lambda worker: worker.params),
        "GPA": (gpa(inner), none, lambda worker: worker.opt_state.x),
    }
    losses = {}
    for name, method in methods.items():
        runs = [run(*method, seed, options.steps) for seed in range(options.seeds)]
        losses[name] = float(np.mean(runs))
        print(f"{name:>6} {losses[name]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
