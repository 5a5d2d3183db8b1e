"""Scaling of time, memory and compile time with K, H and the number of parameters.

Workers are simulated on one device, each row in its own process: logistic regression,
300 features, batches of 4. The minimum of memory is K copies of the parameters and of
the optimizer moments, one synchronised copy, and the batches. "planned" is the memory
of the compiled round, "peak" the growth of the process while it runs (Linux only;
"not measured" where the minimum is below 16 MB, the size of JAX's own allocations).
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
from benchmarks.reporting import FigureSpec
from benchmarks.timing import make_stepper, time_interleaved

DEVICES = (1,)
FIGURE = FigureSpec(
    "peak/minimum",
    ("K", "H", "parameters"),
    "memory / (K copies, one synchronised, the batches)",
)
MODELS = {
    "logistic": lambda size: models.logistic(size, batch=4),
    "wide": lambda size: models.parameter_heavy(size),
}
MIN_MEASURED_BYTES = 16e6


def compile_round(model: models.Model, workers: int, period: int):
    """Compiles a fused round for shapes; returns it, the shapes and the seconds."""
    algorithm = lsgd.local_sgd(model.loss, optax.sgd(1e-3), rule=lsgd.average())
    cluster = lsgd.simulate(algorithm, workers)
    shape = jax.ShapeDtypeStruct
    params = jax.tree.map(lambda x: shape(x.shape, x.dtype), model.params)
    batches = jax.tree.map(
        lambda x: shape((period, workers, *x.shape), x.dtype), model.batch
    )
    state = cluster.init(params)
    start = time.perf_counter()
    lowered = jax.jit(lsgd.fused(cluster), donate_argnums=0).lower(state, batches)
    return lowered.compile(), state, batches, time.perf_counter() - start


def measure(model: models.Model, workers: int, period: int, repeats: int) -> dict:
    """Returns the row of one model, K and H."""
    call, state, batches, seconds = compile_round(model, workers, period)
    numbers = sum(x.size for x in jax.tree.leaves((state.workers, batches)))
    minimum = 4 * (numbers + model.size)
    before = reset_peak_rss()
    held = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)]
    data = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batches)
    times, _ = time_interleaved({"round": make_stepper(call, held, [data])}, repeats)
    peak = "not measured"
    if before is not None and minimum >= MIN_MEASURED_BYTES:
        peak = (rss_bytes("VmHWM") - before) / minimum
    return {
        "K": workers,
        "H": period,
        "parameters": model.size,
        "us/worker-step": 1e6 * times["round"].median / workers / period,
        "planned/minimum": planned_bytes(call) / minimum,
        "peak/minimum": peak,
        "compile s": seconds,
    }


def planned_bytes(call) -> int:
    """Returns the device memory of a compiled program."""
    memory = call.memory_analysis()
    inputs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return inputs + memory.output_size_in_bytes - memory.alias_size_in_bytes


def rss_bytes(field: str) -> int:
    """Returns the resident set size of this process (VmRSS) or its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    (line,) = [x for x in status.splitlines() if x.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def reset_peak_rss() -> int | None:
    """Resets the peak to the current resident set size, and returns that.

    Returns None on systems other than Linux.
    """
    jax.block_until_ready(jnp.zeros(3) + 1)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return rss_bytes("VmRSS")
    except OSError:
        return None


def run_row_in_subprocess(
    name: str, size: int, workers: int, period: int, repeats: int
) -> dict:
    """Measures a row in its own process."""
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
    cases = [("logistic", 300, workers, 16) for workers in counts]
    cases += [("logistic", 300, 8, period) for period in periods]
    cases += [("wide", size, 4, 4) for size in sizes]
    return [run_row_in_subprocess(*case, repeats) for case in cases]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    name, size, *row = json.loads(sys.argv[1])
    print(json.dumps(measure(MODELS[name](size), *row)))
