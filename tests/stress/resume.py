"""SIGKILL in multi-process training with shared checkpoints; compares resumed runs.

    cd tests && python -m stress.resume --kills 30 --seed 0

A job of two processes trains with `lsgd.train` and saves every five steps. It is killed
at random moments after a round: one process, all processes or the launcher. Then it is
started again on the same directory, until it ends. Its state must equal that of an
uninterrupted run bit by bit, in all processes. Prints a line for each run, and exits
with 1 if a state differs or a job fails for another reason.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time

import numpy as np
from harness.launched_jobs import LaunchedJob

PROCESSES, STEPS, PAUSE, MAX_SECONDS = 2, 400, 0.01, 240
OPTIONS = ["--devices-per-process", "2", "--grace-period", "5"]
VICTIMS = ("one process", "all processes", "the launcher")
MAX_KILLS_PER_RUN = 10


def start(directory):
    """Starts the job; it resumes from the checkpoints in the directory."""
    settings = {"directory": f"{directory}/run", "result": f"{directory}/result"}
    settings |= {"steps": STEPS, "pause": PAUSE}
    return LaunchedJob(PROCESSES, "resume_worker.py", settings, *OPTIONS)


def kill(rng, job, victim):
    """Kills a part of a job and waits until the job has ended."""
    pids = job.pids()
    if victim == "one process":
        targets = [rng.choice(list(pids.values()))]
    elif victim == "all processes":
        targets = list(pids.values())
    else:
        targets = [job.launcher.pid]
    for pid in targets:
        os.kill(pid, signal.SIGKILL)
    job.end(MAX_SECONDS)


def run(rng, num_kills, counts):
    """Runs a job to its end with kills; returns the state of each process.

    Args:
      rng: source of random numbers.
      num_kills: number of kills.
      counts: number of kills by victim, updated.
    """
    with tempfile.TemporaryDirectory() as directory:
        for victim in [rng.choice(VICTIMS) for _ in range(num_kills)] + [None]:
            with start(directory) as job:
                if victim:
                    if not job.wait_for_row(rng.randrange(4)):
                        if job.end(MAX_SECONDS):
                            raise AssertionError(job.tail())
                        break
                    time.sleep(rng.random())
                    if job.launcher.poll() is None:
                        counts[victim] += 1
                        kill(rng, job, victim)
                elif job.end(MAX_SECONDS):
                    raise AssertionError(job.tail())
        results = [np.load(f"{directory}/result.{i}.npz") for i in range(PROCESSES)]
        return [[result[name] for name in result.files] for result in results]


def is_equal(first, second):
    """Returns whether the states of two runs are equal bit by bit."""
    return all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for one, other in zip(first, second, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, counts = random.Random(options.seed), collections.Counter()
    uninterrupted, different = run(rng, 0, counts), 0
    while (done := counts.total()) < options.kills:
        state = run(rng, min(MAX_KILLS_PER_RUN, options.kills - done), counts)
        different += not is_equal(state, uninterrupted)
        line = f"{counts.total()} kills {dict(counts)}, {different} runs differ"
        print(line, flush=True)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
