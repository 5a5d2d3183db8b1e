"""A decoupled job on Ray in a child process, which reports its rows as lines."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import uuid

from harness.paths import ROOT, TESTS

PROGRAM = TESTS / "programs" / "decoupled_run.py"
# For a busy machine: Ray starts slowly, and its workers have the lowest priority.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "RAY_raylet_start_wait_time_s": "150",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}
ROLES = {"learner": "ray::LearnerActor", "syncer": "ray::SyncerActor"}


class DecoupledProcess:
    """Process group of a run.

    Attributes:
      rows: rows of its history so far, with the time of their arrival as "now".
      raylets: process ids of the raylets of the nodes that were started.
    """

    def __init__(self, **settings):
        """Starts the program with settings as JSON."""
        path = os.pathsep.join([str(ROOT), str(TESTS)])
        self.rows, self.raylets, self.result = [], [], None
        # All processes of the run inherit this variable.
        self.token = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ
            | ENVIRONMENT
            | {"PYTHONPATH": path}
            | {"DECOUPLED_TEST": self.token},
        )
        self.output = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def _read(self):
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith('{"row"'):
                self.rows.append(json.loads(line)["row"] | {"now": time.monotonic()})
            elif line.startswith('{"raylet"'):
                self.raylets.append(json.loads(line)["raylet"])
            elif line.startswith('{"result"'):
                self.result = json.loads(line)["result"]

    def wait_for(self, condition, seconds=240):
        """Waits until a condition on the rows holds."""
        end = time.monotonic() + seconds
        while not condition(self.rows):
            tail = "".join(self.output[-20:])
            assert self.process.poll() is None and time.monotonic() < end, tail
            time.sleep(0.05)

    def add_node(self, cpus):
        """Starts a further node of the cluster."""
        self.process.stdin.write(f"{cpus}\n")
        self.process.stdin.flush()

    def pids(self, role):
        """Returns the process ids of the actors of a role, ascending."""
        found = []
        for pid in self._descendants():
            title = command_line(pid)
            if title.startswith(ROLES[role]):
                found.append(pid)
        return sorted(found)

    def _descendants(self):
        """Returns the processes that the run has started."""
        found = []
        for path in pathlib.Path("/proc").iterdir():
            try:
                if path.name.isdigit() and self.token in (path / "environ").read_text():
                    found.append(int(path.name))
            except (OSError, UnicodeDecodeError):
                continue
        return found

    def end(self, seconds=300):
        """Returns the result at the end of the run."""
        self.process.wait(seconds)
        tail = "".join(self.output[-30:])
        assert self.process.returncode == 0, tail
        return self.result

    def kill(self):
        """Ends all processes of the run."""
        pids = [*self._descendants(), self.process.pid]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.reader.join(10)
        self.process.stdout.close()
        self.process.stdin.close()


def command_line(pid):
    """Returns the title of a process."""
    try:
        text = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
    return re.sub("\0", " ", text).strip()


def is_running(pid):
    """Returns whether a process runs or is stopped."""
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def parent(pid):
    """Returns the process id of the parent, 0 without one."""
    return int((_stat(pid)[1:2] or [0])[0])


def _stat(pid):
    """Returns the fields of a process from its state on."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
