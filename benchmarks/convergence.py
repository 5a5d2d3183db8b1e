"""Convergence of DiLoCo and related algorithms, a table per study.

Command: python -m benchmarks convergence [STUDY ...] --out DIRECTORY (1 hour for all)
Expected: at equal tokens DiLoCo ends near data-parallel AdamW; 4 bits and fragments
within 1 % of DiLoCo at the same period, overlap within 2 %.

In a study all methods do T steps on the same batches, which the workers share: four
workers with AdamW inside, if a method says nothing else. "text" is a byte-level
transformer on the help topics of Python's standard library, "mnist" a perceptron; the
other studies are of a smaller transformer on Shakespeare's plays. The loss is measured
on held-out data. An interrupted run resumes with the missing rows.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("NPROC", "8")

import jax
import numpy as np

import localsgd_jax as lsgd
from benchmarks.convergence_studies import STUDIES, Method, Task
from localsgd_jax.experiments import plotting
from localsgd_jax.experiments.paper.results import ResumableTable, run_table

COLUMNS = ("study", "run", "seed", "loss", "rounds", "megabytes")


def batches(task: Task, workers: int, seed: int) -> Iterator:
    """Yields the same examples for any number of workers, split among them."""
    rng = np.random.default_rng(seed)
    for _ in range(task.steps):
        sampled = task.sample(rng, task.batch)
        yield jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), sampled)


def train_and_score(task: Task, method: Method, seed: int) -> dict:
    """Trains and returns the held-out loss of the mean model."""
    workers = method.workers if method.rule else 1
    rule = method.rule() if method.rule else lsgd.identity()
    schedule = method.schedule() if method.schedule else lsgd.every(64)
    algorithm = lsgd.local_sgd(task.loss, method.inner(task), rule)
    cluster = lsgd.simulate(algorithm, workers)
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


def summarise(rows: list[dict], study: str) -> list[tuple]:
    """Returns name, mean and standard deviation of the loss, and a row, per method."""
    summary = []
    for name in STUDIES[study].methods:
        selected = [row for row in rows if row["run"] == name]
        losses = [row["loss"] for row in selected]
        std = np.std(losses, ddof=1) if len(losses) > 1 else float("nan")
        summary.append((name, np.mean(losses), std, selected[0]))
    return summary


def plot(directory: Path, tables: dict[str, list[dict]], seeds: int) -> None:
    """Plots the held-out loss of each method, a panel per study."""
    figure = plotting.new_figure(4.6 * len(tables), 3.6)
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (study, rows) in zip(panels, tables.items(), strict=True):
        names, means, stds, _ = zip(*summarise(rows, study), strict=True)
        positions = np.arange(len(names))[::-1]
        color = plotting.curve_style(0, 2)["color"]
        axes.errorbar(means, positions, xerr=stds, fmt="o", color=color, capsize=3)
        axes.set_yticks(positions, names)
        plotting.label_axes(axes, study, "held-out loss", "")
    figure.suptitle(f"equal tokens, {seeds} seeds")
    plotting.save(figure, directory, "convergence")


def measure(study: str, out: Path, seeds: int, steps: int | None) -> list[dict]:
    """Computes the missing rows of a study and returns all."""
    settings = {"seeds": seeds, "steps": steps}
    methods = STUDIES[study].methods
    keys = [(name, seed) for seed in range(seeds) for name in methods]

    def prepare() -> Callable:
        task = STUDIES[study].task()
        task = task._replace(steps=steps or task.steps)

        def make_row(key: tuple, rows: list[dict]) -> dict:
            del rows
            name, seed = key
            row = {"study": study, "run": name, "seed": seed}
            return row | train_and_score(task, methods[name], seed)

        return make_row

    table = ResumableTable(out, f"convergence_{study}", settings, COLUMNS)
    return run_table(table, keys, prepare)


def print_table(study: str, rows: list[dict]) -> None:
    """Prints the Markdown table of a study."""
    print(f"\n| {study} | loss | ± | rounds | MB |\n| --- | --- | --- | --- | --- |")
    for name, mean, std, row in summarise(rows, study):
        sent = "" if row["megabytes"] is None else f"{row['megabytes']:.2f}"
        print(f"| {name} | {mean:.4f} | {std:.4f} | {row['rounds']} | {sent} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks convergence", description=__doc__.splitlines()[0]
    )
    names = ", ".join(STUDIES)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {names}")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: that of the task")
    options = parser.parse_args(arguments)
    for study in options.studies:
        if study not in STUDIES:
            parser.error(f"STUDY must be one of {names}, got {study!r}")
    tables = {}
    for study in options.studies or STUDIES:
        tables[study] = measure(study, options.out, options.seeds, options.steps)
        print_table(study, tables[study])
    if options.seeds > 1:
        plot(options.out, tables, options.seeds)


if __name__ == "__main__":
    main()
