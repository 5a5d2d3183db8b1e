"""Driver of a decoupled job with a learner on each of two hosts.

    python -m benchmarks.slow_link.decoupled_driver ADDRESS METHOD ROUNDS

Connects to a Ray cluster with a CPU on each host, trains the MLP with one learner on
each and prints a line of JSON: seconds and held-out loss of each model of the run, and
the bytes that the job has counted and the network interface of this host has carried.
"""

import json
import os
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import optax
import ray  # pyright: ignore[reportMissingImports]

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.slow_link import tasks
from localsgd_jax import decoupled
from localsgd_jax.decoupled.fragments import join
from localsgd_jax.decoupled.job import shared_params
from localsgd_jax.decoupled.syncer_host import SyncerHost

LEARNERS, INTERFACE = 2, "eth0"
SKIPPED = 2  # Merges at the start, which include compilation.


class DecoupledMethod(NamedTuple):
    """Settings of a job.

    Attributes:
      period: H, local steps of a learner per round.
      fragments: parts of the model with a syncer each.
      overlap: local steps during an exchange.
      exchanges: exchanges of a learner in flight.
    """

    period: int
    fragments: int = 1
    overlap: int = 0
    exchanges: int = 1


METHODS = {
    "decoupled, H = 16": DecoupledMethod(16),
    "decoupled, H = 16, overlapped": DecoupledMethod(16, 2, 8, 2),
}


@cache
def load_task() -> tasks.Task:
    """Returns the task of this process."""
    return tasks.mlp()


def make_job(method: DecoupledMethod, rounds: int) -> decoupled.Job:
    """Describes the training of the MLP with a number of rounds of each learner."""

    def batches(learner: int, start: int):
        os.sched_setaffinity(0, {learner % os.cpu_count()})
        round_index = start // method.period
        while True:
            rows = tasks.batches(load_task(), round_index, 10**6, method.period)
            for index in range(method.period):
                yield jax.tree.map(lambda x, i=index: x[i][None], rows)
            round_index += 1

    model = models.mlp()
    return decoupled.Job(
        lsgd.local_sgd(model.loss, optax.adamw(1e-3), rule=lsgd.average()),
        model.params,
        batches,
        every=method.period,
        steps=rounds * method.period * LEARNERS,
        merge=decoupled.quorum(LEARNERS, grace=1.0),
        fragments=method.fragments,
        overlap=method.overlap,
        exchanges=method.exchanges,
    )


def interface_bytes() -> tuple[int, int]:
    """Returns the bytes that the interface of this host has received and sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            values = counters.split()
            return int(values[0]), int(values[8])
    return 0, 0


def losses_of_run(job: decoupled.Job, directory: str) -> list[tuple[float, float]]:
    """Returns time and held-out loss after each merge, from the log of the run."""
    hosts = [SyncerHost(decoupled.make_syncer(job, f)) for f in range(job.fragments)]
    log = decoupled.read_log(job, directory)
    log.sort(key=lambda item: item[1].time)
    loss, like = jax.jit(models.mlp().loss), shared_params(job)
    found, held_out = [], load_task().held_out
    for fragment, event in log:
        merges = hosts[fragment].state.version
        hosts[fragment].replay(event)
        if hosts[fragment].state.version > merges:
            params = join(like, *(host.model() for host in hosts))
            found.append((event.time, float(loss(params, held_out))))
    return found


def wait_for_nodes(address: str) -> None:
    """Connects to Ray and waits until each learner has a CPU."""
    ray.init(address=address, logging_level="error", log_to_driver=False)
    while ray.cluster_resources().get("CPU", 0) < LEARNERS:
        time.sleep(0.5)


def main() -> None:
    """Runs the job and prints the result."""
    address, name, rounds = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    wait_for_nodes(address)
    job, counters = make_job(METHODS[name], int(rounds)), []

    def record(row: dict) -> None:
        counters.append((row, interface_bytes()))

    with tempfile.TemporaryDirectory() as directory:
        decoupled.run(
            job,
            LEARNERS,
            address=address,
            checkpoint=directory,
            save_every=10**6,
            timeout=600.0,
            environment={"JAX_PLATFORMS": "cpu", "NPROC": "8"},
            progress=False,
            record=record,
        )
        losses = losses_of_run(job, directory)
    print(json.dumps({"losses": losses, **compare_bytes(counters)}), flush=True)


def compare_bytes(counters: list) -> dict:
    """Returns the bytes between two rows as counted and as carried by the interface.

    Of the two learners of each syncer one is on another host, so half of the counted
    bytes cross the interface, in either direction.
    """
    first, last = SKIPPED * fragments_of(counters), len(counters) - 2
    counted = (
        counted_bytes(counters, last) - counted_bytes(counters, first)
    ) / LEARNERS
    carried = sum(counters[last][1]) - sum(counters[first][1])
    return {"counted": counted, "carried": carried}


def fragments_of(counters: list) -> int:
    """Returns the number of fragments in the rows."""
    return len({row["fragment"] for row, _ in counters})


def counted_bytes(counters: list, end: int) -> int:
    """Returns the bytes of all syncers up to a row."""
    latest = {row["fragment"]: row for row, _ in counters[: end + 1]}
    return sum(row["bytes_received"] + row["bytes_sent"] for row in latest.values())


if __name__ == "__main__":
    # Ray pickles functions of __main__ by value, except the cached one.
    from benchmarks.slow_link import decoupled_driver

    decoupled_driver.main()
