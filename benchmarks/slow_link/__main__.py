"""Time to a target loss over throttled links between two single-core processes.

    python -m benchmarks.slow_link            both models, 10, 100 and 1000 Mbit/s
    python -m benchmarks.slow_link mlp --mbit 100

Requires root, iproute2 and util-linux. Changes only network interfaces that it has
created, and leaves none behind (see network.py).

Each method trains to the end without a limit, which gives the loss after each step, and
then on each link for as many rounds as fit into --seconds. All rounds but the first
give the seconds of a step. The loss at the end of a run on a link must equal the loss
after as many rounds without a limit. Writes slow_link.json, .txt and .png into --out.
Rows of an earlier run in that directory are kept unless they are measured again.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from benchmarks import reporting
from benchmarks.slow_link import network, results, tasks, torch_comparison
from benchmarks.slow_link.methods import METHODS, Method
from benchmarks.slow_link.worker_pair import WORKERS, WorkerPair, measure_link
from localsgd_jax.planning import cost_model

STEPS_PER_EVAL = 32
MAX_LOSS_DIFFERENCE = 1e-4


def parse_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slow_link",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="*", help=f"{', '.join(tasks.TASKS)} (default: all)")
    add(
        "--mbit",
        type=float,
        nargs="+",
        default=[1000, 100, 10],
        help="rates of the links, 10⁶ bits per second (default: 1000 100 10)",
    )
    add(
        "--seconds",
        type=float,
        default=15,
        help="training time per method and link (default: 15)",
    )
    add("--methods", nargs="+", default=list(METHODS), help="names (default: all)")
    add("--tiny", action="store_true", help="small models, for tests")
    add(
        "--out",
        type=Path,
        default=Path("benchmark-results"),
        help="output directory (default: benchmark-results)",
    )
    options = parser.parse_args()
    options.models = options.models or list(tasks.TASKS)
    for kind, names, known in (
        ("model", options.models, tasks.TASKS),
        ("method", options.methods, METHODS),
    ):
        for name in names:
            if name not in known:
                parser.error(f"{kind} must be one of {list(known)}, got {name!r}")
    return options


def planner_workload(
    method: Method, ready: Mapping, unthrottled: Mapping, link: cost_model.Link
) -> cost_model.Workload:
    """Returns the workload of a method for the cost model.

    The overhead is the time of an unthrottled round that is neither local steps nor
    predicted communication.

    Args:
      method: the method.
      ready: first answer of the workers, with the seconds of a local step.
      unthrottled: result of `worker.train` without a limit on the link.
      link: measured link without a limit.
    """
    workload = cost_model.Workload(
        WORKERS,
        step_seconds=ready["step_seconds"],
        parameters=ready["parameters"] // method.fragments,
        bits=method.bits,
        overlap_steps=method.period if method.overlapped else 0,
    )
    round_seconds = unthrottled["seconds"] / unthrottled["rounds"]
    predicted = cost_model.round_time(workload, link, method.period)
    return workload._replace(overhead_seconds=max(0.0, round_seconds - predicted))


def num_timed_rounds(method: Method, max_rounds: int) -> int:
    """Returns the number of rounds to run on a link.

    After the first round, which is not timed, each fragment is synchronised equally
    often: at least once, and three times if the method is overlapped.
    """
    cycles = max((max_rounds - 1) // method.fragments, 3 if method.overlapped else 1)
    return 1 + cycles * method.fragments


def measure_model(
    net: network.Network, model: str, options: argparse.Namespace
) -> list[dict]:
    """Measures all methods on all links; returns a row for each pair."""
    name = model + "-tiny" * options.tiny
    with closing(WorkerPair(net, name, options.methods)) as pair:
        ready = pair.answer()
        links = {
            mbit: measure_link(pair, net, mbit, options.tiny)
            for mbit in (None, *options.mbit)
        }
        pair.request("")
        rows = []
        for method in options.methods:
            for row in measure_method(net, pair, model, method, ready, links, options):
                print(json.dumps(row), flush=True)
                rows.append(row)
            pair.request("")
    return rows


def measure_method(
    net: network.Network,
    pair: WorkerPair,
    model: str,
    name: str,
    ready: Mapping,
    links: Mapping[float | None, cost_model.Link],
    options: argparse.Namespace,
) -> Iterator[dict]:
    """Trains without a limit and on each link; yields a row for each link.

    Args:
      net: network of the workers.
      pair: the workers.
      model: name of the model.
      name: name of the method.
      ready: first answer of the workers.
      links: measured links by rate; None is the link without a limit.
      options: options of the command line.
    """
    method, steps = METHODS[name], 64 if options.tiny else tasks.STEPS[model]
    total_rounds = steps // method.period
    net.throttle(None)
    pair.answer()  # The workers have compiled the method.
    unthrottled = pair.train(total_rounds, max(1, STEPS_PER_EVAL // method.period))
    workload = planner_workload(method, ready, unthrottled, links[None])
    for mbit in options.mbit:
        predicted = cost_model.round_time(workload, links[mbit], method.period)
        max_rounds = min(int(options.seconds / predicted), total_rounds)
        net.throttle(mbit)
        throttled = pair.train(num_timed_rounds(method, max_rounds), 0)
        run = f"{model}, {name}, {mbit:g} Mbit/s"
        check_equal_loss(pair, net, unthrottled, throttled, run)
        yield results.make_row(
            (model, name, mbit),
            ready["step_seconds"],
            unthrottled,
            throttled,
            predicted,
        )


def check_equal_loss(
    pair: WorkerPair,
    net: network.Network,
    unthrottled: Mapping,
    throttled: Mapping,
    run: str,
) -> None:
    """Raises if a throttled run ends with another loss than the unthrottled run."""
    end = str(throttled["steps"])
    if end not in unthrottled["local_losses"]:
        net.throttle(None)
        unthrottled = pair.train(throttled["rounds"], 0)
    expected, loss = unthrottled["local_losses"][end], throttled["local_losses"][end]
    if abs(expected - loss) > MAX_LOSS_DIFFERENCE:
        raise RuntimeError(
            f"{run}: the loss after {end} steps must equal that without a limit, "
            f"{expected}, got {loss}"
        )


def enter_namespace(models: Sequence[str]) -> None:
    """Restarts the program in a network namespace, unless it runs in one."""
    if network.in_namespace():
        return
    for name in models:
        tasks.TASKS[name]()  # Downloads the data while the internet is reachable.
    network.reexec_in_namespace(
        [sys.executable, "-m", "benchmarks.slow_link", *sys.argv[1:]]
    )


def main() -> None:
    """Runs the measurement and writes its results."""
    options = parse_options()
    if reason := network.missing_requirements():
        sys.exit(f"benchmarks.slow_link: {reason}")
    enter_namespace(options.models)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = reporting.machine()
    with network.Network(WORKERS) as net:
        rows = []
        for model in options.models:
            rows += measure_model(net, model, options)
        comparison = []
        if torch_comparison.MODEL in options.models:
            comparison = torch_comparison.compare(net, options.mbit, options.tiny)
    rows += results.earlier_rows(options.out, "rows", rows)
    comparison += results.earlier_rows(options.out, "torch_comparison", comparison)
    results.write(
        options.out,
        {"machine": machine, "rows": rows, "torch_comparison": comparison},
    )


if __name__ == "__main__":
    main()
