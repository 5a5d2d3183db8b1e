"""Soak test: random faults in multi-process jobs, and the steps that they lose.

    cd tests && python -m stress.soak --kills 100 --seed 0

Each job trains on three or four processes and receives two or three signals: SIGKILL,
SIGSTOP or SIGTERM. A job that ends with process 0 is restarted from its checkpoint with
one process fewer. Writes `docs/_data/soak.json` after each job and continues from there
after an interruption, prints the table of `docs/guides/fault_tolerance.md`, and exits
with 1 if a guarantee was violated.
"""

import argparse
import itertools
import json
import os
import pathlib
import queue
import random
import signal
import sys
import tempfile
import time

os.environ.setdefault("NPROC", "16")

import jax
from harness.paths import ROOT
from harness.process_jobs import Job
from programs.fault_tolerant_worker import (
    BATCH,
    WORKERS,
    algorithm,
    data,
    evaluate,
    initial_params,
)

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer
from localsgd_jax.fault_tolerance import EXIT_PREEMPTED

STEPS, PERIOD, SAVE_EVERY, PAUSE = 300, 5, 20, 0.01
HEARTBEAT, SYNC_TIMEOUT = 6, 15.0
SETTINGS = {
    "heartbeat": HEARTBEAT,
    "sync_timeout": SYNC_TIMEOUT,
    "pause": PAUSE,
    "save_every": SAVE_EVERY,
}
# A failure is detected after the heartbeat timeout, after the synchronisation that it
# interrupted has been cancelled.
MAX_STALL_SECONDS = HEARTBEAT * 2 + SYNC_TIMEOUT * 2
SIGNAL_WEIGHTS = {"SIGKILL": 6, "SIGSTOP": 3, "SIGTERM": 3}
RESULTS = ROOT / "docs" / "_data" / "soak.json"


def fault_free_error():
    """Returns the error at the end of a run without faults."""
    cluster = lsgd.simulate(algorithm(), WORKERS)
    batches = lsgd.shuffled_batches(data(), workers=WORKERS, batch=BATCH)
    state, _ = lsgd.train(
        cluster,
        cluster.init(initial_params()),
        batches,
        schedule=PERIOD,
        steps=STEPS,
        progress=False,
    )
    return float(evaluate(lsgd.consensus(state))["error"])


def run_job(seed, baseline_error):
    """Runs a job to its end, with restarts; returns its record."""
    rng = random.Random(seed)
    processes = rng.choice((3, 4))
    record = {"seed": seed, "processes": processes, "kills": [], "starts": []}
    record |= {"overlap": rng.random() < 0.25, "broken": []}
    num_faults = processes - 1
    with tempfile.TemporaryDirectory() as directory:
        while True:
            history = run_attempt(rng, record, processes, num_faults, directory)
            if not is_restorable(directory, record):
                record["broken"].append("a checkpoint cannot be restored")
            if history or record["broken"]:
                break
            processes, num_faults = max(processes - 1, 1), 0
    if history:
        record["error"] = history["error"][-1]
        if abs(record["error"] / baseline_error - 1) > 0.02:
            record["broken"].append(f"error {record['error']} against {baseline_error}")
    return record


def run_attempt(rng, record, processes, num_faults, directory):
    """Starts a job and sends signals; returns its history if it has finished."""
    options = SETTINGS | {"overlap": record["overlap"], "directory": directory}
    with Job(processes, steps=STEPS, **options) as job:
        start_time, victims = time.monotonic(), set()
        for _ in range(num_faults):
            victim = inject_fault(job, rng, victims, record)
            victims |= set() if victim is None else {victim}
            if victim in (0, None):
                break
        try:
            codes = job.end(timeout=120)
        except TimeoutError:
            record["broken"].append("hangs")
            return None
        add_start(job, record, codes, time.monotonic() - start_time)
        if 0 in victims:
            return None
        if wrong_codes(record, codes, victims):
            record["broken"].append(f"exit codes {codes}: {job.tail()}")
            return None
        return job.history()


def add_start(job, record, codes, seconds):
    """Adds a start of a job to its record, and a violation if it has stalled."""
    messages = [json.loads(x) for x in job.seen[0] if x[:1] == "{"]
    rows = [message["row"] for message in messages if "row" in message]
    stall = max_row_interval(rows)
    record["starts"].append(
        {
            "processes": len(job.started),
            "from": next((x["from"] for x in messages if "from" in x), None),
            "to": rows[-1]["step"] if rows else None,
            "codes": codes,
            "stall": stall,
            "seconds": round(seconds, 1),
        }
    )
    if stall > MAX_STALL_SECONDS:
        record["broken"].append(f"stalled for {stall} s")


def wrong_codes(record, codes, victims):
    """Returns the exit codes that the signals do not explain."""
    terminated = {k["process"] for k in record["kills"] if k["kind"] == "SIGTERM"}
    wrong = [code for i, code in enumerate(codes) if i not in victims and code != 0]
    allowed = (0, EXIT_PREEMPTED)
    return wrong + [codes[i] for i in victims & terminated if codes[i] not in allowed]


def inject_fault(job, rng, victims, record):
    """Sends a signal to a live process at a random moment; returns its index."""
    try:
        job.wait_for_row(PERIOD)
    except queue.Empty:
        return None
    time.sleep(rng.random() * 1.5)
    victim = rng.choice([p for p in range(len(job.started)) if p not in victims])
    kind = rng.choices(list(SIGNAL_WEIGHTS), list(SIGNAL_WEIGHTS.values()))[0]
    if job.started[victim].poll() is not None:
        return None
    while not job.lines.empty():
        job.lines.get()
    job.send(victim, getattr(signal, kind))
    record["kills"].append({"kind": kind, "process": victim})
    return victim


def max_row_interval(rows):
    """Returns the longest time between two rows in seconds."""
    times = [row["seconds"] for row in rows]
    return round(max((b - a for a, b in itertools.pairwise(times)), default=0.0), 1)


def is_restorable(directory, record):
    """Returns whether the last checkpoint, if there is any, can be restored."""
    cluster = lsgd.simulate(algorithm(), 1)
    try:
        with RunCheckpointer(directory, cluster) as checkpointer:
            state, _ = checkpointer.restore(cluster.init(initial_params()))
    except CheckpointError as error:
        record["broken"].append(str(error))
        return False
    record["restored"] = int(state.step)
    return True


def table(records):
    """Returns a Markdown table of signals, restarts and lost steps."""
    names = "signal, to, times, others continued, restarted, steps lost, longest stall"
    rows = [names.split(", "), ["---"] * 7]
    for kind in SIGNAL_WEIGHTS:
        for target in ("process 0", "another"):
            rows += table_row(records, kind, target)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in rows)


def table_row(records, kind, target):
    """Returns the row of a signal to a target in a list; empty if there was none."""
    hits = [
        record
        for record in records
        for kill in record["kills"]
        if kill["kind"] == kind and (kill["process"] == 0) == (target == "process 0")
    ]
    if not hits:
        return []
    restarted = [record["starts"] for record in hits if len(record["starts"]) > 1]
    if target != "process 0":
        restarted = []  # Another signal, to process 0, has caused the restart.
    lost = [first["to"] - second["from"] for first, second in restarted]
    # Only a job with one kind of signals tells which kind has stalled it.
    pure = [r for r in hits if {kill["kind"] for kill in r["kills"]} == {kind}]
    stall = max((start["stall"] for r in pure for start in r["starts"]), default=0)
    counts = [len(hits), len(hits) - len(restarted), len(restarted)]
    return [[kind, target, *counts, max(lost, default=0), f"{stall} s"]]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    records = []
    if options.out.exists():
        records = json.loads(options.out.read_text())["jobs"]
    baseline = fault_free_error()
    while (count := sum(len(record["kills"]) for record in records)) < options.kills:
        record = run_job(options.seed + len(records), baseline)
        records.append(record)
        about = {"jax": jax.__version__, "steps": STEPS, "save_every": SAVE_EVERY}
        about |= {"fault_free_error": baseline, "settings": SETTINGS}
        options.out.write_text(json.dumps(about | {"jobs": records}, indent=1) + "\n")
        print(count + len(record["kills"]), json.dumps(record), flush=True)
    print(table(records))
    broken = [record for record in records if record["broken"]]
    errors = [abs(record.get("error", baseline) / baseline - 1) for record in records]
    print(
        f"{len(records)} jobs, {count} signals, {len(broken)} violations; "
        f"errors within {100 * max(errors):.2f} % of {baseline:.4f}"
    )
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
