"""Accuracy of the planner: predicted over measured times of rounds.

K = 2, 4, 8 CPU devices. In each repetition `measurement.measure` times dispatches of
local steps, rounds of one step, and all-reduces of three sizes, from which
`cost_model.round_time` predicts fused rounds of 4, 16 and 64 steps. These are timed
before and after, each for at least a tenth of a second, so that other load on the
machine affects both sides. The ratio is the median over 15 repetitions of one
measurement each. Target: within 15 %.
"""

import math
import statistics

import jax
import numpy as np
import optax

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.reporting import FigureSpec
from benchmarks.timing import make_stepper, time_call
from localsgd_jax.planning import cost_model, measurement

DEVICES = (8,)
FIGURE = FigureSpec("predicted/measured", ("model", "K", "H"), "predicted / measured")
MIN_SECONDS = 0.1


def fused_round(cluster: lsgd.Cluster, model: models.Model, period: int):
    """Returns a compiled stepper of a fused round."""
    shape = (period, cluster.num_workers)
    batches = jax.tree.map(
        lambda x: np.broadcast_to(x, (*shape, *x.shape)), model.batch
    )
    call = jax.jit(lsgd.fused(cluster), donate_argnums=0)
    state, batches = (
        cluster.init(model.params),
        cluster.shard_batch(batches, time=True),
    )
    next_round = make_stepper(call, [state], [batches])
    time_call(next_round)
    return next_round


def rows_for(model: models.Model, workers: int, periods, repeats: int) -> list[dict]:
    mesh = jax.make_mesh((workers,), ("worker",), devices=jax.devices()[:workers])
    algorithm = lsgd.local_sgd(model.loss, optax.sgd(1e-3), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh)
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (workers, *x.shape)), model.batch)
    state, batch = cluster.init(model.params), cluster.shard_batch(batch)
    rounds = {period: fused_round(cluster, model, period) for period in periods}
    counts = {
        period: math.ceil(MIN_SECONDS / time_call(call))
        for period, call in rounds.items()
    }

    def time_rounds() -> dict[int, float]:
        return {
            period: statistics.mean(time_call(call) for _ in range(counts[period]))
            for period, call in rounds.items()
        }

    results: dict[int, list] = {period: [] for period in periods}
    before = time_rounds()
    for _ in range(repeats):
        measured = measurement.measure(cluster, state, batch, mesh, repeats=1)
        after = time_rounds()
        for period, runs in results.items():
            seconds = (before[period] + after[period]) / 2
            predicted = cost_model.round_time(measured.workload, measured.link, period)
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
        for period, runs in results.items()
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
