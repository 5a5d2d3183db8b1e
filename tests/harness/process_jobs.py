"""Jobs of real processes: run to completion, or read and signalled while they run."""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time

from harness.paths import PROGRAMS, PYTHONPATH

from localsgd_jax.distributed.launcher.ports import free_port


class Job:
    """Processes of `fault_tolerant_worker.py`, read while they run.

    Attributes:
      started: the processes.
      seen: lines of output of each process.
      lines: JSON lines of all processes, as a queue.
    """

    def __init__(self, processes, **settings):
        """Starts the processes."""
        port = free_port()
        self.lines = queue.SimpleQueue()
        self.started, self.seen = [], [[] for _ in range(processes)]
        self.readers = []
        for process in range(processes):
            variables = {
                "LOCALSGD_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "LOCALSGD_NUM_PROCESSES": str(processes),
                "LOCALSGD_PROCESS_ID": str(process),
                "JAX_NUM_CPU_DEVICES": "1",
                "PYTHONPATH": PYTHONPATH,
                "PYTHONUNBUFFERED": "1",
            }
            started = subprocess.Popen(
                [sys.executable, "fault_tolerant_worker.py", json.dumps(settings)],
                cwd=PROGRAMS,
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.started.append(started)
            reader = threading.Thread(target=self._read, args=(process, started.stdout))
            self.readers.append(reader)
            reader.start()

    def _read(self, process, source):
        """Reads the output of a process; runs in a thread."""
        with source:
            for line in source:
                self.seen[process].append(line.rstrip())
                if line[:1] == "{":
                    self.lines.put(json.loads(line))

    def wait_for_row(self, step, timeout=60):
        """Waits until process 0 has printed the row of a step or a later one."""
        deadline = time.monotonic() + timeout
        while True:
            line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            if line.get("row", {}).get("step", -1) >= step:
                return line["row"]

    def send(self, process, number):
        """Sends a signal to a process."""
        self.started[process].send_signal(number)

    def end(self, timeout=90):
        """Waits for processes that are not stopped; returns exit codes or None."""
        deadline = time.monotonic() + timeout
        codes = []
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                while process.poll() is None and not is_stopped(process.pid):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"still running: {self.tail()}")
                    time.sleep(0.05)
            codes.append(process.poll())
        return codes

    def history(self, process=0):
        """Returns the history that a process has printed."""
        for line in self.seen[process]:
            if line.startswith('{"process"'):
                return json.loads(line)["history"]
        raise AssertionError(self.tail())

    def tail(self):
        """Returns the last lines of each process, for messages."""
        return ["\n".join(lines[-12:])[-2500:] for lines in self.seen]

    def __enter__(self):
        """Returns the job."""
        return self

    def __exit__(self, *error):
        """Kills processes that still run."""
        for process in self.started:
            process.kill()
            process.wait()
        for reader in self.readers:
            reader.join()


def is_stopped(pid):
    """Returns whether a process is stopped by a signal."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][1] == "T"
    except FileNotFoundError:
        return False


def run(script, processes):
    """Runs a program of `tests/programs` to completion in several processes.

    Args:
      script: file name; it is called with COORDINATOR PROCESSES PROCESS.
      processes: number of processes.

    Returns:
      The JSON line that each process has printed, in the order of the processes.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    command = [sys.executable, script, coordinator, str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(process)],
            cwd=PROGRAMS,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    lines = [line for out, _ in outputs for line in out.splitlines() if line[:1] == "{"]
    assert len(lines) == processes, [err[-2000:] for _, err in outputs]
    codes = [process.returncode for process in started]
    assert codes == [0] * processes, [err[-2000:] for _, err in outputs]
    assert not any("Exception ignored" in err for _, err in outputs), outputs
    return [json.loads(line) for line in lines]
