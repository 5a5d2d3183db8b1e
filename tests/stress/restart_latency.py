"""Time from the failure of process 0 to the first round after the restart.

    cd tests && python -m stress.restart_latency --kills 10

runs `fault_tolerant_worker.py` under `localsgd launch --elastic --restarts` and kills
process 0 by SIGKILL, each time at a random moment after a round. Prints the seconds
from the signal to the end of the first round after the restart, and the lost steps.
Exits with 1 if a restart took more than 60 s.
"""

import argparse
import json
import os
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from harness.paths import PROGRAMS, PYTHONPATH

SETTINGS = {"steps": 10**6, "pause": 0.01, "save_every": 20, "heartbeat": 6}
TIMEOUT_SECONDS = 120
MAX_RESTART_SECONDS = 60


def launch(processes, kills, directory):
    """Starts the job under the launcher."""
    options = ["-n", str(processes), "--elastic", "--restarts", str(kills)]
    settings = json.dumps(SETTINGS | {"directory": directory})
    return subprocess.Popen(
        [sys.executable, "-m", "localsgd_jax", "launch", *options, "--"]
        + [sys.executable, "fault_tolerant_worker.py", settings],
        cwd=PROGRAMS,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def read_messages(source, messages):
    """Puts the JSON lines of process 0 and the times of their arrival into a queue."""
    for line in source:
        if line.startswith("[0] {"):
            messages.put((time.monotonic(), json.loads(line[4:])))


def first_row(messages, previous_pid):
    """Waits for the first row after a start.

    Returns:
      Time of its arrival, and the message of the start with "from" and "pid".
    """
    start = None
    while True:
        arrival, message = messages.get(timeout=TIMEOUT_SECONDS)
        if message.get("pid", previous_pid) != previous_pid:
            start = message
        if start and "row" in message:
            return arrival, start


def measure_restart(rng, messages, pid):
    """Kills process 0 and waits for the first row after the restart.

    Returns:
      Seconds, lost steps, and the new process id of process 0.
    """
    time.sleep(3 * rng.random())
    last_step = 0
    while not messages.empty():
        last_step = messages.get()[1].get("row", {}).get("step", last_step)
    kill_time = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    arrival, start = first_row(messages, pid)
    return arrival - kill_time, last_step - start["from"], start["pid"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, messages, times = random.Random(options.seed), queue.SimpleQueue(), []
    with tempfile.TemporaryDirectory() as directory:
        job = launch(options.processes, options.kills, directory)
        reader = threading.Thread(target=read_messages, args=(job.stdout, messages))
        reader.start()
        try:
            _, start = first_row(messages, None)
            pid = start["pid"]
            for _ in range(options.kills):
                seconds, lost_steps, pid = measure_restart(rng, messages, pid)
                times.append(seconds)
                print(f"{seconds:.1f} s, {lost_steps} steps lost", flush=True)
        finally:
            for _ in range(2):
                job.send_signal(signal.SIGTERM)
                time.sleep(1)
            job.wait()
            reader.join()
    median = statistics.median(times)
    print(f"min {min(times):.1f}, median {median:.1f}, max {max(times):.1f} s")
    sys.exit(max(times) > MAX_RESTART_SECONDS)


if __name__ == "__main__":
    main()
