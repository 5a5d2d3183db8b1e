"""Starts the processes of a job, passes signals on, and ends all of them."""

import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from localsgd_jax.launch.output import Copier, say

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Below the range from which the kernel takes ports for outgoing connections.
PORTS = range(20000, 32768)
LAST_WORDS = 1.0
LAST_LINES = 2.0
# All processes join the group of this one, which outlives the launcher by a moment:
# when nobody holds the other end of its pipe any more, it kills the group. Each line
# in the pipe is a process that has started or, at the second time, ended.
GUARD = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.write(1, b"!")
running = set()
for line in sys.stdin.buffer:
    running ^= {int(line)}
for pid in running:
    try:
        kill = os.killpg if os.getpgid(pid) == pid else os.kill
        kill(pid, signal.SIGKILL)
    except OSError:
        pass
os.killpg(0, signal.SIGKILL)
"""


class Settings(NamedTuple):
    """How a job runs.

    Attributes:
      command: program and arguments.
      processes: how many at first.
      least: how many at least, where one that fails again and again is left out.
      devices: CPU devices or accelerators of each.
      elastic: whether the others go on when one fails that is not process 0.
      restarts: how often a job that failed is started again.
      grace: seconds from a signal that asks to one that kills.
    """

    command: Sequence[str]
    processes: int
    least: int
    devices: int
    elastic: bool
    restarts: int
    grace: float


def launch(settings: Settings) -> int:
    """Runs a job, again if it fails and may be restarted.

    A process that was the first to fail in two starts in a row is left out of the next
    ones with its devices, as long as enough others are left.

    Args:
      settings: how.

    Returns:
      0, or the exit code of the process that failed first (in an elastic job that of
      process 0), as a shell gives it: 128 + n for signal n.

    Raises:
      OSError: if the program cannot be started.
    """
    lots, blamed, code = list(range(settings.processes)), None, 0
    for turn in range(settings.restarts + 1):
        if turn:
            say(f"restart {turn} of {settings.restarts} after exit code {code}")
        run = Run(settings, turn, lots)
        code = run.to_the_end()
        if code == 0 or run.asked or turn == settings.restarts:
            break
        before, blamed = blamed, None if run.first is None else lots[run.first]
        if blamed is not None and blamed == before and len(lots) > settings.least:
            say(f"process {run.first} failed first twice in a row and is left out")
            lots, blamed = [lot for lot in lots if lot != blamed], None
    return code


class Run:
    """The processes of a job from one start to the end of the last of them."""

    def __init__(self, settings: Settings, turn: int, lots: Sequence[int]) -> None:
        """Starts nothing yet.

        Args:
          settings: how.
          turn: number of this start, from 0.
          lots: for each process, which lot of the devices it gets.
        """
        self.settings, self.turn, self.lots = settings, turn, lots
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.planned: list[tuple[float, int, str]] = []
        self.started: list[subprocess.Popen] = []
        self.asked, self.code, self.first = False, 0, None

    def to_the_end(self) -> int:
        """Starts all processes and waits for them; returns the exit code of the job."""
        with _guard() as self.guard:
            # What `nohup` ignores stays ignored, here and in the processes.
            heeded = [n for n in FORWARDED if signal.getsignal(n) != signal.SIG_IGN]
            before = {n: signal.signal(n, self._pass_on) for n in heeded}
            try:
                self._start()
                self._follow()
            finally:
                self._signal(signal.SIGKILL)
                for number, handler in before.items():
                    signal.signal(number, handler)
        return self.code

    def _start(self) -> None:
        """Starts the processes in the group of the guard."""
        port = free_port()
        shared = {
            "LOCALSGD_COORDINATOR": f"127.0.0.1:{port}",
            "LOCALSGD_PROCESSES": str(len(self.lots)),
            "LOCALSGD_JOB": f"{os.getpid()}-{self.turn}",
            "LOCALSGD_RESTARTS": str(self.turn),
            "JAX_NUM_CPU_DEVICES": str(self.settings.devices),
            "PYTHONUNBUFFERED": "1",
            "NPROC": os.environ.get("NPROC", _threads(self.settings.devices)),
        }
        for number, lot in enumerate(self.lots):
            one = subprocess.Popen(
                self.settings.command,
                env=os.environ | shared | _own(number, lot, self.settings.devices),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=self.guard.pid,
            )
            self.started.append(one)
            self._note(one)

    def _note(self, one: subprocess.Popen) -> None:
        """Tells the guard who has started or ended."""
        if pipe := self.guard.stdin:
            with contextlib.suppress(BrokenPipeError):  # It may have been killed.
                os.write(pipe.fileno(), b"%d\n" % one.pid)

    def _follow(self) -> None:
        """Copies output and waits until every process has ended."""
        started = self.started
        copiers = [
            Copier(source, sink, f"[{number}] ", self.events)
            for number, one in enumerate(started)
            for source, sink in ((one.stdout, sys.stdout), (one.stderr, sys.stderr))
            if source
        ]
        for number, one in enumerate(started):
            threading.Thread(
                target=lambda n=number, p=one: self.events.put((n, p.wait())),
                daemon=True,
            ).start()
        running = set(range(len(started)))
        while running:
            number, code = self._next()
            if number is not None:
                running.discard(number)
                self._note(started[number])
            if code:
                self._failed(number, 128 - code if code < 0 else code, bool(running))
            elif number == 0 and running and self.settings.elastic:
                self._finished()
        self._hear_out(copiers)

    def _hear_out(self, copiers: list[Copier]) -> None:
        """Waits for the last lines, unless a signal comes meanwhile."""
        self.planned = []
        deadline = time.monotonic() + LAST_LINES
        while not self.planned and not all(one.ended(deadline) for one in copiers):
            time.sleep(0.01)
        while not self.events.empty():
            _, code = self.events.get()
            if code:
                self._failed(None, 128 - code if code < 0 else code, False)

    def _next(self) -> tuple[int | None, int]:
        """Waits for the end of a process; sends signals whose time has come."""
        while True:
            left = None
            if self.planned:
                left = max(self.planned[0][0] - time.monotonic(), 0)
            try:
                return self.events.get(timeout=left)
            except queue.Empty:
                _, number, why = self.planned.pop(0)
                if why:
                    say(why)
                self._signal(number)

    def _failed(self, number: int | None, code: int, others: bool) -> None:
        """Notes the code of the job, and ends the other processes if they must."""
        matters = not self.settings.elastic or number in (0, None)
        if matters and not self.code:
            self.code = code
        if self.planned:
            return
        if self.first is None:
            self.first = number
        end = matters and others
        if number is not None:
            say(f"process {number} ended with {code}" + "; ending the others" * end)
        if end:
            # What failed there may have failed here, too, and is worth reading.
            self._end(signal.SIGTERM, LAST_WORDS)

    def _finished(self) -> None:
        """Lets nobody hold up a job whose process 0 is done, such as one that hangs."""
        if not self.planned:
            grace = self.settings.grace
            why = f"process 0 ended with 0 {grace:g} s ago; ending the others"
            self._end(signal.SIGTERM, grace, why)

    def _pass_on(self, number: int, frame: object) -> None:
        """Passes a signal on; kills at the second one."""
        self._end(signal.SIGKILL if self.asked else number)
        self.asked = True

    def _end(self, number: int, pause: float = 0, why: str = "") -> None:
        """Asks all processes to end, after a pause, and kills them later."""
        now = time.monotonic() + pause
        kill = (now + self.settings.grace, signal.SIGKILL, "")
        self.planned = [(now, number, why), kill]
        self.events.put((None, 0))  # Wakes up the one who waits.

    def _signal(self, number: int) -> None:
        """Sends a signal to the group, and to those who have left it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.guard.pid, number)
        for one in self.started:
            with contextlib.suppress(ProcessLookupError):
                if one.returncode is None and os.getpgid(one.pid) != self.guard.pid:
                    _signal_leaver(one, number)


def _signal_leaver(one: subprocess.Popen, number: int) -> None:
    """Sends a signal to a process outside the group; SIGKILL to a group of its own."""
    if number == signal.SIGKILL and os.getpgid(one.pid) == one.pid:
        os.killpg(one.pid, number)
    else:
        one.send_signal(number)


def free_port() -> int:
    """Returns a port of this machine that nobody listens at now."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _guard() -> subprocess.Popen:
    """Starts the process in whose group all others are."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    if guard.stdout:  # It listens to no signal from now on.
        guard.stdout.read(1)
    return guard


def _own(number: int, lot: int, devices: int) -> dict[str, str]:
    """Returns the variables in which one process differs from the others."""
    first = lot * devices
    return {
        "LOCALSGD_PROCESS": str(number),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + devices))),
    }


def _threads(devices: int) -> str:
    """Returns how many threads keep JAX 0.10 and 0.11 from starving on CPUs."""
    return str(max(os.cpu_count() or 1, 2 * devices, 8))
