"""Process supervision: starts, restarts and terminates a job, and forwards signals."""

import contextlib
import enum
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from localsgd_jax.distributed.launcher import reaper
from localsgd_jax.distributed.launcher.coordinator import (
    ABORT_CODE,
    CoordinatorMonitor,
    is_stopped,
)
from localsgd_jax.distributed.launcher.output import OutputForwarder, log
from localsgd_jax.distributed.launcher.ports import free_port
from localsgd_jax.distributed.launcher.process_environment import (
    job_environment,
    process_environment,
)

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Peers of a failed process often fail for the same reason and may log it.
TERMINATION_DELAY_SECONDS = 1.0
DRAIN_TIMEOUT_SECONDS = 2.0
DRAIN_POLL_SECONDS = 0.01


class LaunchConfig(NamedTuple):
    """Configuration of a job.

    Attributes:
      command: program and arguments.
      num_processes: number of processes of the first start.
      min_processes: smallest number of processes; limits the exclusion of slots.
      devices_per_process: CPU devices or accelerators of each process.
      elastic: whether the job continues when a process other than 0 fails.
      max_restarts: number of times that a failed job is restarted.
      grace_period: seconds from SIGTERM to SIGKILL, and from the abort of another
        process to SIGKILL of a process 0 that does not respond.
    """

    command: Sequence[str]
    num_processes: int
    min_processes: int
    devices_per_process: int
    elastic: bool
    max_restarts: int
    grace_period: float


class Phase(enum.Enum):
    """Phase of one start of a job."""

    RUNNING = enum.auto()
    TERMINATING = enum.auto()
    KILLED = enum.auto()


class EventKind(enum.Enum):
    """Kind of an event of the monitor loop."""

    PROCESS_EXITED = enum.auto()
    COORDINATOR_HANGS = enum.auto()
    OUTPUT_FAILED = enum.auto()
    TIMERS_CHANGED = enum.auto()


class Event(NamedTuple):
    """Event of the monitor loop.

    Attributes:
      kind: kind of the event.
      code: exit code of the process, or exit code for the failure of the output, as
        `subprocess` gives it: −n for signal n.
      process: index of the process that exited.
    """

    kind: EventKind
    code: int = 0
    process: int = -1


class Timer(NamedTuple):
    """Signal to send to all processes at a given time.

    Attributes:
      time: time on the monotonic clock.
      signal: signal number.
      reason: message to log; empty for none.
    """

    time: float
    signal: int
    reason: str = ""


def launch(config: LaunchConfig) -> int:
    """Runs a job and restarts it after a failure.

    A slot (the devices of one process) whose process is the first to fail in two
    consecutive starts is excluded from later starts, as long as `min_processes` remain.

    Args:
      config: configuration of the job.

    Returns:
      0, or the exit code of the process that failed first (of process 0 in an elastic
      job), as a shell gives it: 128 + n for signal n.

    Raises:
      OSError: if the program cannot be started.
    """
    slots, suspect_slot, code = list(range(config.num_processes)), None, 0
    for restart_count in range(config.max_restarts + 1):
        if restart_count:
            log(
                f"restart {restart_count} of {config.max_restarts} after exit code "
                f"{code}"
            )
        group = WorkerGroup(config, restart_count, slots)
        code = group.run()
        if code == 0 or group.interrupted or restart_count == config.max_restarts:
            break
        previous_suspect, suspect_slot = suspect_slot, group.first_failed_slot
        if (
            suspect_slot is not None
            and suspect_slot == previous_suspect
            and len(slots) > config.min_processes
        ):
            reason = "first to fail in two consecutive starts"
            log(f"excluding slot {suspect_slot}: {reason}")
            slots, suspect_slot = [s for s in slots if s != suspect_slot], None
    return code


class WorkerGroup:
    """Processes of one start of a job.

    Attributes:
      interrupted: whether the launcher has received a signal.
      code: exit code of the job, as a shell gives it.
      first_failed_slot: slot of the process that failed first; None without a failure
        or if the launcher itself ended the job.
    """

    def __init__(
        self, config: LaunchConfig, restart_count: int, slots: Sequence[int]
    ) -> None:
        """Prepares a start; starts no process.

        Args:
          config: configuration of the job.
          restart_count: number of earlier starts.
          slots: device slot of each process.
        """
        self.config, self.restart_count, self.slots = config, restart_count, slots
        self.interrupted, self.code = False, 0
        self.first_failed_slot: int | None = None
        self.phase = Phase.RUNNING
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._timers: list[Timer] = []
        self._processes: list[subprocess.Popen] = []
        self._running: set[int] = set()
        self._port, self._job_id = free_port(), f"{os.getpid()}-{restart_count}"
        self._coordinator = CoordinatorMonitor(
            ("127.0.0.1", self._port),
            self._job_id,
            config.grace_period,
            lambda: self._events.put(Event(EventKind.COORDINATOR_HANGS)),
        )

    def run(self) -> int:
        """Runs all processes to completion; returns the exit code of the job."""
        with start_reaper() as self._reaper:
            # Signals ignored under `nohup` stay ignored, here and in the processes.
            handled = [
                number
                for number in FORWARDED_SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN
            ]
            previous = {n: signal.signal(n, self._forward_signal) for n in handled}
            try:
                self._start()
                self._monitor()
            finally:
                self._coordinator.stop()
                self._signal_all(signal.SIGKILL)
                for number, handler in previous.items():
                    signal.signal(number, handler)
        return self.code

    def _start(self) -> None:
        """Starts the processes in the process group of the reaper."""
        devices, count = self.config.devices_per_process, len(self.slots)
        job_env = job_environment(
            f"127.0.0.1:{self._port}", self._job_id, count, devices, self.restart_count
        )
        for index, slot in enumerate(self.slots):
            process_env = process_environment(index, slot, devices)
            process = subprocess.Popen(
                self.config.command,
                env=os.environ | job_env | process_env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=self._reaper.pid,
            )
            self._processes.append(process)
            self._running.add(index)
            self._notify_reaper(process)
        self._coordinator.supervise([process.pid for process in self._processes])

    def _notify_reaper(self, process: subprocess.Popen) -> None:
        """Notifies the reaper of the start or exit of a process."""
        if pipe := self._reaper.stdin:
            with contextlib.suppress(BrokenPipeError):  # The reaper was killed.
                os.write(pipe.fileno(), b"%d\n" % process.pid)

    def _monitor(self) -> None:
        """Forwards output and handles events until every process has exited."""
        forwarders = [
            OutputForwarder(source, sink, f"[{index}] ", self._report_output_failure)
            for index, process in enumerate(self._processes)
            for source, sink in (
                (process.stdout, sys.stdout),
                (process.stderr, sys.stderr),
            )
            if source
        ]
        for index in range(len(self._processes)):
            threading.Thread(target=self._wait, args=(index,), daemon=True).start()
        while self._running:
            event = self._next_event()
            if event.kind is EventKind.PROCESS_EXITED:
                self._on_exit(event.process, _shell_code(event.code))
            elif event.kind is EventKind.COORDINATOR_HANGS:
                self._on_coordinator_hang()
            elif event.kind is EventKind.OUTPUT_FAILED:
                self._on_output_failure(_shell_code(event.code))
        self._drain_output(forwarders)

    def _wait(self, index: int) -> None:
        """Waits for a process and reports its exit; runs in a thread."""
        code = self._processes[index].wait()
        self._events.put(Event(EventKind.PROCESS_EXITED, code, index))

    def _report_output_failure(self, code: int) -> None:
        """Reports a failure of the output; called from forwarder threads."""
        self._events.put(Event(EventKind.OUTPUT_FAILED, code))

    def _next_event(self) -> Event:
        """Waits for an event; sends the signals of timers that expire meanwhile."""
        while True:
            seconds = None
            if self._timers:
                seconds = max(self._timers[0].time - time.monotonic(), 0)
            try:
                return self._events.get(timeout=seconds)
            except queue.Empty:
                timer = self._timers.pop(0)
                if timer.reason:
                    log(timer.reason)
                self._signal_all(timer.signal)
                if timer.signal == signal.SIGKILL:
                    self.phase = Phase.KILLED

    def _on_exit(self, index: int, code: int) -> None:
        """Records the exit of a process; terminates the others if it ends the job."""
        self._running.discard(index)
        self._notify_reaper(self._processes[index])
        if index:
            self._coordinator.on_peer_exit(index, code)
        decisive = index == 0 or not self.config.elastic
        if code and decisive:
            self.code = self.code or code
        if self.phase is not Phase.RUNNING:
            return
        terminate = decisive and bool(self._running)
        if code:
            if self.first_failed_slot is None:
                self.first_failed_slot = self.slots[self._find_cause(index)]
            suffix = "; terminating the others" if terminate else ""
            log(f"process {index} exited with {code}{suffix}")
            if terminate:
                self._terminate(signal.SIGTERM, TERMINATION_DELAY_SECONDS)
        elif terminate and self.config.elastic:
            # A process that hangs must not block a job whose process 0 is done.
            grace = self.config.grace_period
            reason = f"process 0 exited with 0 {grace:g} s ago; terminating the others"
            self._terminate(signal.SIGTERM, grace, reason)

    def _find_cause(self, index: int) -> int:
        """Returns the process that has failed first; it may be stopped by a signal."""
        pids = {i: self._processes[i].pid for i in sorted(self._running)}
        return next((i for i, pid in pids.items() if is_stopped(pid)), index)

    def _on_coordinator_hang(self) -> None:
        """Kills all processes, as if process 0 had been aborted like the others."""
        if self.phase is not Phase.RUNNING or 0 not in self._running:
            return
        grace = self.config.grace_period
        log(f"process 0 has not responded for {grace:g} s; killing all processes")
        self.code, self.first_failed_slot = ABORT_CODE, self.slots[0]
        self._terminate(signal.SIGKILL)

    def _on_output_failure(self, code: int) -> None:
        """Records a failure of the output and terminates all processes."""
        self.code = self.code or code
        if self.phase is Phase.RUNNING and self._running:
            self._terminate(signal.SIGTERM, TERMINATION_DELAY_SECONDS)

    def _forward_signal(self, number: int, frame: object) -> None:
        """Forwards the first signal; kills all processes at the second."""
        self._terminate(signal.SIGKILL if self.interrupted else number)
        self.interrupted = True

    def _terminate(self, number: int, delay: float = 0, reason: str = "") -> None:
        """Schedules a signal, and SIGKILL after the grace period."""
        start = time.monotonic() + delay
        kill = Timer(start + self.config.grace_period, signal.SIGKILL)
        self.phase = Phase.TERMINATING
        self._timers = [Timer(start, number, reason), kill]
        self._events.put(Event(EventKind.TIMERS_CHANGED))

    def _signal_all(self, number: int) -> None:
        """Sends a signal to the process group and to detached processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._reaper.pid, number)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                if (
                    process.returncode is None
                    and os.getpgid(process.pid) != self._reaper.pid
                ):
                    _signal_detached(process, number)

    def _drain_output(self, forwarders: list[OutputForwarder]) -> None:
        """Waits until the remaining output is written, or for a signal."""
        self._timers = []
        deadline = time.monotonic() + DRAIN_TIMEOUT_SECONDS
        while not self._timers and not all(
            forwarder.is_drained(deadline) for forwarder in forwarders
        ):
            time.sleep(DRAIN_POLL_SECONDS)
        while not self._events.empty():
            event = self._events.get()
            if event.kind is EventKind.OUTPUT_FAILED:
                self._on_output_failure(_shell_code(event.code))


def start_reaper() -> subprocess.Popen:
    """Starts the reaper, the leader of the process group of a job.

    Returns:
      The reaper process; it already ignores the forwarded signals.
    """
    # As a script, because `-m` would import the package and with it JAX.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    if process.stdout:
        process.stdout.read(1)
    return process


def _signal_detached(process: subprocess.Popen, number: int) -> None:
    """Signals a process outside the group; SIGKILL goes to a group that it leads."""
    if number == signal.SIGKILL and os.getpgid(process.pid) == process.pid:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def _shell_code(code: int) -> int:
    """Converts an exit code of `subprocess` to that of a shell."""
    return 128 - code if code < 0 else code
