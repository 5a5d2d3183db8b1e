"""A convolutional network with BatchNorm on MNIST: what the averaging period costs.

    python examples/mnist.py

trains K = 4 and 8 workers with periods of H = 1, 4, 16 and 64 local steps, all for
four epochs in batches of 128 over all workers, and prints a row for each run: 3 minutes
on two cores. Expected: at least 98.5 % of the test images right for H ≤ 16 (98.9 % for
H = 1, 98.7 to 98.8 % for H = 16 with a sixteenth of the bytes). It needs the extra
`examples`, and mnist.npz in the directory that LOCALSGD_DATA names, or it downloads
that file once.

`--alphas` makes workers differ: each gets labels in proportions of its own. With
`--workers 8 --epochs 2 --alphas 100 1 0.1 --figure FILE`, 3 minutes, the percentages
are

    alpha     H = 1      4     16     64
      100      98.7   98.6   98.3   97.7
        1      98.1   97.9   97.6   96.2
      0.1      94.0   97.2   96.8   95.0
"""

import argparse
import functools
import itertools
import os
import pathlib
import time
from typing import Any, NamedTuple

os.environ.setdefault("NPROC", "16")  # JAX 0.10 and 0.11 starve with fewer threads.

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pooch
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure

import localsgd_jax as lsgd
from localsgd_jax.flax import from_linen

URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"


class Images(NamedTuple):
    """Images `(n, 28, 28, 1)`, standardised, and their digits `(n,)`."""

    pixels: np.ndarray
    digits: np.ndarray


class Convolution(nn.Module):
    """A 3 x 3 convolution of stride 2, as one product of patches and kernel.

    Workers that share a device are batched, which would turn a convolution into a
    grouped one, and those are slow on CPUs; a product stays a product.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, h, w, c) to (n, h / 2, w / 2, features)."""
        rows, columns = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [
            x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2]
            for i in range(3)
            for j in range(3)
        ]
        return nn.Dense(self.features, use_bias=False)(jnp.concatenate(patches, -1))


class Network(nn.Module):
    """Two convolutions, each with BatchNorm, and a layer over what they leave."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images to the logits of ten digits."""
        for features in (16, 32):
            x = Convolution(features)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


class Training(TrainState):
    """With the running statistics of BatchNorm."""

    batch_stats: Any


def train_step(state: Training, batch: Images) -> tuple[Training, dict]:
    """One worker's step, as for one device."""

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(
            variables, batch.pixels, train=True, mutable="batch_stats"
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.digits)
        return losses.mean(), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **updates), {"loss": loss}


def load() -> tuple[Images, Images]:
    """Reads the training and the test images."""
    path = pathlib.Path(os.environ.get("LOCALSGD_DATA", ""), "mnist.npz")
    if not path.exists():
        path = pooch.retrieve(URL, f"sha256:{SHA256}", "mnist.npz")
    with np.load(path) as file:
        return tuple(
            Images(
                (file[f"x_{part}"][..., None] / np.float32(255) - 0.13) / 0.31,
                file[f"y_{part}"].astype(np.int32),
            )
            for part in ("train", "test")
        )


def run(
    train: Images,
    test: Images,
    *,
    workers: int,
    period: int,
    alpha: float | None = None,
    epochs: float = 4,
    batch: int = 128,
    peak: float = 0.15,
    seed: int = 0,
) -> dict:
    """Trains once; returns the last row of the history."""
    steps = int(epochs * len(train.digits) / batch)
    model = Network()
    rate = optax.warmup_cosine_decay_schedule(0.01, peak, steps // 10, steps)
    variables = model.init(jax.random.key(seed), train.pixels[:1], train=False)
    start = Training.create(
        apply_fn=model.apply,
        tx=optax.sgd(rate, momentum=0.9, nesterov=True),
        **variables,
    )

    @jax.jit
    def right(variables, images):
        logits = model.apply(variables, images.pixels, train=False)
        return jnp.mean(logits.argmax(-1) == images.digits)

    def evaluate(variables):
        parts = zip(*(np.array_split(leaf, 10) for leaf in test), strict=True)
        return {
            "accuracy": np.mean([right(variables, Images(*part)) for part in parts])
        }

    algorithm, start = from_linen(train_step, start, lsgd.average())
    cluster = lsgd.on_mesh(algorithm, lsgd.worker_mesh(workers), workers)
    batches = lsgd.deal(train, workers=workers, batch=batch // workers, seed=seed)
    if alpha:
        shards = lsgd.dirichlet(train.digits, workers, alpha, seed=seed)
        batches = lsgd.deal_shards(train, shards, batch // workers, seed=seed)
    _, history = lsgd.train(
        cluster,
        cluster.init(start),
        batches,
        every=period,
        steps=steps,
        evaluate=evaluate,
        evaluate_every=steps,
        field=("params", "batch_stats"),
        progress=False,
    )
    return {name: column[-1] for name, column in history.items()}


def draw(rows: list[dict], path: str) -> None:
    """Draws accuracy against the period, a curve for each alpha and K."""
    figure = Figure(figsize=(5, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for alpha, workers in dict.fromkeys((r["alpha"], r["workers"]) for r in rows):
        mine = [r for r in rows if (r["alpha"], r["workers"]) == (alpha, workers)]
        label = f"K = {workers}" + (f", alpha = {alpha:g}" if alpha else "")
        periods = [r["period"] for r in mine]
        axes.plot(periods, [100 * r["accuracy"] for r in mine], "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="period H", ylabel="test accuracy / %")
    axes.grid(color="0.9")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, format="png")


def main(arguments: list[str] | None = None) -> list[dict]:
    """Trains every combination and prints its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--periods", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--alphas", type=float, nargs="+", default=[None])
    parser.add_argument("--figure", help="PNG of accuracy against H, a curve per alpha")
    options = parser.parse_args(arguments)
    lsgd.initialize(config=vars(options))  # Processes of `localsgd launch`, if any.
    first = jax.process_index() == 0
    say = functools.partial(print, flush=True) if first else lambda line: None
    train, test = load()
    rows = []
    say(
        f"{'alpha':>6}{'K':>3}{'H':>4}{'rounds':>8}{'MB':>8}{'accuracy':>10}"
        f"{'seconds':>9}"
    )
    every = itertools.product(options.alphas, options.workers, options.periods)
    for alpha, workers, period in every:
        began = time.perf_counter()
        row = run(
            train,
            test,
            workers=workers,
            period=period,
            alpha=alpha,
            epochs=options.epochs,
        )
        rows.append(row | {"alpha": alpha, "workers": workers, "period": period})
        say(
            f"{alpha or '-':>6}{workers:>3}{period:>4}{int(row['round']):>8}"
            f"{row['bytes'] / 1e6:>8.1f}{row['accuracy']:>10.4f}"
            f"{time.perf_counter() - began:>9.1f}"
        )
    if first and options.figure:
        draw(rows, options.figure)
    return rows


if __name__ == "__main__":
    main()
