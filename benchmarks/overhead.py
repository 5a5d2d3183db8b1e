"""Overhead of a round: H local steps and a synchronisation over the H local steps.

K = 8 workers, H = 16, on 2 and on 8 CPU devices. Target: at most 1.03 for the MLP and
the GPT.
"""

import jax
import numpy as np
import optax

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.reporting import FigureSpec
from benchmarks.timing import make_stepper, time_interleaved

DEVICES = (2, 8)
FIGURE = FigureSpec("ratio", ("model", "devices"), "round / its local steps", 1.03)
WORKERS = 8


def candidates(model: models.Model, devices: int, period: int) -> dict:
    """Returns a stepper of the round and one of its local steps alone."""
    mesh = jax.make_mesh((devices,), ("worker",), devices=jax.devices()[:devices])
    algorithm = lsgd.local_sgd(model.loss, optax.sgd(1e-3), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh, workers=WORKERS)
    batches = jax.tree.map(
        lambda x: np.broadcast_to(x, (period, WORKERS, *x.shape)), model.batch
    )
    batches = cluster.shard_batch(batches, time=True)

    def steps(state, batches):
        return jax.lax.scan(cluster.step, state, batches)

    def stepper(function):
        call = jax.jit(function, donate_argnums=0)
        return make_stepper(call, [cluster.init(model.params)], [batches])

    return {"round": stepper(lsgd.fused(cluster)), "steps": stepper(steps)}


def run(devices: int, tiny: bool) -> list[dict]:
    period = 2 if tiny else 16
    chosen = (
        [models.logistic(8), models.mlp(8), models.gpt(8, 1, 2, 16, 4)]
        if tiny
        else [models.logistic(), models.mlp(), models.gpt(length=32)]
    )
    rows = []
    for model in chosen:
        times, ratio = time_interleaved(
            candidates(model, devices, period),
            repeats=1 if tiny else 5,
            min_seconds=0 if tiny else 0.05,
        )
        rows.append(
            {
                "devices": devices,
                "model": model.name,
                "parameters": model.size,
                "round ms": 1e3 * times["round"].median,
                "steps ms": 1e3 * times["steps"].median,
                "ratio": ratio,
            }
        )
    return rows
