"""Round time of K GPT workers (124 M parameters) on one device over one plain model.

K = 1, 2, 4, 8 workers share one device, with the same total batch as the plain model,
in bfloat16 with float32 parameters and AdamW; H = 16. Intended to take less than eight
minutes on an H200.
"""

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.timing import Times, make_stepper, ratio, time_interleaved

DEVICES = (1,)

# Dense bfloat16 in 10¹² operations per second by data sheet; the first key contained in
# the name of the device is used.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "TPU v6 lite": 918,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v4": 275,
}
# Columns of a row, besides K, lanes and counted/formula.
COLUMNS = (
    "parameters",
    "tokens/s",
    "plain tokens/s",
    "over plain",
    "mfu",
    "gated/fused",
    "steps",
    "optimizer",
    "sync",
    "memory GB",
    "compile s",
)


class Size(NamedTuple):
    """Arguments of `models.gpt`, sequences per step in total, H, all K, repetitions."""

    gpt: dict
    batch: int
    period: int
    workers: tuple[int, ...]
    repeats: int


def choose_size(tiny: bool, memory: float) -> Size:
    """Returns the size, with a batch that leaves memory for K = 8.

    Activations take 2 GB per sequence.
    """
    if tiny:
        shape = {"width": 8, "layers": 2, "heads": 2, "vocabulary": 16, "length": 4}
        return Size(shape, 4, 2, (2,), 1)
    shape = {"width": 768, "layers": 12, "heads": 12, "vocabulary": 50304}
    limit = (memory - 16e9) / 2e9
    batch = next((b for b in (32, 16) if b <= limit), 8)
    return Size(shape | {"length": 1024}, batch, 16, (1, 2, 4, 8), 5)


def optimizer() -> optax.GradientTransformation:
    return optax.adamw(3e-4, weight_decay=0.1)


def loss_in_bfloat16(model: models.Model) -> Callable:
    def loss(params, tokens):
        return model.loss(
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), tokens
        )

    return loss


def make_cluster(loss: Callable, workers: int, lanes: str) -> lsgd.Cluster:
    algorithm = lsgd.local_sgd(loss, optimizer(), rule=lsgd.average())
    return lsgd.simulate(algorithm, workers, worker_map=lanes)


def plain_steps(loss: Callable) -> Callable:
    """Returns H steps of one model on batches `(H, B, ...)`, in one dispatch."""
    inner = optimizer()

    def step(state, batch):
        value, grad = jax.value_and_grad(loss)(state[0], batch)
        updates, opt_state = inner.update(grad, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    return lambda state, batches: jax.lax.scan(step, state, batches)


def optimizer_only_step(state: lsgd.State, batches: Any) -> tuple[lsgd.State, None]:
    """Applies the optimizer of a step to gradients proportional to the parameters."""
    del batches

    def update(worker):
        grad = jax.tree.map(lambda x: 1e-6 * x, worker.params)
        updates, opt_state = optimizer().update(grad, worker.opt_state, worker.params)
        params = optax.apply_updates(worker.params, updates)
        return worker._replace(params=params, opt_state=opt_state)

    return state._replace(workers=jax.vmap(update)(state.workers)), None


def programs(cluster: lsgd.Cluster, period: int) -> dict[str, Callable]:
    """Returns the parts of a round, `part(state, batch) -> (state, metrics)`."""
    return {
        "fused": lsgd.fused(cluster),
        "gated": lsgd.gated(cluster, lsgd.every(period)),
        "sync": lambda state, batches: (cluster.sync(state), None),
        "optimizer": optimizer_only_step,
    }


def baseline_round(model: models.Model, tokens: jax.Array) -> Callable:
    """Returns a round of the plain model."""
    params = jax.tree.map(jnp.asarray, model.params)
    state = params, optimizer().init(params)
    call = compile_donating(plain_steps(loss_in_bfloat16(model)), state, tokens)
    return make_stepper(call, [state], [tokens])


def sample_tokens(size: Size) -> jax.Array:
    """Returns the tokens of a round on the device, `(H, B, T + 1)`."""
    shape = size.period, size.batch, size.gpt["length"] + 1
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, size.gpt["vocabulary"], shape), jnp.int32)


def measure(
    model: models.Model,
    size: Size,
    lanes: tuple[int, str],
    tokens: jax.Array,
    plain_round: Callable,
) -> dict:
    """Times a round of K lanes and its parts, interleaved with the plain model.

    All parts share one state, so that the device holds only that and the plain model's.
    """
    cluster = make_cluster(loss_in_bfloat16(model), *lanes)
    batches = tokens.reshape(size.period, cluster.num_workers, -1, tokens.shape[-1])
    by_step = [batches[i] for i in range(size.period)]
    inputs = {"fused": [batches], "gated": by_step}
    held = [cluster.init(model.params)]
    start = time.perf_counter()
    calls = {
        name: compile_donating(part, held[0], inputs.get(name, by_step)[0])
        for name, part in programs(cluster, size.period).items()
    }
    seconds = time.perf_counter() - start
    steppers = {
        name: make_stepper(call, held, inputs.get(name, by_step[:1]))
        for name, call in calls.items()
    }
    times, _ = time_interleaved(
        steppers | {"plain": plain_round}, size.repeats, min_seconds=0
    )
    return rates_and_ratios(model, size, times) | {
        "memory GB": memory_bytes(calls["fused"]) / 1e9,
        "compile s": seconds,
    }


def compile_donating(function: Callable, state: Any, batch: Any) -> Any:
    """Compiles a function that donates its state."""
    return jax.jit(function, donate_argnums=0).lower(state, batch).compile()


def memory_bytes(program: Any) -> int:
    """Returns the device memory of a compiled program."""
    memory = program.memory_analysis()
    inputs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return inputs + memory.output_size_in_bytes - memory.alias_size_in_bytes


def rates_and_ratios(model: models.Model, size: Size, times: dict[str, Times]) -> dict:
    """Returns rates, ratios and the fractions of the time of a fused round.

    The additional time of a round of gated steps is dispatch. The fraction of the
    optimizer is part of the fraction of the steps.
    """
    tokens = size.period * size.batch * size.gpt["length"]
    rate = tokens / times["fused"].median
    sync = ratio(times["sync"], times["fused"])
    return {
        "parameters": model.size,
        "tokens/s": rate,
        "plain tokens/s": tokens / times["plain"].median,
        "over plain": ratio(times["plain"], times["fused"]),
        "mfu": mfu(rate * analytic_flops(size.gpt)),
        "gated/fused": ratio(times["gated"], times["fused"]),
        "steps": 1 - sync,
        "optimizer": size.period * ratio(times["optimizer"], times["fused"]),
        "sync": sync,
    }


def analytic_flops(shape: dict) -> float:
    """Returns the operations per token, forward and backward.

        6 (12 L d² + V d) + 12 L d T

    with V d for the tied output and T² scores, half of which the causal mask discards.
    """
    layers, width = shape["layers"], shape["width"]
    matrices = 12 * layers * width**2 + shape["vocabulary"] * width
    return 6 * matrices + 12 * layers * width * shape["length"]


def compiled_flops(shape: dict) -> float | None:
    """Returns the operations per token by XLA's cost analysis, or None without one.

    It counts the body of a loop once. A model of L layers is therefore computed as a
    model of one layer plus L − 1 times the difference of a second layer.
    """
    one, two = (_gradient_flops(shape | {"layers": layers}) for layers in (1, 2))
    if not one or not two:
        return None
    return (one + (shape["layers"] - 1) * (two - one)) / shape["length"]


def _gradient_flops(shape: dict) -> float:
    model = models.gpt(**shape, unroll=True)
    gradient = jax.jit(jax.value_and_grad(loss_in_bfloat16(model)))
    lowered = gradient.lower(model.params, model.batch)
    counts = lowered.compile().cost_analysis() or lowered.cost_analysis() or {}
    return counts.get("flops", 0)


def mfu(flops: float) -> float | str:
    """Returns the model FLOPs utilisation, or text if the peak is unknown."""
    kind = jax.devices()[0].device_kind
    peak = next((PEAK_TFLOPS[name] for name in PEAK_TFLOPS if name in kind), None)
    return flops / (peak * 1e12) if peak else f"unknown for {kind}"


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    device = jax.devices()[0]
    if device.platform == "cpu" and not tiny:
        raise SystemExit("accelerator: needs a GPU or a TPU; --tiny runs on any device")
    limit = (device.memory_stats() or {}).get("bytes_limit", 16e9)
    size = choose_size(tiny, limit)
    model = models.gpt(**size.gpt)
    counted = compiled_flops(size.gpt)
    flops_ratio = counted / analytic_flops(size.gpt) if counted else "not counted"
    tokens = sample_tokens(size)
    plain_round = baseline_round(model, tokens)
    cases = [(workers, "vmap") for workers in size.workers]
    rows = []
    for workers, lanes in [*cases, (size.workers[-1], "map")]:
        try:
            row = measure(model, size, (workers, lanes), tokens, plain_round)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row = dict.fromkeys(COLUMNS, "out of memory")
        # The frames of the error hold arrays, whose memory the next case needs.
        gc.collect()
        case = {"K": workers, "lanes": lanes}
        rows.append(case | row | {"counted/formula": flops_ratio})
    return rows
