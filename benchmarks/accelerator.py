"""Lanes of a GPT with 124 M parameters on one accelerator, beside one plain model.

K = 1, 2, 4, 8 workers share the device and the batch that the plain model has alone, in
bfloat16 with float32 parameters and AdamW; H = 16. Meant to take less than eight
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
from benchmarks.timing import Times, alternate, ratio

DEVICES = (1,)

# Dense bfloat16, 10¹² operations a second, as the makers state; the first that is part
# of the name of a device counts.
PEAKS = {
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


# Of a row, besides K, how lanes run, and what the compiler counts.
COLUMNS = (
    "parameters",
    "tokens/s",
    "plain tokens/s",
    "over plain",
    "of peak",
    "gated/fused",
    "steps",
    "optimizer",
    "sync",
    "memory GB",
    "compile s",
)


class Size(NamedTuple):
    """What is trained: `gpt`'s arguments, sequences a step in all, H, and K."""

    gpt: dict
    batch: int
    period: int
    workers: tuple[int, ...]
    repeats: int


def size(tiny: bool, memory: int) -> Size:
    """Chooses the batch so that activations (2 GB a sequence) leave room for K = 8."""
    if tiny:
        shape = {"width": 8, "layers": 2, "heads": 2, "vocabulary": 16, "length": 4}
        return Size(shape, 4, 2, (2,), 1)
    shape = {"width": 768, "layers": 12, "heads": 12, "vocabulary": 50304}
    room = (memory - 16e9) / 2e9
    batch = next((b for b in (32, 16) if b <= room), 8)
    return Size(shape | {"length": 1024}, batch, 16, (1, 2, 4, 8), 5)


def optimizer() -> optax.GradientTransformation:
    return optax.adamw(3e-4, weight_decay=0.1)


def loss_in_bfloat16(model: models.Model) -> Callable:
    def loss(params, tokens):
        return model.loss(
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), tokens
        )

    return loss


def cluster(loss: Callable, workers: int, lanes: str) -> lsgd.Cluster:
    algorithm = lsgd.local_sgd(loss, optimizer(), rule=lsgd.average())
    return lsgd.simulate(algorithm, workers, lanes=lanes)


def plain(loss: Callable) -> Callable:
    """H steps of one model on whole batches, (H, B, ...), in one dispatch."""
    inner = optimizer()

    def step(state, batch):
        value, grad = jax.value_and_grad(loss)(state[0], batch)
        updates, opt_state = inner.update(grad, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    return lambda state, batches: jax.lax.scan(step, state, batches)


def optimizing(state: lsgd.State, batches: Any) -> tuple[lsgd.State, None]:
    """What the optimizer does in a step, for gradients that need no computing."""
    del batches

    def one(worker):
        grad = jax.tree.map(lambda x: 1e-6 * x, worker.params)
        updates, opt_state = optimizer().update(grad, worker.opt_state, worker.params)
        params = optax.apply_updates(worker.params, updates)
        return worker._replace(params=params, opt_state=opt_state)

    return state._replace(workers=jax.vmap(one)(state.workers)), None


def programs(place: lsgd.Cluster, period: int) -> dict[str, Callable]:
    """The parts of a round, each from a state and batches to a state and anything."""
    return {
        "fused": lsgd.fused(place),
        "gated": lsgd.gated(place, lsgd.every(period)),
        "sync": lambda state, batches: (place.sync(state), None),
        "optimizer": optimizing,
    }


def going_on(call: Callable, held: list, inputs: list) -> Callable:
    """A turn that goes on from the state held, and leaves there what it ends with."""

    def turn():
        for batch in inputs:
            held[0], metrics = call(held[0], batch)
        return held[0], metrics

    return turn


def alone(model: models.Model, given: Size, tokens: jax.Array) -> Callable:
    """A round of the plain model."""
    params = jax.tree.map(jnp.asarray, model.params)
    state = params, optimizer().init(params)
    call = compiled(plain(loss_in_bfloat16(model)), state, tokens)
    return going_on(call, [state], [tokens])


def draw(given: Size) -> jax.Array:
    """Tokens of a round, (H, B, T + 1), in place."""
    shape = given.period, given.batch, given.gpt["length"] + 1
    drawn = np.random.default_rng(1).integers(0, given.gpt["vocabulary"], shape)
    return jnp.asarray(drawn, jnp.int32)


def measure(
    model: models.Model,
    given: Size,
    lanes: tuple[int, str],
    tokens: jax.Array,
    plain_round: Callable,
) -> dict:
    """Times a round of K lanes and its parts, in turn with a round of the plain model.

    All parts go on from one state, so that the device holds no more than one and the
    plain model's.
    """
    place = cluster(loss_in_bfloat16(model), *lanes)
    batches = tokens.reshape(given.period, place.workers, -1, tokens.shape[-1])
    split = [batches[i] for i in range(given.period)]
    inputs = {"fused": [batches], "gated": split}
    held = [place.init(model.params)]
    began = time.perf_counter()
    calls = {
        name: compiled(part, held[0], inputs.get(name, split)[0])
        for name, part in programs(place, given.period).items()
    }
    seconds = time.perf_counter() - began
    turns = {
        name: going_on(call, held, inputs.get(name, split[:1]))
        for name, call in calls.items()
    }
    times, _ = alternate(turns | {"plain": plain_round}, given.repeats, least=0)
    return described(model, given, times) | {
        "memory GB": needed(calls["fused"]) / 1e9,
        "compile s": seconds,
    }


def compiled(function: Callable, state: Any, batch: Any) -> Callable:
    """Compiles for a state that it may overwrite."""
    return jax.jit(function, donate_argnums=0).lower(state, batch).compile()


def needed(program: Callable) -> int:
    """Returns the bytes that a compiled program needs on the device."""
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return held + memory.output_size_in_bytes - memory.alias_size_in_bytes


def described(model: models.Model, given: Size, times: dict[str, Times]) -> dict:
    """Makes the row: rates, ratios, and where the time of a fused round goes.

    Dispatch is what a round of gated steps takes longer; the optimizer's share is in
    the steps' share.
    """
    tokens = given.period * given.batch * given.gpt["length"]
    rate = tokens / times["fused"].median
    sync = ratio(times["sync"], times["fused"])
    return {
        "parameters": model.size,
        "tokens/s": rate,
        "plain tokens/s": tokens / times["plain"].median,
        "over plain": ratio(times["plain"], times["fused"]),
        "of peak": of_peak(rate * by_formula(given.gpt)),
        "gated/fused": ratio(times["gated"], times["fused"]),
        "steps": 1 - sync,
        "optimizer": given.period * ratio(times["optimizer"], times["fused"]),
        "sync": sync,
    }


def by_formula(shape: dict) -> float:
    """Operations for a token, forwards and backwards.

        6 (12 L d² + V d) + 12 L d T

    with V d for the tied output and T² scores, of which the causal mask wastes half.
    """
    layers, width = shape["layers"], shape["width"]
    matrices = 12 * layers * width**2 + shape["vocabulary"] * width
    return 6 * matrices + 12 * layers * width * shape["length"]


def by_compiler(shape: dict) -> float | None:
    """Operations for a token as the compiler counts them, if it does.

    It counts a loop's body once, so that a model of L layers is a model of one and
    L − 1 times what a second adds.
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


def of_peak(flops: float) -> float | str:
    """Returns the share of what the device could do, if that is known."""
    kind = jax.devices()[0].device_kind
    peak = next((PEAKS[name] for name in PEAKS if name in kind), None)
    return flops / (peak * 1e12) if peak else f"unknown for {kind}"


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    device = jax.devices()[0]
    if device.platform == "cpu" and not tiny:
        raise SystemExit("accelerator: it needs a GPU or a TPU; --tiny runs anywhere")
    limit = (device.memory_stats() or {}).get("bytes_limit", 16e9)
    given = size(tiny, limit)
    model = models.gpt(**given.gpt)
    counted = by_compiler(given.gpt)
    compared = counted / by_formula(given.gpt) if counted else "not counted"
    tokens = draw(given)
    plain_round = alone(model, given, tokens)
    wanted = [(workers, "vmap") for workers in given.workers]
    rows = []
    for workers, lanes in [*wanted, (given.workers[-1], "map")]:
        try:
            found = measure(model, given, (workers, lanes), tokens, plain_round)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = dict.fromkeys(COLUMNS, "no room")
        # What the error's frames hold would take the room of the next.
        gc.collect()
        shown = {"K": workers, "lanes": lanes, **found, "counted/formula": compared}
        rows.append(shown)
    return rows
