"""Jobs under `localsgd launch`, read and signalled while they run."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from harness.paths import PROGRAMS, PYTHONPATH

LINE = re.compile(r"\[(\d+)\] (\{.*)")


class Message(NamedTuple):
    """Line of JSON of a process, or message of the launcher.

    Attributes:
      time: arrival on the monotonic clock.
      process: index of the process; None for the launcher.
      content: values of the JSON, or the text of the launcher.
    """

    time: float
    process: int | None
    content: dict | str


class LaunchedJob:
    """Launcher with its processes, as a context manager.

    Attributes:
      launcher: the process of the launcher.
      messages: messages in the order of their arrival.
      lines: all lines of output.
    """

    def __init__(self, processes, program, settings, *options):
        """Starts the launcher.

        Args:
          processes: number of processes.
          program: file of `tests/programs`.
          settings: argument of the program, as JSON.
          *options: further options of the launcher.
        """
        self.messages, self.lines = [], []
        command = [sys.executable, "-m", "localsgd_jax", "launch", "-n", str(processes)]
        self.launcher = subprocess.Popen(
            [*command, *options, "--", sys.executable, program, json.dumps(settings)],
            cwd=PROGRAMS,
            env=os.environ | {"PYTHONPATH": PYTHONPATH, "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.start_time = time.monotonic()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        """Reads the output; runs in a thread."""
        with self.launcher.stdout as source:
            for line in source:
                now = time.monotonic()
                self.lines.append(line.rstrip())
                if text := line.partition("localsgd launch: ")[2]:
                    self.messages.append(Message(now, None, text.rstrip()))
                elif match := LINE.match(line):
                    with contextlib.suppress(ValueError):
                        content = json.loads(match[2])
                        self.messages.append(Message(now, int(match[1]), content))

    def pids(self):
        """Returns the process ids of the current start by process index."""
        return {index: pid for index, (pid, _) in self._processes().items()}

    def environment(self, process):
        """Returns the environment variables of a process; empty before it starts."""
        return self._processes().get(process, (0, {}))[1]

    def _processes(self):
        """Returns process id and environment of the children by process index."""
        found = {}
        for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(status.read_text().rpartition(")")[2].split()[1])
                if parent == self.launcher.pid:
                    variables = (status.parent / "environ").read_text().split("\0")
                    values = dict(v.split("=", 1) for v in variables if "=" in v)
                    if index := values.get("LOCALSGD_PROCESS_ID"):
                        found[int(index)] = int(status.parent.name), values
        return found

    def rows(self):
        """Returns time and content of the rows that process 0 has printed."""
        return [
            (message.time, message.content["row"])
            for message in list(self.messages)
            if message.process == 0 and "row" in message.content
        ]

    def wait_for_row(self, count, timeout=120):
        """Waits for more than a number of rows; returns False if the job has ended."""
        deadline = time.monotonic() + timeout
        while len(self.rows()) <= count:
            if self.launcher.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(self.tail())
            time.sleep(0.05)
        return True

    def end(self, timeout):
        """Waits for the launcher; returns its exit code."""
        code = self.launcher.wait(timeout)
        self._reader.join(10)
        return code

    def tail(self, count=30):
        """Returns the last lines, for messages."""
        return "\n".join(line[:300] for line in self.lines[-count:])

    def print_stacks(self):
        """Ends a job that hangs; each process that runs prints its stacks."""
        for pid in (*self.pids().values(), self.launcher.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # A stopped process stays stopped.
            time.sleep(1)

    def __enter__(self):
        """Returns the job."""
        return self

    def __exit__(self, *error):
        """Kills the launcher, and by its reaper all processes."""
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGKILL)
        self.launcher.wait()
        self._reader.join(20)


def is_running(pid):
    """Returns whether a process exists and is not a zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def is_stopped(pid):
    """Returns whether a process is stopped by a signal."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"
