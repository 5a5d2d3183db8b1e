"""How long a job takes to go on after its process 0 has been killed.

    python tests/restarts.py --kills 10

runs `localsgd launch --elastic --restarts` of `resilient_process.py`, kills process 0
by SIGKILL again and again, each time a random moment after a round, and prints the
seconds from the signal to the end of the first round after the restart, and the steps
that were lost.
"""

import argparse
import json
import os
import pathlib
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).parent
SETTINGS = {"steps": 10**6, "pause": 0.01, "save_every": 20, "heartbeat": 6}
LIMIT = 120


def launch(processes, kills, directory):
    """Starts the launcher."""
    options = ["-n", str(processes), "--elastic", "--restarts", str(kills)]
    settings = json.dumps(SETTINGS | {"directory": directory})
    return subprocess.Popen(
        [sys.executable, "-m", "localsgd_jax", "launch", *options, "--"]
        + [sys.executable, "resilient_process.py", settings],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def facts(source, found):
    """Reads what process 0 prints, with the time at which it came."""
    for line in source:
        if line.startswith("[0] {"):
            found.put((time.monotonic(), json.loads(line[4:])))


def first_row(found, pid):
    """Waits for the first round of a life; returns when, where from and its process."""
    began = None
    while True:
        when, fact = found.get(timeout=LIMIT)
        if fact.get("pid", pid) != pid:
            began = fact
        if began and "row" in fact:
            return when, fact["row"]["step"], began


def one_kill(chance, found, pid):
    """Kills process 0; returns the seconds, the steps lost and the next one's pid."""
    time.sleep(3 * chance.random())
    last = 0
    while not found.empty():
        last = found.get()[1].get("row", {}).get("step", last)
    struck = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    when, _, began = first_row(found, pid)
    return when - struck, last - began["from"], began["pid"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, found, times = random.Random(options.seed), queue.SimpleQueue(), []
    with tempfile.TemporaryDirectory() as directory:
        started = launch(options.processes, options.kills, directory)
        reader = threading.Thread(target=facts, args=(started.stdout, found))
        reader.start()
        try:
            _, _, began = first_row(found, None)
            pid = began["pid"]
            for _ in range(options.kills):
                seconds, lost, pid = one_kill(chance, found, pid)
                times.append(seconds)
                print(f"{seconds:.1f} s, {lost} steps lost", flush=True)
        finally:
            for _ in range(2):
                started.send_signal(signal.SIGTERM)
                time.sleep(1)
            started.wait()
            reader.join()
    middle = statistics.median(times)
    print(f"least {min(times):.1f}, median {middle:.1f}, most {max(times):.1f} s")
    sys.exit(max(times) > 60)


if __name__ == "__main__":
    main()
