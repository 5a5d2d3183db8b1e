"""Four learners on Ray; one is killed half-way and comes back.

    python examples/decoupled.py

trains the byte-level GPT of `examples/text.py` on the help texts of the Python
distribution with four learners in processes of their own, kills the process of one
learner half-way, prints a table of the learners and plots decoupled.png: 2 minutes on
two cores. Expected: the three others continue, the killed learner contributes again
some seconds later, and the loss falls from 6.6 to 2.5 bits per byte. `--data FILE`
trains on another text. Requires the extras `decoupled` and `examples`.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import sys

os.environ.setdefault("NPROC", "16")  # JAX 0.10 and 0.11 starve with fewer threads.

import jax
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import text

import localsgd_jax as lsgd
from localsgd_jax import decoupled
from localsgd_jax.flax import from_nnx

VICTIM = 1  # Index of the learner that is killed.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "NPROC": "16",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path]),
}


def make_job(windows: np.ndarray, steps: int, period: int, depth: int) -> decoupled.Job:
    """Describes the training of the text model."""
    model = text.Gpt(width=32, depth=depth, rngs=nnx.Rngs(0))
    inner = nnx.Optimizer(model, optax.adamw(4e-3), wrt=nnx.Param)
    algorithm, initial = from_nnx(text.train_step, model, inner, rule=lsgd.average())

    def batches(learner, start):
        return lsgd.shuffled_batches(windows, 1, 8, examples_seen=8 * start)

    return decoupled.Job(
        algorithm,
        initial,
        batches,
        every=period,
        steps=steps,
        outer=optax.sgd(0.7, momentum=0.5, nesterov=True),
        merge=decoupled.quorum(3, grace=1.0),
        compress=decoupled.integers(8),
    )


class Killer:
    """Callback that kills the process of one learner after half of the steps.

    Attributes:
      seconds: time of the kill; None before.
    """

    def __init__(self, steps: int, processes: pathlib.Path) -> None:
        """Stores the moment and the directory with process ids."""
        self._steps, self._processes = steps // 2, processes
        self.seconds: float | None = None

    def __call__(self, row: dict) -> None:
        """Receives a row of the history."""
        path = self._processes / str(VICTIM)
        if self.seconds is None and row["steps"] >= self._steps and path.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)
                self.seconds = row["seconds"]
                print(f"learner {VICTIM} killed after {self.seconds:.1f} s", flush=True)


def with_process_ids(job: decoupled.Job, directory: pathlib.Path) -> decoupled.Job:
    """Writes the process id of each learner into a directory."""
    import dataclasses

    def batches(learner, start):
        (directory / str(learner)).write_text(str(os.getpid()))
        return job.batches(learner, start)

    return dataclasses.replace(job, batches=batches)


def plot(history: dict, killed: float | None, path: str) -> None:
    """Plots the contributions of each learner and the loss against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    for learner, contributed in enumerate(history["learners"].T):
        times = history["seconds"][contributed]
        top.plot(times, np.full(len(times), learner), "|", markersize=14)
    bottom.plot(history["seconds"], history["loss"])
    for axis in (top, bottom):
        if killed is not None:
            axis.axvline(killed, color="black", linestyle=":")
    top.set_yticks(range(history["learners"].shape[1]))
    top.set_ylabel("learner")
    bottom.set_ylabel("bits per byte")
    bottom.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict:
    """Trains, kills a learner half-way, and shows its absence and return."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", help="text file; the help texts of Python if None")
    parser.add_argument(
        "--steps", type=int, default=24_000, help="steps of all learners"
    )
    parser.add_argument("--period", type=int, default=16, help="steps per contribution")
    parser.add_argument("--depth", type=int, default=1, help="transformer blocks")
    parser.add_argument("--directory", default="decoupled_run", help="checkpoints")
    parser.add_argument("--figure", default="decoupled.png", help="PNG of the learners")
    options = parser.parse_args(arguments)
    windows, _ = text.load(options.data, 32)
    processes = pathlib.Path(options.directory).absolute() / "processes"
    processes.mkdir(parents=True, exist_ok=True)
    job = make_job(windows, options.steps, options.period, options.depth)
    killer = Killer(options.steps, processes)
    _, history = decoupled.run(
        with_process_ids(job, processes),
        learners=4,
        checkpoint=options.directory,
        timeout=300.0,
        environment=ENVIRONMENT,
        progress=False,
        record=killer,
    )
    print(decoupled.activity(history))
    times = history["seconds"][history["learners"][:, VICTIM]]
    back = times[times > killer.seconds + 0.5] if killer.seconds else []
    if len(back):
        print(f"it contributed again {back[0] - killer.seconds:.1f} s later")
    print(f"loss {history['loss'][0]:.2f} at the start, {history['loss'][-1]:.2f} now")
    plot(history, killer.seconds, options.figure)
    return history


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
