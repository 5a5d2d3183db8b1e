"""Faults planted in `localsgd_jax/distributed/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "accepts a process of another job": Mutant(
        "distributed/rendezvous.py",
        "if peer_job_id != job_id:",
        "if False:",
        "distributed/test_rendezvous.py -k foreign_process",
    ),
    "does not report mismatches": Mutant(
        "distributed/rendezvous.py",
        "problems = describe_mismatches(fingerprints)",
        "problems = []",
        "distributed/test_rendezvous.py -k mismatch_raises",
    ),
    "opens the coordinator's port to all machines": Mutant(
        "distributed/environment.py",
        "LOOPBACK.get(host, '[::]')",
        "'[::]'",
        "distributed/test_environment.py -k loopback",
    ),
    "does not name the missing process": Mutant(
        "distributed/_jax_internals.py",
        "return sorted(map(int, numbers))",
        "return []",
        "distributed/test_coordination.py -k missing_process",
    ),
    "reads messages of an earlier exchange": Mutant(
        "distributed/coordination.py",
        "self._num_exchanges + 1",
        "self._num_exchanges",
        "distributed/test_coordination.py -k same_messages",
    ),
    "mixes processes in a worker": Mutant(
        "distributed/meshes.py",
        "return [groups[key] for key in sorted(groups)]",
        "return [list(devices)]",
        "distributed/test_meshes.py -k across",
    ),
    "does not terminate the other processes": Mutant(
        "distributed/launcher/job.py",
        "terminate = decisive and bool(self._running)",
        "terminate = False",
        "distributed/test_launcher.py -k failure_terminates_job",
    ),
    "leaves orphans when it is killed": Mutant(
        "distributed/launcher/reaper.py",
        "os.killpg(0, signal.SIGKILL)",
        "pass",
        "distributed/test_launcher.py -k launcher_is_killed",
    ),
    "returns the last exit code": Mutant(
        "distributed/launcher/job.py",
        "        if code and decisive:\n            self.code = self.code or code",
        "        if code and decisive:\n            self.code = code",
        "distributed/test_launcher.py -k peers_may_log",
    ),
    "compiles the replication of metrics in every round": Mutant(
        "distributed/arrays.py",
        "@functools.cache\n",
        "",
        "multi_process/test_training.py -k compiled_once",
    ),
}
