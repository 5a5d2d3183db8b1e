"""Convergence of DiLoCo variants against data-parallel AdamW.

Command: python -m benchmarks.convergence text mnist --out DIRECTORY (20 minutes)
Expected: at equal tokens DiLoCo ends near data-parallel AdamW; 4 bits and fragments
within 1 % of DiLoCo at the same period, overlap within 2 %.

Four workers with AdamW as inner optimizer do T steps on batches of b; data-parallel
AdamW does T steps on batches of 4b. "text" is a byte-level transformer on the help
topics of Python's standard library, "mnist" a perceptron; the loss is measured on
held-out data. An interrupted run resumes with the missing rows.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from benchmarks.datasets import HelpTopics, load_mnist
from benchmarks.models import decoder_loss
from localsgd_jax.experiments import plotting
from localsgd_jax.experiments.paper.results import ResumableTable, run_table

WORKERS, HELD_OUT = 4, 512
COLUMNS = ("task", "run", "seed", "loss", "rounds", "megabytes")


class Task(NamedTuple):
    """A model and its data.

    Attributes:
      init: `init(key) -> params`.
      loss: `loss(params, batch)`.
      sample: `sample(rng, count)`, a batch of training examples.
      held_out: a batch.
      batch: b, examples per worker and step.
      steps: T.
      rate: largest learning rate of AdamW.
    """

    init: Callable
    loss: Callable
    sample: Callable
    held_out: object
    batch: int
    steps: int
    rate: float


class Method(NamedTuple):
    """Factories of a rule and a schedule; None for data-parallel training."""

    rule: Callable | None
    schedule: Callable | None = None


def _four_bits() -> lsgd.SyncRule:
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    return lsgd.outer(nesterov, lsgd.quantize(lsgd.average(), 4))


METHODS = {
    "data-parallel": Method(None),
    "DiLoCo, H = 8": Method(lsgd.diloco, lambda: lsgd.every(8)),
    "DiLoCo, H = 32": Method(lsgd.diloco, lambda: lsgd.every(32)),
    "DiLoCo, H = 128": Method(lsgd.diloco, lambda: lsgd.every(128)),
    "4 bits, H = 32": Method(_four_bits, lambda: lsgd.every(32)),
    "4 fragments, H = 32": Method(
        lambda: lsgd.fragment(lsgd.diloco(), 4, split_axis=0),
        lambda: lsgd.evenly_spaced(32, 4),
    ),
    "delayed by 4 steps, H = 32": Method(
        lambda: lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5),
        lambda: lsgd.with_lead(lsgd.every(32), 4),
    ),
    "overlap, H = 32": Method(
        lambda: lsgd.overlap(lsgd.diloco()), lambda: lsgd.every(32)
    ),
    "average, H = 32": Method(lsgd.average, lambda: lsgd.every(32)),
    "overlap of average, H = 32": Method(
        lambda: lsgd.overlap(lsgd.average()), lambda: lsgd.every(32)
    ),
}


def text(width: int = 64, layers: int = 2, context: int = 64) -> Task:
    """Builds a byte-level transformer with rotary positions and tied embeddings."""
    topics = HelpTopics(context)

    def init(key: jax.Array) -> dict:
        keys = iter(jax.random.split(key, 1 + 4 * layers))

        def matrix(rows: int, columns: int) -> jax.Array:
            return jax.random.normal(next(keys), (rows, columns)) / rows**0.5

        blocks = [
            {
                "qkv": matrix(width, 3 * width),
                "out": matrix(width, width),
                "up": matrix(width, 4 * width),
                "down": matrix(4 * width, width),
            }
            for _ in range(layers)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        return {"embedding": 0.1 * matrix(256, width) * 16, "blocks": stacked}

    spacing = topics.num_held_out // HELD_OUT - 1
    return Task(
        init,
        decoder_loss(heads=4),
        topics.sample,
        topics.held_out(HELD_OUT, spacing),
        batch=4,
        steps=1024,
        rate=4e-3,
    )


def mnist(width: int = 128) -> Task:
    """Builds a perceptron with one hidden layer."""
    train, test = load_mnist()

    def init(key: jax.Array) -> dict:
        key_in, key_out = jax.random.split(key)
        return {
            "in": jax.random.normal(key_in, (784, width)) / 28,
            "bias": jnp.zeros(width),
            "out": jax.random.normal(key_out, (width, 10)) / width**0.5,
        }

    def loss(params: dict, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, targets = batch
        bias = jnp.broadcast_to(params["bias"], (images.shape[0], width))
        logits = jax.nn.relu(images @ params["in"] + bias) @ params["out"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    def sample(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        indices = rng.integers(0, len(train.labels), count)
        return train.images[indices], train.labels[indices]

    return Task(init, loss, sample, tuple(test), batch=16, steps=1024, rate=2e-3)


TASKS = {"text": text, "mnist": mnist}


def batches(task: Task, workers: int, seed: int) -> Iterator:
    """Yields the same examples for any number of workers, split among them."""
    rng = np.random.default_rng(seed)
    for _ in range(task.steps):
        sampled = task.sample(rng, WORKERS * task.batch)
        yield jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), sampled)


def train_and_score(task: Task, method: Method, seed: int) -> dict:
    """Trains and returns the held-out loss of the mean model."""
    warm_up = optax.warmup_cosine_decay_schedule(
        0, task.rate, 100, task.steps, 0.1 * task.rate
    )
    inner = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(warm_up, weight_decay=0.1)
    )
    workers = WORKERS if method.rule else 1
    rule = method.rule() if method.rule else lsgd.identity()
    schedule = method.schedule() if method.schedule else lsgd.every(64)
    cluster = lsgd.simulate(lsgd.local_sgd(task.loss, inner, rule), workers)
    state = cluster.init(task.init(jax.random.key(seed)))
    state, history = lsgd.train(
        cluster, state, batches(task, workers, seed), schedule=schedule, progress=False
    )
    score = jax.jit(task.loss)(lsgd.consensus(state), task.held_out)
    rounds, megabytes = task.steps, None
    if method.rule:
        rounds = len(history["round"])
        megabytes = round(float(history["bytes"][-1]) / 1e6, 3)
    return {"loss": round(float(score), 5), "rounds": rounds, "megabytes": megabytes}


def summarise(rows: list[dict], task: str, seeds: int) -> list[tuple]:
    """Returns name, mean and standard deviation of the loss, and a row, per method."""
    summary = []
    for name in METHODS:
        selected = [r for r in rows if (r["task"], r["run"]) == (task, name)]
        losses = [row["loss"] for row in selected]
        if len(losses) == seeds:
            std = np.std(losses, ddof=1)
            summary.append((name, np.mean(losses), std, selected[0]))
    return summary


def plot(directory: Path, rows: list[dict], tasks: list[str], seeds: int) -> None:
    """Plots the held-out loss of each method, a panel per task."""
    figure = plotting.new_figure(4.6 * len(tasks), 3.6)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        names, means, stds, _ = zip(*summarise(rows, task, seeds), strict=True)
        positions = np.arange(len(names))[::-1]
        color = plotting.curve_style(0, 2)["color"]
        axes.errorbar(means, positions, xerr=stds, fmt="o", color=color, capsize=3)
        axes.set_yticks(positions, names)
        plotting.label_axes(axes, task, "held-out loss", "")
    figure.suptitle(f"{WORKERS} workers, AdamW inside, equal tokens, {seeds} seeds")
    plotting.save(figure, directory, "convergence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: that of the task")
    options = parser.parse_args()
    settings = {"seeds": options.seeds, "steps": options.steps, "tasks": options.tasks}
    keys = [
        (task, name, seed)
        for seed in range(options.seeds)
        for task in options.tasks
        for name in METHODS
    ]

    def prepare() -> Callable:
        tasks = {name: TASKS[name]() for name in options.tasks}

        def make_row(key: tuple, rows: list[dict]) -> dict:
            del rows
            name, run, seed = key
            task = tasks[name]
            task = task._replace(steps=options.steps or task.steps)
            row = {"task": name, "run": run, "seed": seed}
            return row | train_and_score(task, METHODS[run], seed)

        return make_row

    table = ResumableTable(options.out, "convergence", settings, COLUMNS)
    rows = run_table(table, keys, prepare)
    for task in options.tasks:
        print(f"\n| {task} | loss | ± | rounds | MB |\n| --- | --- | --- | --- | --- |")
        for name, mean, std, row in summarise(rows, task, options.seeds):
            sent = "" if row["megabytes"] is None else f"{row['megabytes']:.2f}"
            print(f"| {name} | {mean:.4f} | {std:.4f} | {row['rounds']} | {sent} |")
    if options.seeds > 1:
        plot(options.out, rows, options.tasks, options.seeds)


if __name__ == "__main__":
    main()
