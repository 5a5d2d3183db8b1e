"""One run on a dataset of the user, saved in a directory (`localsgd train`)."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

import localsgd_jax as lsgd
from localsgd_jax.experiments import (
    choices,
    datasets,
    devices,
    logistic,
    plotting,
    run_directory,
)
from localsgd_jax.experiments.run import Problem, RunConfig, run
from localsgd_jax.reporting import to_all


class TrainOptions(NamedTuple):
    """Options of `localsgd train`; None selects a default that depends on the data.

    Attributes:
      data: name or path of the dataset.
      workers: K.
      period: H.
      schedule: NAME or NAME:ARGUMENT.
      batch: B, examples per worker and step.
      steps: T, local steps of each worker.
      optimizer: name of the inner optimizer.
      learning_rate: η₀.
      seed: seed of the shuffles.
      devices: number of devices.
      out: path of the run directory.
    """

    data: str
    workers: int
    period: int | None
    schedule: str
    batch: int
    steps: int
    optimizer: str
    learning_rate: float | None
    seed: int
    devices: int | None
    out: str | None


class PreparedRun(NamedTuple):
    """A validated run.

    Attributes:
      problem: the problem.
      config: the configuration of the run.
      settings: contents of config.json, from which the run can be repeated.
      directory: the output directory.
    """

    problem: Problem
    config: RunConfig
    settings: dict
    directory: Path


def prepare(options: TrainOptions) -> PreparedRun:
    """Validates the options and loads the data, without writing anything.

    Args:
      options: the options.

    Returns:
      The run, for `run_prepared`.

    Raises:
      ValueError: if options or data are invalid.
      OSError: if the data cannot be read, or the output directory exists.
      CoordinationError: if the processes of a job have different options.
    """
    if options.out is not None:
        run_directory.check_not_exists(Path(options.out))
    lsgd.initialize(config=options._asdict())
    mesh = devices.make_local_mesh(options.workers, options.devices)
    dataset = datasets.load(options.data)
    _check_batch(dataset, options)
    curvature = logistic.batch_curvature(dataset, options.batch)
    peak = options.learning_rate or choices.peak_learning_rate(
        options.optimizer, curvature
    )
    rate = choices.linear_decay(peak, options.steps)
    config = RunConfig(
        mesh,
        options.workers,
        choices.parse_schedule(options.schedule, options.period, rate),
        choices.OPTIMIZERS[options.optimizer](rate),
        options.batch,
        options.steps,
        options.seed,
    )
    problem = Problem(dataset, logistic.optimal_value(dataset))
    directory = Path(options.out or f"{dataset.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    settings = _settings(options, problem, config, peak) | {"out": str(directory)}
    return PreparedRun(problem, config, settings, directory)


def run_prepared(prepared: PreparedRun, on_step: Callable) -> dict | None:
    """Trains and writes the run directory; in a job only process 0 writes.

    Args:
      prepared: the result of `prepare`.
      on_step: called without arguments for each step that is loaded.

    Returns:
      The output of `--json`: the settings under "config" and the last row of the
      history under "final"; None in all processes but process 0.

    Raises:
      NonFiniteLossError: if a loss is not finite; the history so far is saved.
      OSError: if a file cannot be written.
    """
    problem, config, settings, directory = prepared
    if jax.process_index() != 0:
        run(problem, config, lambda row: None, on_step)
        return None
    rows, append = [], run_directory.create(directory, settings)
    x = run(problem, config, to_all(rows.append, append), on_step)
    run_directory.save_params(directory, x)
    plotting.plot_convergence(
        {repr(config.schedule): rows},
        directory / "figure.png",
        f"{problem.dataset.name}, K = {config.workers}",
    )
    return {"config": settings, "final": rows[-1]}


def format_summary(result: dict) -> str:
    """Formats the result of `run_prepared` as text."""
    config, final = result["config"], result["final"]
    return (
        f"{config['data']}: {config['examples']} examples, {config['features']} "
        f"features; {config['workers']} workers on {config['devices']} "
        f"{config['platform']} devices\n"
        f"{final['step']} steps and {final['round']} rounds of communication, "
        f"{final['bytes'] / 1e6:.4g} MB sent by each worker, "
        f"{final['seconds']:.1f} s\n"
        f"f - f* = {final['suboptimality']:.4g}, f* = {config['f_star']:.15f}\n"
        f"written: {config['out']}"
    )


def _settings(
    options: TrainOptions, problem: Problem, config: RunConfig, peak: float
) -> dict:
    """Returns the options with their defaults filled in, and derived values."""
    registered = options.data in datasets.REGISTRY
    return options._asdict() | {
        "data": options.data if registered else str(Path(options.data).resolve()),
        "period": choices.resolve_period(options.schedule, options.period),
        "learning_rate": peak,
        "devices": config.mesh.size,
        "platform": config.mesh.devices.flat[0].platform,
        "synchronises": repr(config.schedule),
        "examples": problem.dataset.examples,
        "features": problem.dataset.dimension,
        "sha256": problem.dataset.sha256,
        "l2": logistic.penalty(problem.dataset),
        "f_star": problem.minimum,
    }


def _check_batch(dataset: datasets.Dataset, options: TrainOptions) -> None:
    """Raises if a batch is larger than the shard of a worker."""
    count = dataset.examples
    if options.workers > count:
        raise ValueError(
            f"--workers must be at most the {count} examples, got {options.workers}"
        )
    if options.batch > (shard := count // options.workers):
        raise ValueError(
            f"--batch must fit into a worker's shard of {count} // {options.workers} "
            f"= {shard} examples, got {options.batch}"
        )
