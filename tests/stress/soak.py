"""Soak test: random signals to jobs under `localsgd launch`, from their start on.

    cd tests && python -m stress.soak --faults 100 --seed 0 --minutes 40

Each job trains on three or four processes under `localsgd launch --elastic --restarts`
and receives up to four faults at random moments, also while its processes start:
SIGKILL, SIGTERM or SIGSTOP to any process, or SIGSTOP followed by SIGCONT to any
process or to the launcher. Writes `docs/_data/soak.json` after each job and continues
from there after an interruption, prints the table of `docs/guides/fault_tolerance.md`,
and exits with 1 if a guarantee was violated.
"""

import collections
import contextlib
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("NPROC", "16")

import jax
from harness.launched_jobs import LaunchedJob, is_running, is_stopped
from harness.paths import ROOT
from programs.fault_tolerant_worker import (
    BATCH,
    WORKERS,
    algorithm,
    data,
    evaluate,
    initial_params,
)
from stress.faults import markdown_table, num_faults, parse_options, run_jobs

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer

STEPS, PERIOD, SAVE_EVERY, PAUSE = 1200, 5, 50, 0.01
HEARTBEAT, SYNC_TIMEOUT, GRACE, RESTARTS = 6, 10.0, 5, 20
SETTINGS = {
    "steps": STEPS,
    "heartbeat": HEARTBEAT,
    "sync_timeout": SYNC_TIMEOUT,
    "pause": PAUSE,
    "save_every": SAVE_EVERY,
}
OPTIONS = ["--elastic", "--restarts", str(RESTARTS), "--grace-period", str(GRACE)]
MAX_FAULTS = 4
# Seconds until SIGCONT: less and more than the heartbeat timeout.
KIND_WEIGHTS = {"SIGKILL": 5, "SIGSTOP": 3, "SIGTERM": 2}
KIND_WEIGHTS |= {"SIGSTOP 2 s": 1, "SIGSTOP 9 s": 2}
LAUNCHER_SHARE, START_UP_SHARE = 0.05, 0.8
# A failure is noticed after the heartbeat timeout and the synchronisation that it
# interrupted, a process 0 that hangs after the grace period, twice if the next fault
# follows at once; then Python and JAX start on a busy machine.
MAX_STALL_SECONDS = 2 * (2 * HEARTBEAT + 2 * GRACE + SYNC_TIMEOUT) + 60
MAX_JOB_SECONDS = 400
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
    """Runs a job to its end; returns its record."""
    rng = random.Random(seed)
    record = {"jax": jax.__version__, "seed": seed, "violations": []}
    record["processes"] = rng.choice((3, 4))
    record["overlap"] = rng.random() < 0.25
    with tempfile.TemporaryDirectory() as directory:
        settings = SETTINGS | {"directory": directory, "overlap": record["overlap"]}
        program = "fault_tolerant_worker.py"
        with LaunchedJob(record["processes"], program, settings, *OPTIONS) as job:
            faults = []
            try:
                inject_faults(rng, job, faults)
                record["code"] = job.end(MAX_JOB_SECONDS)
            except (subprocess.TimeoutExpired, TimeoutError):
                job.print_stacks()
                record["violations"].append(f"hangs: {job.tail(200)}")
            record["seconds"] = round(time.monotonic() - job.start_time, 1)
            describe(record, job, faults, baseline_error)
        if not is_restorable(directory):
            record["violations"].append("the last checkpoint cannot be restored")
    return record


def inject_faults(rng, job, faults):
    """Sends signals until the job has ended or has received all; appends them."""
    for i in range(MAX_FAULTS):
        if rng.random() > (START_UP_SHARE if i == 0 else 0.4):
            if not job.wait_for_row(len(job.rows())):
                break
            time.sleep(3 * rng.random())
        else:  # The processes start, or handle the previous fault.
            time.sleep(0.3 + 5 * rng.random())
        if job.launcher.poll() is not None:
            break
        faults += filter(None, [send_fault(rng, job)])


def send_fault(rng, job):
    """Sends a signal; returns its record, or None if no process runs."""
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    pids = {i: pid for i, pid in job.pids().items() if not is_stopped(pid)}
    target = rng.choice(sorted(pids)) if pids else None
    pid = pids.get(target)
    if rng.random() < LAUNCHER_SHARE:
        target, pid, kind = "launcher", job.launcher.pid, "SIGSTOP 9 s"
    if pid is None:
        return None
    name, *pause = kind.split()
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        return None
    if pause:
        threading.Timer(float(pause[0]), resume, args=(pid,)).start()
    phase = "training" if is_training(job) else "start-up"
    return {"kind": kind, "to": target, "phase": phase, "time": time.monotonic()}


def resume(pid):
    """Sends SIGCONT; ignores a process that has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def is_training(job):
    """Returns whether the current start has completed a round."""
    for message in reversed(list(job.messages)):
        if message.process == 0 and "row" in message.content:
            return True
        if message.process is None and message.content.startswith("restart "):
            return False
    return False


def describe(record, job, faults, baseline_error):
    """Adds faults, their consequences and violated guarantees to a record."""
    rows, restarts = job.rows(), []
    for message in job.messages:
        if message.process is None and message.content.startswith("restart "):
            restarts.append(message.time)
    ends = [fault["time"] for fault in faults[1:]] + [float("inf")]
    for fault, end in zip(faults, ends, strict=True):
        start = fault["time"]
        fault["restarted"] = sum(start <= moment < end for moment in restarts)
        if fault["phase"] == "training":
            fault["stall"] = longest_interval([t for t, _ in rows], start, end)
        fault["time"] = round(start - job.start_time, 1)
    record |= {"faults": faults, "restarts": len(restarts)}
    record["steps_lost"] = steps_lost(job.messages)
    times = [job.start_time, *(moment for moment, _ in rows)]
    record["stall"] = longest_interval(times, 0, float("inf"))
    if record["stall"] > MAX_STALL_SECONDS:
        record["violations"].append(f"no round for {record['stall']} s: {job.tail()}")
    if record.get("code") != 0:
        record["violations"].append(f"exit code {record.get('code')}: {job.tail()}")
        return
    if running := [pid for pid in all_pids(job.messages) if is_running(pid)]:
        record["violations"].append(f"still running: {running}")
    error = final_error(job.messages)
    record["error"] = error
    if abs(error / baseline_error - 1) > 0.02:
        record["violations"].append(f"error {error} against {baseline_error}")


def longest_interval(times, start, end):
    """Returns the longest time between two rows that overlaps a span, in seconds."""
    pairs = [(a, b) for a, b in itertools.pairwise(times) if b > start and a < end]
    return round(max((b - max(a, start) for a, b in pairs), default=0.0), 1)


def steps_lost(messages):
    """Returns the steps that each restart has taken back."""
    lost, last, seen = [], None, 0
    for message in list(messages):
        if message.process != 0:
            continue
        if "row" in message.content:
            last = message.content["row"]["step"]
        elif "from" in message.content and seen:
            lost.append((last or 0) - message.content["from"])
        seen += "from" in message.content
    return lost


def all_pids(messages):
    """Returns the process ids that all starts have printed."""
    contents = [m.content for m in list(messages) if isinstance(m.content, dict)]
    return [content["pid"] for content in contents if "pid" in content]


def final_error(messages):
    """Returns the error in the history that process 0 has printed."""
    contents = [m.content for m in list(messages) if m.process == 0]
    return next(c["history"] for c in contents if "history" in c)["error"][-1]


def is_restorable(directory):
    """Returns whether the last checkpoint, if there is any, can be restored."""
    cluster = lsgd.simulate(algorithm(), 1)
    try:
        with RunCheckpointer(directory, cluster) as checkpointer:
            checkpointer.restore(cluster.init(initial_params()))
    except CheckpointError:
        return False
    return True


def table(records):
    """Returns a Markdown table of faults, restarts and stalls."""
    names = "fault, to, during, times, job restarted, longest stall (median)"
    groups = collections.defaultdict(list)
    for record in records:
        for fault in record["faults"]:
            to = fault["to"]
            target = {"launcher": "the launcher", 0: "process 0"}.get(to, "another")
            groups[fault["kind"], target, fault["phase"]].append(fault)
    rows = [names.split(", "), ["---"] * 6]
    for key in sorted(groups):
        stalls = [fault["stall"] for fault in groups[key] if "stall" in fault]
        restarted = sum(fault["restarted"] > 0 for fault in groups[key])
        stall = (
            f"{max(stalls)} s ({statistics.median(stalls):.1f} s)" if stalls else "–"
        )
        rows.append([*key, len(groups[key]), restarted, stall])
    return markdown_table(rows)


def main():
    options, baseline = parse_options(RESULTS), fault_free_error()
    about = {"fault_free_error": baseline, "settings": SETTINGS, "launch": OPTIONS}
    records = run_jobs(options, about, lambda seed: run_job(seed, baseline))
    print(table(records))
    violations = [record for record in records if record["violations"]]
    errors = [abs(record.get("error", baseline) / baseline - 1) for record in records]
    lost = [steps for record in records for steps in record["steps_lost"]]
    print(
        f"{len(records)} jobs, {num_faults(records)} faults, {len(lost)} restarts "
        f"with at most {max(lost, default=0)} steps lost, {len(violations)} "
        f"violations; errors within {100 * max(errors):.2f} % of {baseline:.4f}"
    )
    sys.exit(bool(violations) or num_faults(records) < options.faults)


if __name__ == "__main__":
    main()
