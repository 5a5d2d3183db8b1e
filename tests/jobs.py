"""Jobs of real processes: to be disturbed, and to run to their end."""

import contextlib
import json
import os
import pathlib
import queue
import random
import socket
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).parent


class Job:
    """Processes of `resilient_process.py` that are read while they run."""

    def __init__(self, processes, **settings):
        """Starts them."""
        port = free_port()
        self.lines = queue.SimpleQueue()
        self.started, self.seen = [], [[] for _ in range(processes)]
        self.readers = []
        for process in range(processes):
            place = {
                "LOCALSGD_COORDINATOR": f"127.0.0.1:{port}",
                "LOCALSGD_PROCESSES": str(processes),
                "LOCALSGD_PROCESS": str(process),
                "JAX_NUM_CPU_DEVICES": "1",
                "PYTHONPATH": str(HERE.parent),
                "PYTHONUNBUFFERED": "1",
            }
            one = subprocess.Popen(
                [sys.executable, "resilient_process.py", json.dumps(settings)],
                cwd=HERE,
                env=os.environ | place,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.started.append(one)
            reader = threading.Thread(target=self._read, args=(process, one.stdout))
            self.readers.append(reader)
            reader.start()

    def _read(self, process, source):
        with source:
            for line in source:
                self.seen[process].append(line.rstrip())
                if line[:1] == "{":
                    self.lines.put(json.loads(line))

    def until_row(self, step, timeout=60):
        """Waits until process 0 has written the row of that step or a later one."""
        deadline = time.monotonic() + timeout
        while True:
            line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            if line.get("row", {}).get("step", -1) >= step:
                return line["row"]

    def send(self, process, number):
        """Sends a signal."""
        self.started[process].send_signal(number)

    def end(self, timeout=90):
        """Waits for those who are not stopped; returns exit codes, None for these."""
        deadline = time.monotonic() + timeout
        codes = []
        for one in self.started:
            with contextlib.suppress(ProcessLookupError):
                while one.poll() is None and not stopped(one.pid):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"still running: {self.tail()}")
                    time.sleep(0.05)
            codes.append(one.poll())
        return codes

    def history(self, process=0):
        """Returns the history that a process has printed."""
        for line in self.seen[process]:
            if line.startswith('{"process"'):
                return json.loads(line)["history"]
        raise AssertionError(self.tail())

    def tail(self):
        """The last lines of all, for messages."""
        return ["\n".join(lines[-12:])[-2500:] for lines in self.seen]

    def __enter__(self):
        """Returns itself."""
        return self

    def __exit__(self, *error):
        """Leaves nothing behind."""
        for one in self.started:
            one.kill()
            one.wait()
        for reader in self.readers:
            reader.join()


def stopped(pid):
    """Whether a process is stopped by a signal."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][1] == "T"
    except FileNotFoundError:
        return False


def free_port():
    """A port below those that the kernel gives away."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe:
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def run(script, processes):
    """Runs the processes; returns what each has printed, in their order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, script, coordinator, str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(process)],
            cwd=HERE,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        ended = [one.communicate(timeout=120) for one in started]
    finally:
        for one in started:
            one.kill()
    lines = [line for out, _ in ended for line in out.splitlines() if line[:1] == "{"]
    assert len(lines) == processes, [err[-2000:] for _, err in ended]
    codes = [one.returncode for one in started]
    assert codes == [0] * processes, [err[-2000:] for _, err in ended]
    assert not any("Exception ignored" in err for _, err in ended), ended
    return [json.loads(line) for line in lines]
