"""What agreeing seldom costs: DiLoCo and its relatives against data-parallel AdamW.

Command: python benchmarks/convergence.py text mnist --out DIRECTORY (20 minutes)
Expected: at equal tokens DiLoCo ends near data-parallel AdamW; 4 bits and fragments
within 1 % of DiLoCo at the same period, overlap within 2 %.

Four workers with AdamW inside take T steps on batches of b; data-parallel AdamW takes
T steps on batches of 4b. "text" is a byte-level transformer on the help topics in
Python's standard library, "mnist" a perceptron; both are scored on data that was held
out. A run that was interrupted goes on with the rows that are missing.
"""

import argparse
import os
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.reproduce import figures
from localsgd_jax.reproduce.output import Table

WORKERS, HELD_OUT = 4, 512
COLUMNS = ("task", "run", "seed", "loss", "rounds", "megabytes")


class Task(NamedTuple):
    """A model and its data.

    Attributes:
      init: from a key to parameters.
      loss: `loss(params, batch)`.
      draw: `draw(rng, count)`, a batch of training examples.
      held_out: a batch.
      batch: b, examples of a worker and step.
      steps: T.
      rate: largest learning rate of AdamW.
    """

    init: Callable
    loss: Callable
    draw: Callable
    held_out: tuple
    batch: int
    steps: int
    rate: float


class Run(NamedTuple):
    """A rule and when it is applied; None for data-parallel training."""

    rule: Callable | None
    schedule: Callable | None = None


def _four_bits() -> lsgd.SyncRule:
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    return lsgd.outer(nesterov, lsgd.quantize(lsgd.average(), 4))


RUNS = {
    "data-parallel": Run(None),
    "DiLoCo, H = 8": Run(lsgd.diloco, lambda: lsgd.every(8)),
    "DiLoCo, H = 32": Run(lsgd.diloco, lambda: lsgd.every(32)),
    "DiLoCo, H = 128": Run(lsgd.diloco, lambda: lsgd.every(128)),
    "4 bits, H = 32": Run(_four_bits, lambda: lsgd.every(32)),
    "4 fragments, H = 32": Run(
        lambda: lsgd.fragment(lsgd.diloco(), 4, cut=0), lambda: lsgd.spread(32, 4)
    ),
    "late by 4 steps, H = 32": Run(
        lambda: lsgd.mix(lsgd.delay(lsgd.diloco()), 0.5),
        lambda: lsgd.early(lsgd.every(32), 4),
    ),
    "overlap, H = 32": Run(lambda: lsgd.overlap(lsgd.diloco()), lambda: lsgd.every(32)),
    "average, H = 32": Run(lsgd.average, lambda: lsgd.every(32)),
    "overlap of average, H = 32": Run(
        lambda: lsgd.overlap(lsgd.average()), lambda: lsgd.every(32)
    ),
}


def text(width: int = 64, layers: int = 2, context: int = 64) -> Task:
    """A byte-level transformer with rotary positions and tied embeddings."""
    topics = pydoc_data.topics.topics
    data = np.frombuffer("".join(topics[k] for k in sorted(topics)).encode(), np.uint8)
    cut = len(data) - 65_536
    heads = 4

    def init(key: jax.Array) -> dict:
        keys = iter(jax.random.split(key, 1 + 4 * layers))

        def matrix(rows: int, columns: int) -> jax.Array:
            return jax.random.normal(next(keys), (rows, columns)) / rows**0.5

        blocks = [
            {
                "attend": matrix(width, 3 * width),
                "join": matrix(width, width),
                "up": matrix(width, 4 * width),
                "down": matrix(4 * width, width),
            }
            for _ in range(layers)
        ]
        return {"embed": 0.1 * matrix(256, width) * 16, "layers": blocks}

    def norm(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    angles = np.outer(np.arange(context), 10_000.0 ** -np.linspace(0, 1, width // 8))
    turn = jnp.asarray(np.exp(1j * angles)[None, :, None, :], jnp.complex64)

    def rotate(x: jax.Array) -> jax.Array:
        real, imaginary = jnp.split(x, 2, axis=-1)
        turned = jax.lax.complex(real, imaginary) * turn
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    def block(x: jax.Array, part: dict) -> jax.Array:
        q, k, v = (
            y.reshape(*x.shape[:2], heads, -1)
            for y in jnp.split(norm(x) @ part["attend"], 3, axis=-1)
        )
        seen = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + seen.reshape(x.shape) @ part["join"]
        return x + jax.nn.gelu(norm(x) @ part["up"]) @ part["down"]

    def loss(params: dict, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        inputs, targets = batch
        x = params["embed"][inputs]
        for part in params["layers"]:
            x = block(x, part)
        logits = norm(x) @ params["embed"].T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    def windows(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = data[starts[..., None] + np.arange(context + 1)].astype(np.int32)
        return rows[..., :-1], rows[..., 1:]

    held_out = windows(cut + np.arange(HELD_OUT) * ((len(data) - cut) // HELD_OUT - 1))
    return Task(
        init,
        loss,
        lambda rng, count: windows(rng.integers(0, cut - context - 1, count)),
        held_out,
        batch=4,
        steps=1024,
        rate=4e-3,
    )


def mnist(width: int = 128) -> Task:
    """A perceptron with one hidden layer."""
    folder = os.environ.get("LOCALSGD_DATA")
    if not folder or not (Path(folder) / "mnist.npz").exists():
        raise SystemExit("mnist: put mnist.npz where LOCALSGD_DATA points")
    file = np.load(Path(folder) / "mnist.npz")
    inputs = file["x_train"].reshape(-1, 784).astype(np.float32) / 255
    labels = file["y_train"].astype(np.int32)
    tests = file["x_test"].reshape(-1, 784).astype(np.float32) / 255

    def init(key: jax.Array) -> dict:
        one, two = jax.random.split(key)
        return {
            "in": jax.random.normal(one, (784, width)) / 28,
            "bias": jnp.zeros(width),
            "out": jax.random.normal(two, (width, 10)) / width**0.5,
        }

    def loss(params: dict, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, targets = batch
        hidden = images @ params["in"] + jnp.broadcast_to(
            params["bias"], (images.shape[0], width)
        )
        logits = jax.nn.relu(hidden) @ params["out"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    def draw(rng: np.random.Generator, count) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(0, len(labels), count)
        return inputs[chosen], labels[chosen]

    held_out = tests, file["y_test"].astype(np.int32)
    return Task(init, loss, draw, held_out, batch=16, steps=1024, rate=2e-3)


TASKS = {"text": text, "mnist": mnist}


def batches(task: Task, workers: int, seed: int) -> Iterator[tuple]:
    """Yields the same examples for any number of workers, cut into their shares."""
    rng = np.random.default_rng(seed)
    for _ in range(task.steps):
        drawn = task.draw(rng, WORKERS * task.batch)
        yield jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), drawn)


def finish(task: Task, run: Run, seed: int) -> dict:
    """Trains, and scores the consensus."""
    warm_up = optax.warmup_cosine_decay_schedule(
        0, task.rate, 100, task.steps, 0.1 * task.rate
    )
    inner = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(warm_up, weight_decay=0.1)
    )
    workers = WORKERS if run.rule else 1
    rule = run.rule() if run.rule else lsgd.keep()
    schedule = run.schedule() if run.schedule else lsgd.every(64)
    cluster = lsgd.simulate(lsgd.local_sgd(task.loss, inner, rule), workers)
    state = cluster.init(task.init(jax.random.key(seed)))
    state, history = lsgd.train(
        cluster, state, batches(task, workers, seed), every=schedule, progress=False
    )
    score = jax.jit(task.loss)(lsgd.consensus(state), task.held_out)
    return {
        "loss": round(float(score), 5),
        "rounds": len(history["round"]) if run.rule else task.steps,
        "megabytes": round(float(history["bytes"][-1]) / 1e6, 3) if run.rule else None,
    }


def summary(rows: list[dict], task: str, seeds: int) -> list[tuple]:
    """Mean and spread over seeds, relative to DiLoCo at H = 32."""
    table = []
    for name in RUNS:
        losses = [r["loss"] for r in rows if (r["task"], r["run"]) == (task, name)]
        if len(losses) == seeds:
            row = next(r for r in rows if (r["task"], r["run"]) == (task, name))
            table.append((name, np.mean(losses), np.std(losses, ddof=1), row))
    return table


def draw(directory: Path, rows: list[dict], tasks: list[str], seeds: int) -> None:
    figure = figures.new(4.6 * len(tasks), 3.6)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        table = summary(rows, task, seeds)
        places = np.arange(len(table))[::-1]
        color = figures.style(0, 2)["color"]
        axes.errorbar(
            [row[1] for row in table],
            places,
            xerr=[row[2] for row in table],
            fmt="o",
            color=color,
            capsize=3,
        )
        axes.set_yticks(places, [row[0] for row in table])
        figures.finish(axes, task, "held-out loss", "")
    figure.suptitle(f"{WORKERS} workers, AdamW inside, equal tokens, {seeds} seeds")
    figures.save(figure, directory, "convergence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of those of the task")
    options = parser.parse_args()
    settings = {"seeds": options.seeds, "steps": options.steps, "tasks": options.tasks}
    table = Table(options.out, "convergence", settings, COLUMNS)
    wanted = [
        (task, name, seed)
        for seed in range(options.seeds)
        for task in options.tasks
        for name in RUNS
    ]
    made = {task: TASKS[task]() for task in options.tasks}
    for task, name, seed in wanted[len(table.rows) :]:
        given = made[task]
        given = given._replace(steps=options.steps or given.steps)
        row = {"task": task, "run": name, "seed": seed}
        table.append(row | finish(given, RUNS[name], seed))
        print(*table.rows[-1].values(), flush=True)
    for task in options.tasks:
        print(f"\n| {task} | loss | ± | rounds | MB |\n| --- | --- | --- | --- | --- |")
        for name, mean, spread, row in summary(table.rows, task, options.seeds):
            sent = "" if row["megabytes"] is None else f"{row['megabytes']:.2f}"
            print(f"| {name} | {mean:.4f} | {spread:.4f} | {row['rounds']} | {sent} |")
    if options.seeds > 1:
        draw(options.out, table.rows, options.tasks, options.seeds)


if __name__ == "__main__":
    main()
