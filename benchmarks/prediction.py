"""The planner's prediction against measured rounds, for K = 2, 4, 8 CPU devices.

In each repetition `plan.measure` times dispatches of local steps, rounds of one step,
and all-reduces of three sizes, from which `cost.round_time` predicts fused rounds of 4,
16 and 64 steps. These are timed before and after, each for a tenth of a second at
least. The ratio is the median over 15 repetitions, of one measurement each, so that
what else the machine does slows both. Aim: within 15 %.
"""

import math
import statistics

import jax
import numpy as np
import optax

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.record import Shown
from benchmarks.timing import once
from localsgd_jax import cost
from localsgd_jax.plan import measure

DEVICES = (8,)
SHOWN = Shown("predicted/measured", ("model", "K", "H"), "predicted / measured")
LEAST = 0.1


def rounds(cluster: lsgd.Cluster, model: models.Model, period: int):
    """A fused round that goes on from the state that it gave last."""
    call = jax.jit(lsgd.fused(cluster), donate_argnums=0)
    batches = jax.tree.map(
        lambda x: np.broadcast_to(x, (period, cluster.workers, *x.shape)), model.batch
    )
    held, batches = [cluster.init(model.params)], cluster.put(batches, time=True)

    def again():
        held[0], metrics = call(held[0], batches)
        return held[0], metrics

    once(again)
    return again


def rows_for(model: models.Model, workers: int, periods, repeats: int) -> list[dict]:
    mesh = jax.make_mesh((workers,), ("worker",), devices=jax.devices()[:workers])
    made = lsgd.local_sgd(model.loss, optax.sgd(1e-3), rule=lsgd.average())
    cluster = lsgd.on_mesh(made, mesh)
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (workers, *x.shape)), model.batch)
    state, batch = cluster.init(model.params), cluster.put(batch)
    calls = {period: rounds(cluster, model, period) for period in periods}
    counts = {period: math.ceil(LEAST / once(call)) for period, call in calls.items()}

    def timed() -> dict[int, float]:
        return {
            period: statistics.mean(once(call) for _ in range(counts[period]))
            for period, call in calls.items()
        }

    found: dict[int, list] = {period: [] for period in periods}
    before = timed()
    for _ in range(repeats):
        measured = measure.measure(cluster, state, batch, mesh, repeats=1)
        after = timed()
        for period, runs in found.items():
            seconds = (before[period] + after[period]) / 2
            predicted = cost.round_time(measured.job, measured.link, period)
            runs.append((predicted, seconds, predicted / seconds))
        before = after
    return [
        {
            "K": workers,
            "model": model.name,
            "H": period,
            "predicted ms": 1e3 * statistics.median(x for x, _, _ in runs),
            "measured ms": 1e3 * statistics.median(x for _, x, _ in runs),
            "predicted/measured": statistics.median(x for _, _, x in runs),
        }
        for period, runs in found.items()
    ]


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    model = models.mlp(8) if tiny else models.mlp()
    counts, periods = ([2], [2]) if tiny else ([2, 4, 8], [4, 16, 64])
    return [
        row
        for workers in counts
        for row in rows_for(model, workers, periods, 1 if tiny else 15)
    ]
