"""Local SGD of a CNN on CPUs over a plain loop with the same number of gradients.

The CNN of Flax's MNIST example, batches of 32 images per worker, H = 8. The plain loop
takes K · H steps of one model, as large as that of a worker. Target: at most 1.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from benchmarks.reporting import FigureSpec
from benchmarks.timing import make_stepper, ratio, time_interleaved

DEVICES = (1, 2, 4)
FIGURE = FigureSpec("fused", ("K", "devices"), "round / plain steps", 1.1)


def make_params(width: int) -> dict:
    """Returns two convolutions with `width` and 2 `width` channels, and two layers."""
    rng = np.random.default_rng(0)

    def kernel(*shape: int) -> np.ndarray:
        fan_in = np.prod(shape[:-1])
        return (rng.normal(size=shape) / fan_in**0.5).astype(np.float32)

    return {
        "convolutions": [kernel(3, 3, 1, width), kernel(3, 3, width, 2 * width)],
        "layers": [kernel(7 * 7 * 2 * width, 8 * width), kernel(8 * width, 10)],
    }


def loss_fn(params, batch):
    """Returns the cross-entropy of the CNN."""
    x, labels = batch
    for kernel in params["convolutions"]:
        layouts = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layouts
        )
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4
        x = jax.nn.relu(x)
    hidden, last = params["layers"]
    logits = jax.nn.relu(x.reshape(len(x), -1) @ hidden) @ last
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def make_batches(period: int, workers: int, batch: int) -> tuple:
    """Returns random images and labels, leaves `(H, K, B, ...)`."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(period, workers, batch, 28, 28, 1)).astype(np.float32)
    return images, rng.integers(0, 10, (period, workers, batch)).astype(np.int32)


def plain_stepper(params, batches):
    """Returns a stepper of one model over the batches of all workers in turn."""
    optimizer = optax.sgd(0.01)

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    params = jax.tree.map(jnp.array, params)
    period, workers = batches[1].shape[:2]
    each = [
        jax.device_put(jax.tree.map(lambda x, h=h, k=k: x[h, k], batches))
        for h in range(period)
        for k in range(workers)
    ]
    call = jax.jit(step, donate_argnums=0)
    return make_stepper(call, [(params, optimizer.init(params))], each)


def candidates(params, workers: int, devices: int, batches) -> dict:
    """Returns steppers of a plain loop, a fused round, gated steps and `train`."""
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(0.01))
    mesh = jax.make_mesh((devices,), ("worker",), devices=jax.devices()[:devices])
    cluster = lsgd.on_mesh(algorithm, mesh, workers)
    period = len(batches[1])
    host = [jax.tree.map(lambda x, h=h: x[h], batches) for h in range(period)]
    fused = jax.jit(lsgd.fused(cluster), donate_argnums=0)
    gated = jax.jit(lsgd.gated(cluster, lsgd.every(period)), donate_argnums=0)

    def train(state, batches):
        return lsgd.train(cluster, state, batches, schedule=period, progress=False)

    def stepper(call, batches):
        return make_stepper(call, [cluster.init(params)], batches)

    return {
        "plain": plain_stepper(params, batches),
        "fused": stepper(fused, [cluster.shard_batch(batches, time=True)]),
        "gated": stepper(gated, [cluster.shard_batch(batch) for batch in host]),
        "train": stepper(train, [host]),
    }


def run(devices: int, tiny: bool) -> list[dict]:
    width, batch, period = (2, 2, 2) if tiny else (32, 32, 8)
    params, rows = make_params(width), []
    for workers in (1, 4, 8):
        if workers % devices:
            continue
        times, _ = time_interleaved(
            candidates(params, workers, devices, make_batches(period, workers, batch)),
            repeats=1 if tiny else 5,
        )
        gradients = period * workers
        rows.append(
            {
                "devices": devices,
                "K": workers,
                "plain ms/gradient": 1e3 * times["plain"].median / gradients,
                **{
                    name: ratio(times[name], times["plain"])
                    for name in ("fused", "gated", "train")
                },
            }
        )
    return rows
