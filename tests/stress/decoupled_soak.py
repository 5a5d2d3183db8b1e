"""Soak test: random signals to the processes of decoupled jobs on a Ray cluster.

    cd tests && python -m stress.decoupled_soak --faults 100 --seed 0 --minutes 40

Each job trains with four learners on two nodes of a Ray cluster on this machine, beside
a head node without CPUs, and receives faults at random moments until it ends: SIGKILL
or SIGSTOP to a learner, the syncer or the raylet of a node. A node whose raylet was
killed is replaced by a new one. Writes `docs/_data/decoupled_soak.json` after each job
and continues from there after an interruption, prints the table of
`docs/guides/decoupled.md`, and exits with 1 if a guarantee was violated.
"""

import collections
import contextlib
import itertools
import os
import pathlib
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
from harness.decoupled_jobs import full_loss, make_job
from harness.decoupled_processes import DecoupledProcess, is_running, parent
from harness.paths import ROOT
from stress.faults import markdown_table, num_faults, parse_options, run_jobs

from localsgd_jax import decoupled

LEARNERS, QUORUM, GRACE, STEPS, PAUSE, TIMEOUT = 4, 2, 0.5, 6400, 0.05, 30.0
SETTINGS = {
    "learners": [1, LEARNERS],
    "nodes": [2, 2],
    "quorum": [QUORUM, GRACE],
    "steps": STEPS,
    "pause": PAUSE,
    "save_every": 200,
    "restarts": 20,
    "timeout": TIMEOUT,
}
# Signal, target, seconds until SIGCONT; a learner or syncer that stays stopped is
# replaced after TIMEOUT seconds.
KINDS = {
    ("SIGKILL", "learner"): 5,
    ("SIGSTOP 3 s", "learner"): 3,
    ("SIGSTOP", "learner"): 2,
    ("SIGKILL", "syncer"): 3,
    ("SIGSTOP 3 s", "syncer"): 2,
    ("SIGSTOP", "syncer"): 1,
    ("SIGKILL", "raylet"): 3,
    ("SIGSTOP 3 s", "raylet"): 1,
}
MIN_INTERVAL, MAX_INTERVAL, MAX_FAULTS = 1.0, 14.0, 30
LAST_FAULT_STEPS = 0.8 * STEPS
# Start of Ray, Python and JAX on a busy machine.
MAX_RETURN_SECONDS, MAX_JOB_SECONDS = 120.0, 900
MAX_STALL_SECONDS = GRACE + 1
# Without a syncer all learners wait; until it is back, stalls are not those of others.
SYNCER_SECONDS = 60.0
RESULTS = ROOT / "docs" / "_data" / "decoupled_soak.json"


def undisturbed_loss():
    """Returns the loss at the end of a run without faults on a virtual clock."""
    job = make_job(steps=STEPS, merge=decoupled.quorum(QUORUM, GRACE))
    return full_loss(decoupled.simulate(job, decoupled.Clock(LEARNERS))[0])


class Processes:
    """Process ids of the learners of a job, from files that they write.

    A line of the file of a learner holds a time and a process id.
    """

    def __init__(self, directory):
        """Stores the directory of the files."""
        self._directory = pathlib.Path(directory)

    def starts(self, learner):
        """Returns the times and process ids of a learner, in order."""
        path = self._directory / f"learner-{learner}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(float(time), int(pid)) for time, pid in map(str.split, lines)]

    def running(self):
        """Returns the current process id of each learner that runs."""
        last = {k: self.starts(k)[-1:] for k in range(LEARNERS)}
        return {k: x[0][1] for k, x in last.items() if x and is_running(x[0][1])}


def run_job(seed, baseline_loss):
    """Runs a job to its end; returns its record."""
    rng = random.Random(seed)
    record = {"jax": jax.__version__, "seed": seed, "violations": []}
    with tempfile.TemporaryDirectory() as directory:
        processes = Processes(directory)
        settings = SETTINGS | {
            "checkpoint": os.path.join(directory, "run"),
            "starts": directory,
        }
        start = time.monotonic()
        with DecoupledProcess(**settings) as job:
            faults = inject_faults(rng, job, processes)
            try:
                result = job.end(MAX_JOB_SECONDS)
                check_result(record, result, baseline_loss)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                tail = "".join(job.output[-10:])
                record["violations"].append(f"{type(error).__name__}: {tail}")
            record["seconds"] = round(time.monotonic() - start, 1)
            describe(record, job.rows, faults, processes)
    return record


def inject_faults(rng, job, processes):
    """Sends signals until the job has ended; returns them."""
    faults, nodes = [], len(SETTINGS["nodes"])
    with contextlib.suppress(AssertionError):
        job.wait_for(lambda rows: len(processes.running()) == LEARNERS and rows)
        while job.process.poll() is None and len(faults) < MAX_FAULTS:
            time.sleep(rng.uniform(MIN_INTERVAL, MAX_INTERVAL))
            # A node is replaced, whether it was killed or Ray has found it dead.
            lost = len(job.raylets) - sum(map(is_running, job.raylets))
            if lost > nodes - len(SETTINGS["nodes"]):
                nodes += 1
                add_node(job)
            if job.process.poll() is None and job.rows[-1]["steps"] < LAST_FAULT_STEPS:
                faults += filter(None, [send_fault(rng, job, processes)])
    return faults


def send_fault(rng, job, processes):
    """Sends a signal; returns its record, or None without a target."""
    kind, target = rng.choices(list(KINDS), list(KINDS.values()))[0]
    running = processes.running()
    syncers, raylets = job.pids("syncer"), list(filter(is_running, job.raylets))
    pids = {"learner": list(running.values()), "syncer": syncers, "raylet": raylets}
    if not (candidates := sorted(pids[target])):
        return None
    pid = rng.choice(candidates)
    lost = [k for k, p in running.items() if pid in (p, parent(p))]
    hosts_syncer = any(pid in (p, parent(p)) for p in syncers)
    name, *pause = kind.split()
    fault = {"kind": kind, "to": target, "learners": lost, "syncer": hosts_syncer}
    fault["time"] = time.monotonic()
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        return None
    if pause:
        threading.Timer(float(pause[0]), resume, args=(pid,)).start()
    return fault


def resume(pid):
    """Sends SIGCONT; ignores a process that has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def add_node(job):
    """Starts a node; ignores a job that has ended."""
    with contextlib.suppress(OSError, ValueError):
        job.add_node(2)


def check_result(record, result, baseline_loss):
    """Adds the result of a job and its violated guarantees to a record."""
    record |= result
    if abs(result["loss"] / baseline_loss - 1) > 0.02:
        record["violations"].append(f"loss {result['loss']} against {baseline_loss}")
    if not result["equal"] or result["different"]:
        record["violations"].append("the replayed run differs")


def describe(record, rows, faults, processes):
    """Adds faults, their consequences and violated guarantees to a record."""
    times = contribution_times(rows)
    disturbed = [(f["time"], back_at(f, times, processes), f) for f in faults]
    last = max((t for column in times.values() for t in column), default=0.0)
    for index, (start, back, fault) in enumerate(disturbed):
        later = [f["time"] for f in faults[index + 1 :]]
        end = min([start + TIMEOUT, *later])
        fault["stall"] = longest_stall(times, (start, end), disturbed)
        if fault["learners"] and back is not None:
            fault["return"] = round(back - start, 1)
        elif fault["learners"] and last - start > MAX_RETURN_SECONDS:
            text = f"learner {fault['learners']} did not contribute again: {fault}"
            record["violations"].append(text)
        fault["syncer answers"] = not is_near_syncer_fault(fault, faults)
        if fault["syncer answers"] and (fault["stall"] or 0) > MAX_STALL_SECONDS:
            record["violations"].append(f"stall of {fault['stall']} s: {fault}")
    first = faults[0]["time"] if faults else 0.0
    for fault in faults:
        fault["time"] = round(fault["time"] - first, 1)
    record["faults"] = faults


def is_near_syncer_fault(fault, faults):
    """Returns whether the syncer was disturbed shortly before or after a fault."""
    times = [other["time"] - fault["time"] for other in faults if other["syncer"]]
    return any(-SYNCER_SECONDS < seconds < TIMEOUT for seconds in times)


def contribution_times(rows):
    """Returns the times of the merges with a contribution of each learner.

    The clock of the syncer is compared with that of this process: a row arrives later
    than its merge, by a time that is nearly 0 for one of them.
    """
    offset = min((row["now"] - row["seconds"] for row in rows), default=0.0)
    times = {k: [] for k in range(LEARNERS)}
    for row in rows:
        for learner in row["learners"]:
            times[learner].append(row["seconds"] + offset)
    return times


def back_at(fault, times, processes):
    """Returns when all learners of a fault have contributed again.

    A learner that was killed must have a new process; a stopped one may continue.
    """
    moments = []
    for learner in fault["learners"]:
        start = fault["time"]
        if fault["kind"] == "SIGKILL":
            starts = [moment for moment, _ in processes.starts(learner)]
            start = min((moment for moment in starts if moment > start), default=None)
        else:
            start += GRACE + PAUSE  # What it has sent before may still be merged.
        later = [t for t in times[learner] if start is not None and t > start]
        if not later:
            return None
        moments.append(later[0])
    return max(moments, default=fault["time"])


def longest_stall(times, span, disturbed):
    """Returns how much longer than usual a survivor went without contribution.

    Args:
      times: times of the contributions of each learner.
      span: time of a fault and of the end of its consequences.
      disturbed: time, time of return and record of all faults; their learners are no
        survivors in between.

    Returns:
      Seconds above the median interval; None without a survivor.
    """
    stalls = []
    for learner, column in times.items():
        pairs = list(itertools.pairwise(column))
        if not pairs:
            continue
        usual = statistics.median(b - a for a, b in pairs)
        own = [
            (start, float("inf") if back is None else back)
            for start, back, fault in disturbed
            if learner in fault["learners"]
        ]
        stalls += [
            b - max(a, span[0]) - usual
            for a, b in pairs
            if b > span[0]
            and a < span[1]
            and not any(a < back and b > start for start, back in own)
        ]
    return round(max(*stalls, 0.0), 2) if stalls else None


def table(records):
    """Returns a Markdown table of faults, stalls and returns.

    Stalls after faults of learners and nodes are those while the syncer answered.
    """
    names = "fault, to, times, longest stall of another learner (median), "
    names += "longest time to the next contribution (median)"
    groups = collections.defaultdict(list)
    for record in records:
        for fault in record["faults"]:
            node = fault["to"] == "raylet" and fault["syncer"]
            target = "the raylet of the syncer" if node else f"a {fault['to']}"
            target = target.replace("a syncer", "the syncer")
            clean = not is_near_syncer_fault(fault, record["faults"])
            stall = fault["stall"] if fault["syncer"] or clean else None
            groups[fault["kind"], target].append((stall, fault.get("return")))
    rows = [names.split(", "), ["---"] * 5]
    for key in sorted(groups):
        rows.append([*key, len(groups[key])])
        for column in zip(*groups[key], strict=True):
            values = [x for x in column if x is not None]
            median = values and statistics.median(values)
            rows[-1].append(f"{max(values):.1f} s ({median:.1f} s)" if values else "–")
    return markdown_table(rows)


def main():
    options, baseline = parse_options(RESULTS), undisturbed_loss()
    about = {"undisturbed_loss": baseline, "settings": SETTINGS}
    records = run_jobs(options, about, lambda seed: run_job(seed, baseline))
    print(table(records))
    violations = [record for record in records if record["violations"]]
    errors = [abs(record.get("loss", baseline) / baseline - 1) for record in records]
    print(
        f"{len(records)} jobs, {num_faults(records)} faults, {len(violations)} jobs "
        f"with violations; losses within {100 * max(errors):.2f} % of {baseline:.4f}"
    )
    sys.exit(bool(violations) or num_faults(records) < options.faults)


if __name__ == "__main__":
    main()
