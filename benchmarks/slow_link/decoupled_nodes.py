"""Decoupled jobs on two Ray nodes over a throttled link, beside lockstep methods.

    python -m benchmarks.slow_link.decoupled_nodes --mbit 100

Requires root and the extra `decoupled`. Trains the MLP of `benchmarks.slow_link` with
the lockstep methods of the same period, and with one learner on each of two hosts, and
compares the bytes that a job counts with those that the network interface carries.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.reporting import format_table
from benchmarks.slow_link import network
from benchmarks.slow_link.__main__ import measure_model
from benchmarks.slow_link.decoupled_driver import METHODS, SKIPPED
from benchmarks.slow_link.network import Network, host_address
from benchmarks.slow_link.tasks import TARGET_LOSSES

PORT = 6379
LOCKSTEP = ["Local SGD, H = 16", "Local SGD, H = 16, overlapped"]
# Ray starts slowly on a busy machine, and its workers have the lowest priority.
# No other machine can reach the namespaces, so nodes need no token.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_raylet_start_wait_time_s": "150",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}


@contextmanager
def ray_nodes(net: Network):
    """Starts a node on each host; yields the address of the cluster."""
    address = f"{host_address(0)}:{PORT}"
    ray = str(Path(sys.executable).parent / "ray")
    options = ["--num-cpus=1", "--object-store-memory=200000000", "--block"]
    roles = [
        ["--head", f"--port={PORT}", "--include-dashboard=false"],
        [f"--address={address}"],
    ]
    processes = []
    for host, role in enumerate(roles):
        ip = f"--node-ip-address={host_address(host)}"
        command = [ray, "start", *role, ip, *options]
        processes.append(
            net.start(
                host,
                command,
                env=os.environ | ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        wait_until_started(processes[-1])
    try:
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)


def wait_until_started(process: subprocess.Popen) -> None:
    """Reads the output of `ray start` until the node runs, and the rest in a thread."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "runtime started" in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return
    raise RuntimeError(f"ray start: the node must run, got {''.join(lines)}")


def measure(net: Network, mbit: float | None, rounds: int) -> list[dict]:
    """Runs each method on a link; returns its rows.

    The time to the target is that of as many merges as the run needed, at the median
    time between merges after the first ones, which include compilation.
    """
    rows = []
    for name, method in METHODS.items():
        net.throttle(mbit)
        with ray_nodes(net) as address:
            result = run_driver(net, address, name, rounds)
        times = [moment for moment, _ in result["losses"]]
        first = SKIPPED * method.fragments
        seconds = (times[-2] - times[first]) / (len(times) - 2 - first)
        target = TARGET_LOSSES["mlp"]
        merges = next(
            (i for i, (_, x) in enumerate(result["losses"], 1) if x <= target), None
        )
        steps = method.period / method.fragments
        rows.append(
            {
                "model": "mlp",
                "method": name,
                "mbit": mbit,
                "ms/step": 1e3 * seconds / steps,
                "steps to target": merges and merges * steps,
                "s to target": merges and merges * seconds,
                "carried/counted": result["carried"] / result["counted"],
                "MB counted": result["counted"] / 1e6,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def run_driver(net: Network, address: str, name: str, rounds: int) -> dict:
    """Runs the driver on host 0; returns its result."""
    module = "benchmarks.slow_link.decoupled_driver"
    command: Sequence[str] = [sys.executable, "-m", module, address, name, str(rounds)]
    process = net.start(
        0,
        command,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name}: the driver ended with {process.returncode}")
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Measures lockstep and decoupled methods on one link, one after another."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slow_link.decoupled_nodes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mbit", type=float, default=100, help="10⁶ bits per second")
    parser.add_argument("--rounds", type=int, default=40, help="of each learner")
    parser.add_argument("--seconds", type=float, default=15, help="per lockstep method")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    options = parser.parse_args()
    if reason := network.missing_requirements():
        sys.exit(f"benchmarks.slow_link.decoupled_nodes: {reason}")
    module = "benchmarks.slow_link.decoupled_nodes"
    network.reexec_in_namespace([sys.executable, "-m", module, *sys.argv[1:]])
    options.out.mkdir(parents=True, exist_ok=True)
    lockstep = argparse.Namespace(
        methods=LOCKSTEP, mbit=[options.mbit], seconds=options.seconds, tiny=False
    )
    with Network(2) as net:
        rows = measure(net, options.mbit, options.rounds)
        rows += measure_model(net, "mlp", lockstep)
    for row in rows:
        row.pop("losses", None)
    path = options.out / "slow_link_decoupled.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    names = ("method", "mbit", "ms/step", "steps to target", "s to target")
    names += ("carried/counted",)
    print(format_table([{name: row.get(name) for name in names} for row in rows]))


if __name__ == "__main__":
    main()
