"""Worker processes that are controlled over stdin and stdout."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localsgd_jax.distributed.launcher.ports import free_port

ANSWER_SECONDS = 120.0
ROOT = Path(__file__).parents[2]


class Loopback:
    """Network of hosts that are all this machine."""

    coordinator, interface = "localhost", "lo"

    def start(self, host: int, command: Sequence[str], **options) -> subprocess.Popen:
        """Starts a program on a host."""
        del host
        return subprocess.Popen(command, **options)


LOOPBACK = Loopback()


class LineProcesses:
    """Processes on several hosts that read commands and write answers, line by line.

    They wait on their standard input between commands, which takes no processor time.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        hosts: Any = LOOPBACK,
        environments: Sequence[Mapping[str, str]] | None = None,
        answer_seconds: float | None = ANSWER_SECONDS,
    ) -> None:
        """Starts one process on each host.

        Args:
          commands: arguments of Python for each process.
          hosts: object with a method `start(host, command, **options)`.
          environments: additional environment variables of each process.
          answer_seconds: time limit of an answer; None for no limit.
        """
        self.answer_seconds = answer_seconds
        self.errors = [tempfile.TemporaryFile() for _ in commands]
        environments = environments or [{}] * len(commands)
        self.processes = [
            hosts.start(
                host,
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | environments[host],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors[host],
                text=True,
            )
            for host, command in enumerate(commands)
        ]

    def send(self, lines: Sequence[str]) -> None:
        """Writes one line to each process."""
        for process, line in zip(self.processes, lines, strict=True):
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def receive(self) -> list[str]:
        """Returns one line of each process; raises if a process ends or is too slow."""
        timer = threading.Timer(self.answer_seconds or 0, self._kill)
        if self.answer_seconds:
            timer.start()
        try:
            answers = [process.stdout.readline() for process in self.processes]
        finally:
            timer.cancel()
        if not all(answers):
            raise RuntimeError(self._stderr_tail(answers.index("")))
        return answers

    def close(self) -> None:
        """Kills the processes."""
        self._kill()
        for process in self.processes:
            process.communicate()
        for errors in self.errors:
            errors.close()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()

    def _stderr_tail(self, rank: int) -> str:
        """Returns the last output on stderr of a failed process."""
        self.errors[rank].seek(0)
        text = self.errors[rank].read().decode(errors="replace")
        limit = f" or gave no answer in {self.answer_seconds:.0f} s"
        return (
            f"rank {rank} ended{limit if self.answer_seconds else ''}:\n{text[-2000:]}"
        )


class WorkerProcesses(LineProcesses):
    """Ranks of one program that serve `stdio_protocol`."""

    def __init__(
        self, command: Sequence[str], ranks: int, hosts: Any = LOOPBACK
    ) -> None:
        """Starts the processes and waits until they are ready."""
        port = free_port()
        super().__init__(
            [
                [*command, "--rank", str(rank), "--ranks", str(ranks)]
                for rank in range(ranks)
            ],
            hosts,
            [torch_environment(rank, ranks, port, hosts) for rank in range(ranks)],
        )
        try:
            self.receive()
        except BaseException:
            self.close()
            raise

    def step(self) -> None:
        """Runs the steps of one timed call in all processes."""
        self.send(["step"] * len(self.processes))
        self.receive()

    def params(self) -> list[list[np.ndarray]]:
        """Returns the parameters of each process."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{i}.npz" for i in range(len(self.processes))]
            self.send(paths)
            self.receive()
            return [[*np.load(path).values()] for path in paths]


def torch_environment(rank: int, ranks: int, port: int, hosts: Any) -> dict[str, str]:
    """Returns the variables that PyTorch launchers set, and the number of threads.

    PyTorch has one thread per process. JAX has two, since 0.10 and 0.11 may stall with
    one, although one is faster here.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": hosts.coordinator,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "NPROC": "2",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": hosts.interface,
    }
