"""The overhead of a round: H local steps and a synchronisation over H local steps.

K = 8 workers, H = 16, on 2 and on 8 CPU devices. Aim: at most 1.03 for the MLP and the
GPT.
"""

import jax
import numpy as np
import optax

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.record import Shown
from benchmarks.timing import alternate

DEVICES = (2, 8)
SHOWN = Shown("ratio", ("model", "devices"), "round / its steps alone", 1.03)
WORKERS = 8


def contestants(model: models.Model, devices: int, period: int) -> dict:
    """The round, and its steps alone: each gives back the state that it donates."""
    mesh = jax.make_mesh((devices,), ("worker",), devices=jax.devices()[:devices])
    made = lsgd.local_sgd(model.loss, optax.sgd(1e-3), rule=lsgd.average())
    cluster = lsgd.on_mesh(made, mesh, workers=WORKERS)
    batches = jax.tree.map(
        lambda x: np.broadcast_to(x, (period, WORKERS, *x.shape)), model.batch
    )
    batches = cluster.put(batches, time=True)

    def steps(state, batches):
        return jax.lax.scan(cluster.step, state, batches)

    def repeated(function):
        call = jax.jit(function, donate_argnums=0)
        held = [cluster.init(model.params)]

        def again():
            held[0], metrics = call(held[0], batches)
            return held[0], metrics

        return again

    return {"round": repeated(lsgd.fused(cluster)), "steps": repeated(steps)}


def run(devices: int, tiny: bool) -> list[dict]:
    period = 2 if tiny else 16
    chosen = (
        [models.logistic(8), models.mlp(8), models.gpt(8, 1, 2, 16, 4)]
        if tiny
        else [models.logistic(), models.mlp(), models.gpt(length=32)]
    )
    rows = []
    for model in chosen:
        times, ratio = alternate(
            contestants(model, devices, period),
            repeats=1 if tiny else 5,
            least=0 if tiny else 0.05,
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
