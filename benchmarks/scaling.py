"""What grows with K, with H and with the number of parameters, and what does not.

Workers simulated on one device, each row in a process of its own; logistic regression,
300 features, batches of 4. The minimum of memory is K copies of the parameters and of
the optimizer's moments, one copy that is agreed on, and the batches. "planned" is what
the compiled round asks for, "peak" what the process has grown by while it ran (Linux;
not told where the minimum is below 16 MB, which JAX's own allocations would blur).
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.record import Shown
from benchmarks.timing import alternate

DEVICES = (1,)
SHOWN = Shown(
    "peak/minimum",
    ("K", "H", "parameters"),
    "memory / K copies, one agreed, the batches",
)
MODELS = {
    "logistic": lambda size: models.logistic(size, batch=4),
    "wide": lambda size: models.wide(size),
}
LEAST = 16e6


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
    numbers = sum(x.size for x in jax.tree.leaves((state.workers, batches)))
    minimum = 4 * (numbers + model.size)
    before = forget_peak()
    held = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)]
    data = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batches)

    def again():
        held[0], metrics = call(held[0], data)
        return held[0], metrics

    times, _ = alternate({"round": again}, repeats)
    peak = "not told"
    if before is not None and minimum >= LEAST:
        peak = (resident("VmHWM") - before) / minimum
    return {
        "K": workers,
        "H": period,
        "parameters": model.size,
        "us/worker-step": 1e6 * times["round"].median / workers / period,
        "planned/minimum": planned(call) / minimum,
        "peak/minimum": peak,
        "compile s": seconds,
    }


def planned(call) -> int:
    """Returns the bytes that a compiled program asks for."""
    memory = call.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return needed + memory.output_size_in_bytes - memory.alias_size_in_bytes


def resident(field: str) -> int:
    """Returns bytes that this process holds (VmRSS), or has held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    (line,) = [x for x in status.splitlines() if x.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def forget_peak() -> int | None:
    """Lets the peak begin again from what is held now, which is returned.

    None where there is no such thing as in Linux.
    """
    jax.block_until_ready(jnp.zeros(3) + 1)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except OSError:
        return None


def alone(name: str, size: int, workers: int, period: int, repeats: int) -> dict:
    """Measures a row in a process of its own."""
    row = json.dumps([name, size, workers, period, repeats])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", row],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    repeats = 1 if tiny else 5
    counts = [1, 4] if tiny else [1, 16, 256, 1024, 4096]
    periods = [4] if tiny else [1, 16, 128, 1024]
    sizes = [10, 5 * 10**6] if tiny else [10**3, 10**5, 10**7, 10**8]
    return [
        *(alone("logistic", 300, workers, 16, repeats) for workers in counts),
        *(alone("logistic", 300, 8, period, repeats) for period in periods),
        *(alone("wide", size, 4, 4, repeats) for size in sizes),
    ]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    name, size, *row = json.loads(sys.argv[1])
    print(json.dumps(measure(MODELS[name](size), *row)))
