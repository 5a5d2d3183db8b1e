"""Time to a loss over slow links: two processes, a core each, a throttled network.

    python -m benchmarks.slow_link            both models, 10, 100 and 1000 Mbit/s
    python -m benchmarks.slow_link mlp --mbit 100

Needs root, iproute2 and util-linux; touches no interface that it has not made, and
leaves nothing behind (see network.py). Each method trains to the end without a limit,
which gives the loss after each step, and then on each link about as many rounds as fit
into --seconds, of which all but the first give the seconds of a step. The loss at the
end of a run on a link must be that of as many rounds without. Writes slow_link.json,
.txt and .png into --out; rows there that are not measured again stay.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import record
from benchmarks.slow_link import beside_torch, network, results, tasks
from benchmarks.slow_link.methods import METHODS, Method
from localsgd_jax import cost

WORKERS, SCORE_EVERY = 2, 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slow_link", description=__doc__.splitlines()[0]
    )
    parser.add_argument("models", nargs="*", help=", ".join(tasks.TASKS))
    parser.add_argument("--mbit", type=float, nargs="+", default=[1000, 100, 10])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    given = parser.parse_args()
    given.models = given.models or list(tasks.TASKS)
    for kind, names, known in (
        ("model", given.models, tasks.TASKS),
        ("method", given.methods, METHODS),
    ):
        for name in names:
            if name not in known:
                parser.error(f"there is no {kind} {name!r}; there are {list(known)}")
    return given


class Pair:
    """The processes of one model, told the same and answering the same."""

    def __init__(self, net: network.Network, model: str, methods: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            coordinator = f"{network.address(0)}:{probe.getsockname()[1]}"
        common = [model, coordinator, str(WORKERS)]
        self.processes = [
            net.start(
                worker,
                [sys.executable, "-m", "benchmarks.slow_link.worker"]
                + [*common, str(worker), *methods],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for worker in range(WORKERS)
        ]

    def tell(self, line: str) -> None:
        for one in self.processes:
            one.stdin.write(line + "\n")
            one.stdin.flush()

    def hear(self) -> dict:
        """Returns what worker 0 says, once all have said it."""
        return [_next(one) for one in self.processes][0]

    def train(self, rounds: int, score_every: int) -> dict:
        self.tell(f"{rounds} {score_every}")
        return self.hear()


def _next(process: subprocess.Popen) -> dict:
    """Reads the next line of JSON; gloo prints too."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"a worker ended with the exit code {process.wait()}")


@contextmanager
def pair(net: network.Network, model: str, methods: list[str]) -> Iterator[Pair]:
    made = Pair(net, model, methods)
    try:
        yield made
    finally:
        for one in made.processes:
            one.kill()
            one.wait()


def measured_link(
    both: Pair, net: network.Network, mbit: float | None, tiny: bool
) -> cost.Link:
    """Fits a link to all-reduces on it, to more of them while noise hides it."""
    net.throttle(mbit)
    runs = []
    while True:
        for _ in range(3):
            both.tell("link")
            runs.append(both.hear()["seconds"])
        seconds = [statistics.median(times) for times in zip(*runs, strict=True)]
        try:
            return cost.fit_link(WORKERS, tasks.sizes(tiny), seconds)
        except ValueError:
            if len(runs) >= 30:
                raise


def planned(method: Method, ready: dict, whole: dict, free: cost.Link) -> cost.Job:
    """What the planner is told: steps alone, and what free rounds take besides."""
    job = cost.Job(
        WORKERS,
        compute=ready["step"],
        parameters=ready["parameters"] // method.pieces,
        bits=method.bits,
        overlap=method.period if method.beside else 0,
    )
    seconds = whole["seconds"] / whole["rounds"]
    more = seconds - cost.round_time(job, free, method.period)
    return job._replace(overhead=max(0.0, more))


def measure(net: network.Network, model: str, given: argparse.Namespace) -> list[dict]:
    steps = 64 if given.tiny else tasks.STEPS[model]
    rows = []
    with pair(net, model + "-tiny" * given.tiny, given.methods) as both:
        ready = both.hear()
        links = {
            x: measured_link(both, net, x, given.tiny) for x in (None, *given.mbit)
        }
        both.tell("")
        for name in given.methods:
            method = METHODS[name]
            net.throttle(None)
            both.hear()
            whole = both.train(
                steps // method.period, max(1, SCORE_EVERY // method.period)
            )
            job = planned(method, ready, whole, links[None])
            for mbit in given.mbit:
                said = cost.round_time(job, links[mbit], method.period)
                most = min(int(given.seconds / said), steps // method.period)
                rounds = enough(method, most)
                net.throttle(mbit)
                found = both.train(rounds, 0)
                _check(both, net, whole, found, f"{model}, {name}, {mbit:g} Mbit/s")
                rows.append(
                    results.row(model, name, mbit, ready["step"], whole, found, said)
                )
                print(json.dumps(rows[-1]), flush=True)
            both.tell("")
    return rows


def enough(method: Method, most: int) -> int:
    """Returns how many rounds to time: each piece as often, after the first round."""
    turns = max((most - 1) // method.pieces, 3 if method.beside else 1)
    return 1 + turns * method.pieces


def _check(
    both: Pair, net: network.Network, whole: dict, found: dict, where: str
) -> None:
    """Sees that a link changes the time and nothing else: the loss is the same."""
    end = str(found["steps"])
    if end not in whole["own"]:
        net.throttle(None)
        whole = both.train(found["rounds"], 0)
    if abs(whole["own"][end] - found["own"][end]) > 1e-4:
        raise RuntimeError(f"{where}: another loss after {end} steps")


def main() -> None:
    given = arguments()
    if reason := network.missing():
        sys.exit(f"benchmarks.slow_link: {reason}")
    if not network.inside():
        for name in given.models:
            tasks.TASKS[name]()  # Fetches data while there is a network.
        network.enter([sys.executable, "-m", "benchmarks.slow_link", *sys.argv[1:]])
    given.out.mkdir(parents=True, exist_ok=True)
    place = record.machine()
    with network.Network(WORKERS) as net:
        rows = [row for model in given.models for row in measure(net, model, given)]
        beside = []
        if beside_torch.MODEL in given.models:
            beside = beside_torch.compare(net, given.mbit, given.tiny)
    rows += results.others(given.out, "rows", rows)
    beside += results.others(given.out, "beside", beside)
    results.write(given.out, {"machine": place, "rows": rows, "beside": beside})


if __name__ == "__main__":
    main()
