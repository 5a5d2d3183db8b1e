"""What grows with K, with H and with the number of parameters, and what does not.

Workers simulated on one device; logistic regression, 300 features, batches of 4.
Memory is what the compiled round needs, over K copies of the parameters and a batch.
"""

import time

import jax
import jax.numpy as jnp
import optax

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.record import Shown
from benchmarks.timing import alternate

DEVICES = (1,)
SHOWN = Shown(
    "memory/minimum", ("K", "H", "parameters"), "memory / K copies and the batches"
)


def compiled(model: models.Model, workers: int, period: int):
    """A fused round compiled for shapes, and how long that took."""
    made = lsgd.local_sgd(model.loss, optax.sgd(1e-3), rule=lsgd.average())
    cluster = lsgd.simulate(made, workers)
    shape = jax.ShapeDtypeStruct
    params = jax.tree.map(lambda x: shape(x.shape, x.dtype), model.params)
    batches = jax.tree.map(
        lambda x: shape((period, workers, *x.shape), x.dtype), model.batch
    )
    state = cluster.init(params)
    began = time.perf_counter()
    call = jax.jit(lsgd.fused(cluster), donate_argnums=0).lower(state, batches)
    return call.compile(), state, batches, time.perf_counter() - began


def measure(model: models.Model, workers: int, period: int, repeats: int) -> dict:
    call, state, batches, seconds = compiled(model, workers, period)
    memory = call.memory_analysis()
    held = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)]
    data = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batches)

    def again():
        held[0], metrics = call(held[0], data)
        return held[0], metrics

    times, _ = alternate({"round": again}, repeats)
    numbers = sum(x.size for x in jax.tree.leaves((state.workers, batches)))
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "K": workers,
        "H": period,
        "parameters": model.size,
        "us/worker-step": 1e6 * times["round"].median / workers / period,
        "memory/minimum": needed / (4 * numbers),
        "compile s": seconds,
    }


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    repeats = 1 if tiny else 5
    counts = [1, 4] if tiny else [1, 16, 256, 1024, 4096]
    periods = [1, 4] if tiny else [1, 16, 128, 1024]
    sizes = [10, 1000] if tiny else [10**3, 10**5, 10**7, 10**8]
    logistic = models.logistic(batch=4)
    return [
        *(measure(logistic, workers, 16, repeats) for workers in counts),
        *(measure(logistic, 8, period, repeats) for period in periods),
        *(measure(models.wide(size), 4, 4, repeats) for size in sizes),
    ]
