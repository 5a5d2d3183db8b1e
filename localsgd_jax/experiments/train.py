"""One run on the user's data, kept in a directory of its own."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from localsgd_jax import distributed
from localsgd_jax.experiments import (
    choices,
    datasets,
    devices,
    figures,
    logistic,
    run_directory,
)
from localsgd_jax.experiments.run import Plan, Problem, run


class Options(NamedTuple):
    """What the user asked for; None where the default depends on the rest.

    Attributes:
      data: name or path.
      workers: K.
      period: H.
      schedule: NAME or NAME:ARGUMENT.
      batch: B.
      steps: T.
      optimizer: its name.
      learning_rate: η₀.
      seed: of the shuffles.
      devices: how many.
      out: the run directory.
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


class Job(NamedTuple):
    """A run that passed all checks.

    Attributes:
      problem: what is minimised.
      plan: how.
      config: what repeats it.
      directory: where it goes.
    """

    problem: Problem
    plan: Plan
    config: dict
    directory: Path


def prepare(options: Options) -> Job:
    """Checks all that can be checked, and writes nothing.

    Args:
      options: what the user asked for.

    Returns:
      What `execute` does.

    Raises:
      ValueError: if something does not fit.
      OSError: if the data cannot be had, or the directory exists.
      JobError: if it runs in several processes that do not fit together.
    """
    if options.out is not None:
        run_directory.refuse_existing(Path(options.out))
    distributed.initialize(config=options._asdict())
    mesh = devices.worker_mesh(options.workers, options.devices)
    dataset = datasets.load(options.data)
    _check_batch(dataset, options)
    curvature = logistic.batch_curvature(dataset, options.batch)
    peak = options.learning_rate or choices.peak_learning_rate(
        options.optimizer, curvature
    )
    rate = choices.decay(peak, options.steps)
    schedule = choices.parse_schedule(options.schedule, options.period, rate)
    problem = Problem(dataset, logistic.minimum(dataset))
    optimizer = choices.OPTIMIZERS[options.optimizer](rate)
    directory = Path(options.out or f"{dataset.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    plan = Plan(
        mesh,
        options.workers,
        schedule,
        optimizer,
        options.batch,
        options.steps,
        options.seed,
    )
    config = _resolved(options, problem, plan, peak) | {"out": str(directory)}
    return Job(problem, plan, config, directory)


def execute(job: Job, advance: Callable) -> dict | None:
    """Trains and fills the directory, once where there are several processes.

    Args:
      job: from `prepare`.
      advance: called without arguments for each step that is loaded.

    Returns:
      What `--json` prints: the config and the last row of the history; None in all
      processes but the first.

    Raises:
      NonFiniteLossError: if a loss is not finite; the history so far is saved.
      OSError: if something cannot be written.
    """
    if jax.process_index() != 0:
        run(job.problem, job.plan, lambda row: None, advance)
        return None
    run_directory.create(job.directory, job.config)
    rows = []

    def record(row: dict) -> None:
        rows.append(row)
        run_directory.append(job.directory, row)

    x = run(job.problem, job.plan, record, advance)
    run_directory.save_params(job.directory, x)
    title = f"{job.problem.dataset.name}, K = {job.plan.workers}"
    figures.convergence(
        {repr(job.plan.schedule): rows}, job.directory / "figure.png", title
    )
    return {"config": job.config, "final": rows[-1]}


def summary(result: dict) -> str:
    """Lays out the result of `execute` for people.

    Args:
      result: from `execute`.

    Returns:
      A few lines.
    """
    config, final = result["config"], result["final"]
    return (
        f"{config['data']}: {config['examples']} examples, {config['features']} "
        f"features; {config['workers']} workers on {config['devices']} "
        f"{config['platform']} devices\n"
        f"{final['step']} steps and {final['round']} rounds of "
        f"communication, "
        f"{final['bytes'] / 1e6:.4g} MB sent by each worker, "
        f"{final['seconds']:.1f} s\n"
        f"f - f* = {final['suboptimality']:.4g}, f* = {config['f_star']:.15f}\n"
        f"written: {config['out']}"
    )


def _resolved(options: Options, problem: Problem, plan: Plan, peak: float) -> dict:
    """Returns the options with their defaults filled in, and what they led to."""
    known = options.data in datasets.KNOWN
    return options._asdict() | {
        "data": options.data if known else str(Path(options.data).resolve()),
        "period": choices.resolve_period(options.schedule, options.period),
        "learning_rate": peak,
        "devices": plan.mesh.size,
        "platform": plan.mesh.devices.flat[0].platform,
        "synchronises": repr(plan.schedule),
        "examples": problem.dataset.examples,
        "features": problem.dataset.dimension,
        "sha256": problem.dataset.sha256,
        "l2": logistic.penalty(problem.dataset),
        "f_star": problem.minimum,
    }


def _check_batch(dataset: datasets.Dataset, options: Options) -> None:
    """Refuses batches larger than a worker's shard."""
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
