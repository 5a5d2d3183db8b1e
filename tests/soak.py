"""Disturbs jobs of real processes at random moments, and counts what is lost.

    python tests/soak.py --kills 100 --seed 0

Each job trains on three or four processes and is disturbed two or three times, by
SIGKILL, SIGSTOP or SIGTERM; one that ends with process 0 is started again from its
checkpoint, on one process less. Writes `docs/failures.json` after each job (it goes on
from there if it is interrupted), prints the table of `docs/failures.md`, and exits with
1 if a promise was broken.
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
from jobs import Job
from resilient_process import BATCH, WORKERS, algorithm, data, evaluate, start

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, Checkpoints
from localsgd_jax.resilient import PREEMPTED

STEPS, PERIOD, SAVE_EVERY, PAUSE = 300, 5, 20, 0.01
SETTINGS = {"heartbeat": 6, "timeout": 15.0, "pause": PAUSE, "save_every": SAVE_EVERY}
# A death is noticed after the heartbeat; a call that it cut is given up before.
LONGEST = SETTINGS["heartbeat"] * 2 + SETTINGS["timeout"] * 2
KINDS = {"SIGKILL": 6, "SIGSTOP": 3, "SIGTERM": 3}
RESULT = pathlib.Path(__file__).parent.parent / "docs" / "failures.json"


def undisturbed():
    """The error that a run reaches in which nothing happens."""
    cluster = lsgd.simulate(algorithm(), WORKERS)
    batches = lsgd.deal(data(), workers=WORKERS, batch=BATCH)
    state, _ = lsgd.train(
        cluster,
        cluster.init(start()),
        batches,
        every=PERIOD,
        steps=STEPS,
        progress=False,
    )
    return float(evaluate(lsgd.consensus(state))["error"])


def one_job(seed, usual):
    """Runs a job to its end, however often it has to be started; returns a record."""
    chance = random.Random(seed)
    processes = chance.choice((3, 4))
    record = {"seed": seed, "processes": processes, "kills": [], "starts": []}
    record |= {"overlap": chance.random() < 0.25, "broken": []}
    planned = processes - 1
    with tempfile.TemporaryDirectory() as directory:
        while True:
            ended = one_life(chance, record, processes, planned, directory)
            if not restorable(directory, record):
                record["broken"].append("a checkpoint cannot be restored")
            if ended or record["broken"]:
                break
            processes, planned = max(processes - 1, 1), 0
    if ended:
        record["error"] = ended["error"][-1]
        if abs(record["error"] / usual - 1) > 0.02:
            record["broken"].append(f"error {record['error']} against {usual}")
    return record


def one_life(chance, record, processes, planned, directory):
    """Starts a job and disturbs it; returns its history if it came to its end."""
    options = SETTINGS | {"overlap": record["overlap"], "directory": directory}
    with Job(processes, steps=STEPS, **options) as job:
        began, gone = time.monotonic(), set()
        for _ in range(planned):
            victim = strike(job, chance, gone, record)
            gone |= set() if victim is None else {victim}
            if victim in (0, None):
                break
        try:
            codes = job.end(timeout=120)
        except TimeoutError:
            record["broken"].append("hangs")
            return None
        seen = [json.loads(x) for x in job.seen[0] if x[:1] == "{"]
        rows = [line["row"] for line in seen if "row" in line]
        record["starts"].append(
            {
                "processes": processes,
                "from": next((x["from"] for x in seen if "from" in x), None),
                "to": rows[-1]["step"] if rows else None,
                "codes": codes,
                "stall": longest_stall(rows),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        if longest_stall(rows) > LONGEST:
            record["broken"].append(f"waited for {longest_stall(rows)} s")
        if 0 in gone:
            return None
        asked = {k["process"] for k in record["kills"] if k["kind"] == "SIGTERM"}
        wrong = [c for i, c in enumerate(codes) if i not in gone and c != 0]
        wrong += [codes[i] for i in gone & asked if codes[i] not in (0, PREEMPTED)]
        if wrong:
            record["broken"].append(f"exit codes {codes}: {job.tail()}")
            return None
        return job.history()


def strike(job, chance, gone, record):
    """Sends a signal to a living process at a random moment; returns which, if any."""
    try:
        job.until_row(PERIOD)
    except queue.Empty:
        return None
    time.sleep(chance.random() * 1.5)
    victim = chance.choice([p for p in range(len(job.started)) if p not in gone])
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    if job.started[victim].poll() is not None:
        return None
    while not job.lines.empty():
        job.lines.get()
    job.send(victim, getattr(signal, kind))
    record["kills"].append({"kind": kind, "process": victim})
    return victim


def longest_stall(rows):
    """Returns the longest time between two rows."""
    times = [row["seconds"] for row in rows]
    return round(max((b - a for a, b in itertools.pairwise(times)), default=0.0), 1)


def restorable(directory, record):
    """Returns whether the last checkpoint, if there is any, can be restored."""
    cluster = lsgd.simulate(algorithm(), 1)
    try:
        with Checkpoints(directory, cluster) as saved:
            state, _ = saved.restore(cluster.init(start()))
    except CheckpointError as error:
        record["broken"].append(str(error))
        return False
    record["restored"] = int(state.step)
    return True


def table(records):
    """Returns what was killed, how often, and what was lost."""
    names = "signal, to, times, others went on, started again, steps lost, stall"
    rows = [names.split(", "), ["---"] * 7]
    for kind in KINDS:
        for to in ("process 0", "another"):
            rows += row(records, kind, to)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in rows)


def row(records, kind, to):
    """Returns the row of a signal to process 0 or to another, if there was any."""
    hits = [
        record
        for record in records
        for kill in record["kills"]
        if kill["kind"] == kind and (kill["process"] == 0) == (to == "process 0")
    ]
    if not hits:
        return []
    again = [record["starts"] for record in hits if len(record["starts"]) > 1]
    if to != "process 0":
        again = []  # Another signal, to process 0, has made it begin again.
    lost = [one["to"] - other["from"] for one, other in again]
    # A job that got two kinds of signals does not tell which made it wait.
    pure = [r for r in hits if {kill["kind"] for kill in r["kills"]} == {kind}]
    stall = max((one["stall"] for r in pure for one in r["starts"]), default=0)
    counts = [len(hits), len(hits) - len(again), len(again), max(lost, default=0)]
    return [[kind, to, *counts, f"{stall} s"]]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    options = parser.parse_args()
    records = []
    if options.out.exists():
        records = json.loads(options.out.read_text())["jobs"]
    usual = undisturbed()
    while (count := sum(len(record["kills"]) for record in records)) < options.kills:
        record = one_job(options.seed + len(records), usual)
        records.append(record)
        about = {"jax": jax.__version__, "steps": STEPS, "save every": SAVE_EVERY}
        about |= {"undisturbed error": usual, "settings": SETTINGS}
        options.out.write_text(json.dumps(about | {"jobs": records}, indent=1) + "\n")
        print(count + len(record["kills"]), json.dumps(record), flush=True)
    print(table(records))
    broken = [record for record in records if record["broken"]]
    errors = [abs(record.get("error", usual) / usual - 1) for record in records]
    print(
        f"{len(records)} jobs, {count} signals, {len(broken)} promises broken; "
        f"errors within {100 * max(errors):.2f} % of {usual:.4f}"
    )
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
