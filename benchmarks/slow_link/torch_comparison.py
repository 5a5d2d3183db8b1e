"""Rounds of the library and of PyTorch's periodic averager on the same links."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.baselines import problem as problems
from benchmarks.baselines.registry import installed, library_command, torch_command
from benchmarks.baselines.worker_processes import WorkerProcesses
from benchmarks.slow_link.network import Network
from benchmarks.timing import ratio, time_interleaved

MODEL = "mlp"
LIBRARY, TORCH = "library", "torch PostLocalSGDOptimizer"


def compare(net: Network, links: list[float], tiny: bool) -> list[dict]:
    """Times steps of local SGD, H = 16, on the MLP of the comparison of baselines.

    Args:
      net: a network of two hosts.
      links: rates, in 10⁶ bits per second.
      tiny: whether to use the tiny MLP.

    Returns:
      A row for each link; without PyTorch it has the times of the library only.
    """
    problem = problems.make(MODEL, tiny)
    rows = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        problems.save(problem, Path(folder))
        commands = {LIBRARY: library_command("flat average", problem, tiny)}
        if installed("torch"):
            commands[TORCH] = torch_command("PostLocalSGDOptimizer", problem, folder)
        steps = {}
        for name, command in commands.items():
            processes = WorkerProcesses(command, net.num_hosts, net)
            stack.callback(processes.close)
            steps[name] = processes.step
        for mbit in links:
            net.throttle(mbit)
            repeats = 1 if tiny else 3
            times, _ = time_interleaved(steps, repeats=repeats, min_seconds=0)
            row = {"model": problem.name, "H": problem.period, "mbit": mbit}
            for name, seconds in times.items():
                row[f"{name} ms/step"] = 1e3 * seconds.median / problem.steps
            if TORCH in times:
                row["torch / library"] = ratio(times[TORCH], times[LIBRARY])
            rows.append(row)
    return rows
