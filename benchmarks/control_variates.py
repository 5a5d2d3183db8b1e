"""Control variates and local SGD on heterogeneous shards of w8a.

Command: python -m benchmarks control_variates --out DIRECTORY (3 minutes)
Expected: control variates converge linearly in the rounds, the faster the longer the
period; local SGD stalls at a distance that grows with the period.

Logistic regression with l2 penalty on 1024 examples of w8a, drawn by the seed and
sorted by label and number of features, so that the shards of K = 8 workers differ and
one worker has all positive labels. Full gradients in float64, step size 1/L for the
largest smoothness L of a shard, condition number 300. A table of f(x̄) − f* after some
rounds, means over three seeds, and a figure.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.experiments import datasets, plotting
from localsgd_jax.experiments.paper.results import write_rows

WORKERS, CONDITION = 8, 300


def make_shards(features: np.ndarray, labels: np.ndarray, size: int, seed: int):
    """Returns features `(K, n/K, d)` and labels of sorted random examples."""
    chosen = np.random.default_rng(seed).choice(len(labels), size, replace=False)
    features, labels = features[chosen].toarray(), labels[chosen]
    order = np.lexsort((features.sum(axis=1), labels))
    return (
        features[order].reshape(WORKERS, -1, features.shape[1]),
        labels[order].reshape(WORKERS, -1),
    )


def penalty_and_smoothness(features: np.ndarray) -> tuple[float, float]:
    """Returns λ and the largest smoothness of a shard, CONDITION times λ."""
    squared = [np.linalg.norm(shard, 2) ** 2 / (4 * len(shard)) for shard in features]
    penalty = max(squared) / (CONDITION - 1)
    return penalty, max(squared) + penalty


def make_loss(penalty: float) -> Callable:
    """Returns the loss of a shard, features and labels."""

    def loss(x: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        features, labels = batch
        fit = jnp.mean(jax.nn.softplus(-labels * (features @ x)))
        return fit + penalty / 2 * jnp.vdot(x, x)

    return loss


def pooled_loss(loss: Callable, shards: tuple) -> Callable:
    """Returns the mean loss of all shards, a function of the parameters."""
    pooled = tuple(jnp.asarray(x.reshape(-1, *x.shape[2:])) for x in shards)
    return jax.jit(lambda x: loss(x, pooled))


def minimise(objective: Callable, dimension: int) -> float:
    """Returns the minimum, by Newton's method."""
    gradient, hessian = jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))
    x = jnp.zeros(dimension)
    for _ in range(20):
        x = x - jnp.linalg.solve(hessian(x), gradient(x))
    assert jnp.linalg.norm(gradient(x)) < 1e-13
    return float(objective(x))


def run(rule: Callable, period: int, rounds: int, shards: tuple) -> np.ndarray:
    """Returns f(x̄) − f* after each round, `(rounds + 1,)`."""
    penalty, smoothness = penalty_and_smoothness(shards[0])
    loss, rate = make_loss(penalty), 1 / smoothness
    algorithm = lsgd.local_sgd(loss, optax.sgd(rate), rule(rate, period))
    cluster = lsgd.simulate(algorithm, WORKERS)

    @jax.jit
    def one_round(state: lsgd.State, batch: tuple) -> lsgd.State:
        step = lambda _, state: cluster.step(state, batch)[0]  # noqa: E731
        return cluster.sync(jax.lax.fori_loop(0, period, step, state))

    batch, dimension = tuple(map(jnp.asarray, shards)), shards[0].shape[-1]
    objective = pooled_loss(loss, shards)
    state = cluster.init(jnp.zeros(dimension))
    losses = [objective(state.workers.params[0])]
    for _ in range(rounds):
        state = one_round(state, batch)
        losses.append(objective(state.workers.params[0]))
    return np.array(losses) - minimise(objective, dimension)


RULES = {
    "local SGD": lambda rate, period: None,
    "control variates": lsgd.control_variates,
}


def measure(
    size: int, periods: Sequence[int], rounds: int, seeds: int
) -> dict[str, np.ndarray]:
    """Returns f − f* of each method, `(seeds, rounds + 1)`."""
    data = datasets.load("w8a")
    curves = {}
    with jax.enable_x64(True):
        for seed in range(seeds):
            shards = make_shards(data.features, data.labels, size, seed)
            for name, rule in RULES.items():
                for period in periods:
                    label = f"{name}, H = {period}"
                    gaps = run(rule, period, rounds, shards)
                    curves.setdefault(label, []).append(gaps)
    return {label: np.array(gaps) for label, gaps in curves.items()}


def plot(directory: Path, curves: dict[str, np.ndarray]) -> None:
    """Plots the geometric mean over the seeds against rounds."""
    figure = plotting.new_figure(6.4, 4.2)
    axes = figure.subplots()
    for i, (label, gaps) in enumerate(curves.items()):
        mean = np.exp(np.log(np.maximum(gaps, 1e-16)).mean(axis=0))
        style = plotting.curve_style(i, len(curves))
        axes.plot(mean, label=label, markevery=len(mean) // 8, **style)
    axes.set_yscale("log")
    title = f"w8a, {WORKERS} workers with different data, full gradients"
    plotting.label_axes(axes, title, "rounds of communication", "$f - f^*$")
    axes.legend(frameon=False)
    plotting.save(figure, directory, "control_variates")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks control_variates",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--size", type=int, default=1024, help="examples")
    parser.add_argument("--rounds", type=int, default=240)
    parser.add_argument("--periods", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    curves = measure(options.size, options.periods, options.rounds, options.seeds)
    rounds = [options.rounds * i // 4 for i in range(5)]
    print("| rounds | " + " | ".join(map(str, rounds)) + " |")
    print("| --- " * 6 + "|")
    for label, gaps in curves.items():
        means = [f"{gaps[:, r].mean():.1e}" for r in rounds]
        print(f"| {label} | " + " | ".join(means) + " |")
    rows = [
        {"run": label, "seed": seed, "round": r, "suboptimality": gaps[seed, r]}
        for label, gaps in curves.items()
        for seed in range(options.seeds)
        for r in range(0, options.rounds + 1, max(options.rounds // 32, 1))
    ]
    write_rows(options.out / "control_variates.csv", rows)
    plot(options.out, curves)


if __name__ == "__main__":
    main()
