"""The processes of a peer, which wait between their turns."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 120.0
ROOT = Path(__file__).parents[2]


class Loopback:
    """Hosts that are all this machine."""

    first, interface = "localhost", "lo"

    def start(self, host: int, command: Sequence[str], **more) -> subprocess.Popen:
        """Starts a program on a host."""
        del host
        return subprocess.Popen(command, **more)


LOOPBACK = Loopback()


class Crew:
    """Processes that run one program, each with its rank, and take turns together.

    They wait for a line on their standard input, so they take no time from others.
    """

    def __init__(
        self, command: Sequence[str], ranks: int, hosts: Any = LOOPBACK
    ) -> None:
        """Starts the processes, one on each host, and waits until they are ready."""
        self.errors = [tempfile.TemporaryFile() for _ in range(ranks)]
        port = free_port()
        self.processes = []
        for rank, errors in enumerate(self.errors):
            own = ["--rank", str(rank), "--ranks", str(ranks)]
            self.processes.append(
                hosts.start(
                    rank,
                    [sys.executable, *command, *own],
                    cwd=ROOT,
                    env=os.environ | environment(rank, ranks, port, hosts),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )
        try:
            self._hear()
        except BaseException:
            self.close()
            raise

    def turn(self) -> None:
        """Lets all processes take their steps, and waits for them."""
        self._say(["turn"] * len(self.processes))

    def params(self) -> list[list[np.ndarray]]:
        """Returns the parameters of each process."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{i}.npz" for i in range(len(self.processes))]
            self._say(paths)
            return [[*np.load(path).values()] for path in paths]

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()
        for errors in self.errors:
            errors.close()

    def _say(self, lines: Sequence[str]) -> None:
        for process, line in zip(self.processes, lines, strict=True):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        self._hear()

    def _hear(self) -> None:
        """Waits for an answer of each process, for so long and no longer."""
        watch = threading.Timer(LIMIT, lambda: [p.kill() for p in self.processes])
        watch.start()
        try:
            answers = [process.stdout.readline() for process in self.processes]
        finally:
            watch.cancel()
        if not all(answers):
            raise RuntimeError(self._complaint(answers.index("")))

    def _complaint(self, rank: int) -> str:
        """Says what the process wrote that ended."""
        self.errors[rank].seek(0)
        wrote = self.errors[rank].read().decode(errors="replace")
        return f"rank {rank} ended or gave no answer in {LIMIT:.0f} s:\n{wrote[-2000:]}"


def environment(rank: int, ranks: int, port: int, hosts: Any) -> dict[str, str]:
    """What launchers of PyTorch set, and one thread for each process.

    JAX gets two, without which 0.10 and 0.11 may starve; with one it is faster here.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": hosts.first,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "NPROC": "2",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": hosts.interface,
    }


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
