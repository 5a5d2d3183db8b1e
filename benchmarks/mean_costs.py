"""Means of many leaves and of fragments, over a mean of one leaf.

Command: python -m benchmarks mean_costs (4 minutes)
Expected: 500 leaves of a million parameters at most 2 times one leaf inside of a
program of several synchronisations; `fragment(diloco(), 4)` of 5 million parameters
at most 1.3 times a mean, in the programs of `train` and with a traced round number.

K = 8 workers on 8 CPU devices. "leaf by leaf" sums each leaf by itself, as `average()`
without buckets; "a kernel per leaf" scales each leaf and sends nothing. "in a program"
synchronises several times in one program and counts a synchronisation, so that the time
to pass the leaves to a program counts once in several; it is the case of `fused` and
`train`, which pass them once a round. All programs of a table run alternately; times
are medians, ratios medians over repetitions.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("NPROC", "32")

import jax
from optax.tree_utils import tree_cast_like

import localsgd_jax as lsgd
from benchmarks import reporting, timing
from benchmarks.rule_costs import WORKERS, make_cluster, parameters
from localsgd_jax.core import collectives
from localsgd_jax.core.pytrees import promote
from localsgd_jax.training.dispatch import sync_in_class
from localsgd_jax.training.round_programs import RoundPrograms

SYNCS_PER_PROGRAM = 8
FRAGMENTS = 4


def leaf_by_leaf() -> lsgd.SyncRule:
    """Returns the mean of equal weights, one sum for each leaf."""

    def apply(tree: Any, state: lsgd.RuleState, context: lsgd.SyncContext) -> tuple:
        summed = collectives.psum(promote(tree), context)
        mean = jax.tree.map(lambda x: x / collectives.size(context), summed)
        return tree_cast_like(mean, tree), state

    return lsgd.SyncRule(lambda tree, specs: lsgd.RuleState(), apply)


def kernel_per_leaf() -> lsgd.SyncRule:
    """Returns a rule that scales each leaf and sends nothing."""

    def apply(tree: Any, state: lsgd.RuleState, context: lsgd.SyncContext) -> tuple:
        return jax.tree.map(lambda x: x * 1.0000001, tree), state

    return lsgd.SyncRule(lambda tree, specs: lsgd.RuleState(), apply)


MEANS = {
    "nothing": lsgd.identity,
    "a kernel per leaf": kernel_per_leaf,
    "leaf by leaf": leaf_by_leaf,
    "average()": lsgd.average,
}


def compile_program(rule: lsgd.SyncRule, params: dict, count: int) -> tuple:
    """Returns a program of some synchronisations, a state and the compile time."""
    cluster = make_cluster(rule)

    def several(state: lsgd.State) -> lsgd.State:
        if count == 1:
            return cluster.sync(state)
        return jax.lax.fori_loop(0, count, lambda _, state: cluster.sync(state), state)

    state = cluster.init({"params": params})
    lowered = jax.jit(several, donate_argnums=0).lower(state)
    start = time.process_time()
    program = lowered.compile()
    return program, state, time.process_time() - start


def measure_leaves(size: int, leaves: list[int], repeats: int) -> list[dict]:
    """Measures means of equal parameters in some numbers of leaves."""
    calls, seconds = {}, {}
    for n in leaves:
        for name, rule in MEANS.items():
            for count in (1, SYNCS_PER_PROGRAM):
                program, state, compiled = compile_program(
                    rule(), parameters(size, n), count
                )
                calls[n, name, count] = _stepper(program, state)
                seconds[n, name, count] = compiled
    times, _ = timing.time_interleaved(calls, repeats)
    rows = []
    for (n, name, count), measured in times.items():
        reference = times[leaves[0], "leaf by leaf", count]
        rows.append(
            {
                "leaves": n,
                "mean": name,
                "where": "in a program" if count > 1 else "alone",
                "ms": measured.median * 1e3 / count,
                "over one leaf": timing.ratio(measured, reference),
                "compile CPU s": round(seconds[n, name, count], 2),
            }
        )
    return sorted(rows, key=lambda row: (row["where"], row["leaves"]))


def measure_fragments(size: int, leaves: int, repeats: int) -> list[dict]:
    """Measures fragments with a traced round number and in the programs of `train`."""
    params = parameters(size, leaves)
    rules = {
        "average()": lsgd.average(),
        "diloco()": lsgd.diloco(),
        "fragment(diloco(), 4)": lsgd.fragment(lsgd.diloco(), FRAGMENTS),
    }
    calls = {}
    for name, rule in rules.items():
        cluster = make_cluster(rule)
        init = partial(cluster.init, {"params": params})
        sync = jax.jit(cluster.sync, donate_argnums=0)
        calls[name, "traced round"] = _cycle([sync], init())
        calls[name, "train"] = _cycle(_programs(cluster, init()), init())
    times, _ = timing.time_interleaved(calls, repeats)
    return [
        {
            "rule": name,
            "program": program,
            "ms": measured.median * 1e3 / FRAGMENTS,
            "over a mean": timing.ratio(measured, times["average()", program]),
        }
        for (name, program), measured in times.items()
    ]


def _programs(cluster: lsgd.Cluster, state: lsgd.State) -> list[Callable]:
    """Returns the programs of `train` for consecutive rounds."""

    def sync(state: lsgd.State, round_class: Any) -> lsgd.State:
        return sync_in_class(cluster, round_class, state, None)

    jitted = jax.jit(sync, static_argnames="round_class", donate_argnums=0)
    programs = RoundPrograms(jitted, state)
    first = int(state.round) + 1
    return [
        partial(jitted, round_class=programs.choose(first + i))
        for i in range(FRAGMENTS)
    ]


def _cycle(programs: list[Callable], state: lsgd.State) -> Callable:
    """Returns a function that does one synchronisation for each fragment."""
    held = [state]

    def run() -> lsgd.State:
        for i in range(FRAGMENTS):
            held[0] = programs[i % len(programs)](held[0])
        return held[0]

    return run


def _stepper(program: Callable, state: lsgd.State) -> Callable:
    """Returns a function that continues from the state of its last call."""
    held = [state]

    def run() -> lsgd.State:
        held[0] = program(held[0])
        return held[0]

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks mean_costs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", type=int, default=1_000_000, help="of many leaves")
    parser.add_argument("--leaves", type=int, nargs="+", default=[1, 10, 100, 500])
    parser.add_argument("--fragment-size", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", WORKERS)
    print(f"K = {WORKERS}, {reporting.machine()}")
    if options.size:
        rows = measure_leaves(options.size, options.leaves, options.repeats)
        print(f"{options.size} parameters\n{reporting.format_table(rows)}")
    if options.fragment_size:
        rows = measure_fragments(options.fragment_size, 10, options.repeats)
        print(f"{options.fragment_size} parameters in 10 leaves")
        print(reporting.format_table(rows))


if __name__ == "__main__":
    main()
