"""Faults planted in `localsgd_jax/distributed/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "accepts a process of another job": Mutant(
        "distributed/registration.py",
        "if peer_job_id != job_id:",
        "if False:",
        "distributed/test_rendezvous.py -k foreign_process",
    ),
    "does not report mismatches": Mutant(
        "distributed/rendezvous.py",
        "problems = [failure, *describe_mismatches(server.fingerprints)]",
        "problems = [failure]",
        "distributed/test_rendezvous.py -k mismatch_raises",
    ),
    "waits for a slow client without a limit": Mutant(
        "distributed/registration.py",
        "if now >= client.deadline:",
        "if False:",
        "distributed/test_rendezvous.py -k slow_client_is_disconnected",
    ),
    "waits for missing processes without a limit": Mutant(
        "distributed/registration.py",
        "            if now >= deadline:\n",
        "            if False:\n",
        "distributed/test_rendezvous.py -k do_not_extend",
    ),
    "does not notice that a registered process is stopped": Mutant(
        "distributed/registration.py",
        "elif now - client.last_response >= self._heartbeat_timeout:",
        "elif False:",
        "distributed/test_rendezvous.py -k stopped_process_raises",
    ),
    "ignores reports of the launcher": Mutant(
        "distributed/registration.py",
        "if type(failed) is int and",
        "if False and",
        "distributed/test_rendezvous.py -k reported_by_the_launcher",
    ),
    "waits for a failed process until the timeout": Mutant(
        "distributed/coordination.py",
        "wait = self._wait_for_live if job_state.recoverable else self._wait_for_all",
        "wait = self._wait_for_all",
        "distributed/test_coordination.py -k failed_process_is_named",
    ),
    "accepts a barrier that the other processes have given up": Mutant(
        "distributed/coordination.py",
        "if reasons := client.key_value_dir_get(timeouts):",
        "if reasons := []:",
        "distributed/test_coordination.py -k missing_process",
    ),
    "waits for a process 0 that hangs": Mutant(
        "distributed/launcher/coordinator.py",
        "return reply is Reply.NO_ANSWER and must_answer",
        "return False",
        "distributed/test_launcher.py -k hanging_process_0",
    ),
    "waits for a process 0 that is stopped at the start": Mutant(
        "distributed/launcher/coordinator.py",
        "            return stopped\n",
        "            return False\n",
        "distributed/test_launcher.py -k hanging_process_0",
    ),
    "kills a process 0 that works when another one is aborted": Mutant(
        "distributed/launcher/coordinator.py",
        "return reply is Reply.NO_ANSWER and must_answer",
        "return must_answer",
        "distributed/test_launcher.py -k abort_of_a_process",
    ),
    "aborts at the exit when an abandoned call returns": Mutant(
        "distributed/background.py",
        "@atexit.register\n",
        "",
        "distributed/test_background.py -k exit_code",
    ),
    "continues after a failed initialisation": Mutant(
        "distributed/shutdown.py",
        "if not (is_connected or job_state.has_peers):",
        "if not is_connected:",
        "distributed/test_background.py -k failed_initialization",
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
    "transfers the rows of other workers": Mutant(
        "distributed/arrays.py",
        "rows = slice(first[start], first[start] + stop - start)",
        "rows = slice(0, stop - start)",
        "multi_process/test_batch_layouts.py",
    ),
    "has no layout for parts of a slice": Mutant(
        "distributed/meshes.py",
        "except (AssertionError, NotImplementedError):",
        "except NotImplementedError:",
        "distributed/test_meshes.py -k parts_of_slices",
    ),
}
