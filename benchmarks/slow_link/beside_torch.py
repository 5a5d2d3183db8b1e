"""Rounds of the library and of PyTorch's own periodic averager on the same links."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.peers import problem as problems
from benchmarks.peers.contestants import SCRIPT, installed
from benchmarks.peers.crew import Crew
from benchmarks.slow_link.network import Network
from benchmarks.timing import alternate, ratio

MODEL = "mlp"
OURS, THEIRS = "library", "torch PostLocalSGDOptimizer"


def compare(net: Network, links: list[float], tiny: bool) -> list[dict]:
    """Times steps of local SGD, H = 16, on the MLP of the measurement of the peers.

    Args:
      net: two hosts.
      links: rates, in 10⁶ bits a second.
      tiny: whether the MLP is.

    Returns:
      A row for each link.
    """
    given = problems.make(MODEL, tiny)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        problems.save(given, Path(folder))
        crews = {name: _crew(name, given, folder, tiny, net) for name in _present()}
        for crew in crews.values():
            stack.callback(crew.close)
        rows = []
        for mbit in links:
            net.throttle(mbit)
            turns = {name: crew.turn for name, crew in crews.items()}
            times, _ = alternate(turns, repeats=1 if tiny else 3, least=0)
            row = {"model": given.name, "H": given.period, "mbit": mbit}
            for name, time in times.items():
                row[f"{name} ms/step"] = 1e3 * time.median / given.steps
            if THEIRS in times:
                row["torch / library"] = ratio(times[THEIRS], times[OURS])
            rows.append(row)
    return rows


def _present() -> list[str]:
    return [OURS, THEIRS] if installed("torch") else [OURS]


def _crew(
    name: str, given: problems.Problem, folder: str, tiny: bool, net: Network
) -> Crew:
    if name == OURS:
        command = ["-m", "benchmarks.peers.library_worker", "--rule", "flat average"]
        size = ["--tiny"] if tiny else []
        return Crew([*command, "--model", given.name, *size], net.hosts, net)
    sizes = ["--period", str(given.period), "--rate", str(given.rate)]
    command = [SCRIPT, "--peer", "PostLocalSGDOptimizer", "--model", given.name]
    return Crew([*command, "--folder", folder, *sizes], net.hosts, net)
