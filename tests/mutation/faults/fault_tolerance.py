"""Faults planted in `localsgd_jax/fault_tolerance/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "accepts a result that other processes failed to compute": Mutant(
        "fault_tolerance/membership.py",
        "if after == before and not failures:",
        "if after == before and error is None:",
        "multi_process/test_fault_tolerance.py -k retried_by_all",
    ),
    "accepts a result although a process has failed": Mutant(
        "fault_tolerance/membership.py",
        "if after == before and not failures:",
        "if not failures:",
        "fault_tolerance/test_membership.py -k membership_changes",
    ),
    "ignores the round deadline": Mutant(
        "fault_tolerance/rounds.py",
        "if run.stop_requested.is_set() or _deadline_passed(run, progress):",
        "if run.stop_requested.is_set():",
        "multi_process/test_fault_tolerance.py -k round_deadline -m full",
    ),
    "synchronises once more at the end": Mutant(
        "fault_tolerance/loop.py",
        "            if reports.is_done.all():\n",
        "            if False:\n",
        "fault_tolerance/test_loop.py -k overlap_matches",
    ),
    "does not save before SIGTERM ends the run": Mutant(
        "fault_tolerance/rounds.py",
        "if progress.status is Status.LEAVING:",
        "if progress.status in (Status.LEAVING, Status.PREEMPTED):",
        "fault_tolerance/test_loop.py -k sigterm_saves",
    ),
    "continues with too few processes": Mutant(
        "fault_tolerance/status.py",
        "if len(live) - len(stopping) < min_processes:",
        "if len(live) < min_processes:",
        "fault_tolerance/test_status.py",
    ),
    "records compute time as wait time": Mutant(
        "fault_tolerance/history.py",
        "wait_seconds = compute_seconds.max() - compute_seconds",
        "wait_seconds = compute_seconds - compute_seconds.min()",
        "multi_process/test_fault_tolerance.py -k wait_times -m full",
    ),
}
