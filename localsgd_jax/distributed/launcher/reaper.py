"""Reaper: kills all processes of a job when its launcher ends.

All processes of a job join the process group of the reaper. The launcher holds the
other end of its standard input; when that is closed, the reaper kills the group. Each
line of the input is the process id of a process that has started or, the second time,
exited: a process that has left the group (`setsid`) is killed by its id.

It runs as a script (`python -I -S reaper.py`) and imports nothing of the package, since
importing `localsgd_jax` loads JAX.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Waits for the end of the input and kills the group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.write(1, b"!")  # The launcher waits until the signals are ignored.
    running = set()
    for line in sys.stdin.buffer:
        running ^= {int(line)}
    for pid in running:
        with contextlib.suppress(OSError):
            kill = os.killpg if os.getpgid(pid) == pid else os.kill
            kill(pid, signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
