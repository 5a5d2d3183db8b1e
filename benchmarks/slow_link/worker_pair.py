"""Two worker processes on two hosts, and the measurement of the link between them."""

import json
import statistics
from collections.abc import Sequence
from contextlib import suppress

from benchmarks.baselines.worker_processes import LineProcesses
from benchmarks.slow_link import tasks
from benchmarks.slow_link.network import Network
from localsgd_jax.distributed.launcher.ports import free_port
from localsgd_jax.planning.cost_model import Link, fit_link

WORKERS = 2
# Number of all-reduces per measured time of a link, in the order of attempts.
REPEATS = (1, 4, 16, 64, 256)


class WorkerPair(LineProcesses):
    """Processes of `benchmarks.slow_link.worker`, which get the same requests."""

    def __init__(self, net: Network, model: str, methods: Sequence[str]) -> None:
        """Starts one process per host; `methods` are keys of METHODS."""
        command = ["-m", "benchmarks.slow_link.worker", model]
        command += [f"{net.coordinator}:{free_port()}", str(WORKERS)]
        # A run may take many minutes on a slow link, so answers have no time limit.
        super().__init__(
            [[*command, str(worker), *methods] for worker in range(WORKERS)],
            net,
            answer_seconds=None,
        )

    def request(self, line: str) -> None:
        """Sends a line to all workers."""
        self.send([line] * WORKERS)

    def answer(self) -> dict:
        """Returns the answer of worker 0 after all workers have answered."""
        return json.loads(self.receive()[0])

    def all_reduce_seconds(self, repeats: int) -> list[float]:
        """Returns the shortest of `repeats` times of an all-reduce of each size."""
        self.request(str(repeats))
        return self.answer()["seconds"]

    def train(self, rounds: int, eval_every: int) -> dict:
        """Trains from the initial parameters; returns the result of `worker.train`."""
        self.request(f"{rounds} {eval_every}")
        return self.answer()


def measure_link(
    pair: WorkerPair, net: Network, mbit: float | None, tiny: bool
) -> Link:
    """Fits latency and bandwidth to all-reduces on a link.

    The fit takes the median of three times per size. If noise hides the bandwidth, the
    measurement is repeated with times that are the shortest of 4, 16, 64 and 256
    all-reduces: other load only adds time.

    Args:
      pair: the workers.
      net: their network.
      mbit: rate of the link, 10⁶ bits per second; None for no limit.
      tiny: whether the all-reduces are small.

    Returns:
      The link.

    Raises:
      ValueError: if the times of the last attempt do not increase with the sizes.
    """
    net.throttle(mbit)
    sizes = tasks.all_reduce_sizes(tiny)
    for repeats in REPEATS[:-1]:
        with suppress(ValueError):
            return _fit_link(pair, sizes, repeats)
    return _fit_link(pair, sizes, REPEATS[-1])


def _fit_link(pair: WorkerPair, sizes: Sequence[int], repeats: int) -> Link:
    """Fits a link to the median of three times per size."""
    times = [pair.all_reduce_seconds(repeats) for _ in range(3)]
    medians = [statistics.median(seconds) for seconds in zip(*times, strict=True)]
    return fit_link(WORKERS, sizes, medians)
