"""Bytes, state and time of a synchronisation with each rule.

Command: python -m benchmarks.rule_costs (4 minutes; --size 25000000 takes 10;
--repeats 0 --json benchmarks/results/rule_costs.json measures no times)
Expected on two cores: quantize(…, 4) sends an eighth of the bytes of average().

Bytes are those that one of K = 8 workers sends per round by the ring formulas, read
from the compiled synchronisation; where rounds differ, the mean over a cycle. State is
the rule state as a multiple of the parameters. Time is that of a synchronisation of all
workers on 8 CPU devices, relative to average() in the same run: medians of repetitions.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

os.environ.setdefault("NPROC", "32")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.execution.cyclic_round import RoundClass
from localsgd_jax.execution.rounds import sync_in_class

WORKERS = 8
SGD = optax.sgd(0.7)


class Row(NamedTuple):
    """A rule and its measured program.

    Attributes:
      rule: makes the rule.
      rounds_per_cycle: number of rounds until its synchronisations repeat.
      has_statistics: whether the leaves are means and variances, half of each.
    """

    rule: Callable
    rounds_per_cycle: int = 1
    has_statistics: bool = False


ROWS = {
    "average()": Row(lambda: lsgd.average()),
    "identity()": Row(lambda: lsgd.identity()),
    "flatten(average())": Row(lambda: lsgd.flatten(lsgd.average())),
    "chain(average(), identity())": Row(
        lambda: lsgd.chain(lsgd.average(), lsgd.identity())
    ),
    "when(every(2), average())": Row(
        lambda: lsgd.when(lsgd.every(2), lsgd.average()), 2
    ),
    "floating_only(average())": Row(lambda: lsgd.floating_only(lsgd.average())),
    "reset_to_init()": Row(lambda: lsgd.reset_to_init()),
    "merge_batch_stats()": Row(lambda: lsgd.merge_batch_stats(), 1, True),
    "ema(average(), 0.9)": Row(lambda: lsgd.ema(lsgd.average(), 0.9)),
    "with_diagnostics(average())": Row(lambda: lsgd.with_diagnostics(lsgd.average())),
    "outer(sgd)": Row(lambda: lsgd.outer(SGD)),
    "diloco()": Row(lambda: lsgd.diloco()),
    "slowmo()": Row(lambda: lsgd.slowmo()),
    "fedavgm()": Row(lambda: lsgd.fedavgm()),
    "lookahead()": Row(lambda: lsgd.lookahead()),
    "snoo()": Row(lambda: lsgd.snoo()),
    "fedadam()": Row(lambda: lsgd.fedadam()),
    "shard_state(fedadam(), 8)": Row(lambda: lsgd.shard_state(lsgd.fedadam(), WORKERS)),
    "elastic_average()": Row(lambda: lsgd.elastic_average()),
    "interpolate(average(), 0.5)": Row(lambda: lsgd.interpolate(lsgd.average(), 0.5)),
    "overlap(average())": Row(lambda: lsgd.overlap(lsgd.average())),
    "delay(average())": Row(lambda: lsgd.delay(lsgd.average()), 2),
    "fragment(diloco(), 4)": Row(lambda: lsgd.fragment(lsgd.diloco(), 4), 4),
    "cast(average(), bfloat16)": Row(
        lambda: lsgd.outer(SGD, lsgd.cast(lsgd.average()))
    ),
    "cast(average(), float8)": Row(
        lambda: lsgd.outer(SGD, lsgd.cast(lsgd.average(), jnp.float8_e4m3fn))
    ),
    "quantize(average(), 8)": Row(lambda: _quantized(8)),
    "quantize(average(), 4)": Row(lambda: _quantized(4)),
    "quantize(average(), 2)": Row(lambda: _quantized(2)),
    "quantize(average(), 1)": Row(lambda: _quantized(1)),
    "top_k(average(), 0.01)": Row(
        lambda: lsgd.outer(SGD, lsgd.top_k(lsgd.average(), 0.01))
    ),
    "quantize(average(), 4, e3m0)": Row(
        lambda: lsgd.outer(SGD, lsgd.quantize(lsgd.average(), 4, encoding="e3m0"))
    ),
    "radial_directional_average()": Row(
        lambda: lsgd.outer(SGD, lsgd.radial_directional_average())
    ),
    "eager_outer(sgd)": Row(lambda: lsgd.eager_outer(SGD)),
    "partition(diloco(), average())": Row(
        lambda: lsgd.partition({"outer": lsgd.diloco(), "mean": lsgd.average()}, _half)
    ),
    "desloc()": Row(lambda: lsgd.desloc(), 6),
    "chunked_top_k(average(), 64)": Row(
        lambda: lsgd.outer(SGD, lsgd.chunked_top_k(lsgd.average(), 64))
    ),
    "sparseloco()": Row(lambda: lsgd.sparseloco()),
    "clip_to_median_norm(average())": Row(
        lambda: lsgd.outer(SGD, lsgd.clip_to_median_norm(lsgd.average()))
    ),
    "scaled_sign(average())": Row(
        lambda: lsgd.outer(SGD, lsgd.scaled_sign(lsgd.average()))
    ),
    "median()": Row(lambda: lsgd.median()),
    "trimmed_mean(0.25)": Row(lambda: lsgd.trimmed_mean(0.25)),
    "drop_outliers(diloco())": Row(lambda: lsgd.drop_outliers(lsgd.diloco())),
    "control_variates(0.1, 8)": Row(lambda: lsgd.control_variates(0.1, 8)),
    'gossip("ring")': Row(lambda: lsgd.gossip("ring")),
    'gossip("exponential")': Row(lambda: lsgd.gossip("exponential")),
    'gossip("one-peer")': Row(lambda: lsgd.gossip("one-peer"), 3),
}


def _half(path: str) -> str:
    return "outer" if path < "layer5" else "mean"


def _quantized(bits: int) -> lsgd.SyncRule:
    return lsgd.outer(SGD, lsgd.quantize(lsgd.average(), bits))


def parameters(size: int, leaves: int) -> dict:
    """Returns a tree of equal leaves, by layer."""
    leaf_size = size // leaves
    return {f"layer{i}": np.zeros(leaf_size, np.float32) for i in range(leaves)}


def statistics(size: int, leaves: int) -> dict:
    """Returns a tree of equal means and variances, by layer."""
    half = np.zeros(size // leaves // 2, np.float32)
    return {f"layer{i}": {"mean": half, "var": half} for i in range(leaves)}


def make_cluster(rule: lsgd.SyncRule) -> lsgd.Cluster:
    mesh = jax.make_mesh((WORKERS,), ("worker",), devices=jax.devices()[:WORKERS])
    algorithm = lsgd.from_train_step(lambda state, batch: (state, {}), rule)
    return lsgd.on_mesh(algorithm, mesh)


def mean_bytes_sent(
    cluster: lsgd.Cluster, state: lsgd.State, rounds_per_cycle: int
) -> float:
    """Returns the bytes that a worker sends per round, the mean over a cycle."""
    total = 0.0
    for residue in range(rounds_per_cycle):
        round_class = RoundClass(rounds_per_cycle, residue)
        sync = partial(sync_in_class, cluster, round_class)
        total += sum(op.bytes_sent for op in lsgd.collective_ops(sync, state))
    return total / rounds_per_cycle


def measure(size: int, leaves: int, repeats: int, names: list[str]) -> list[dict]:
    params = parameters(size, leaves)
    rows = []
    _, base_state, base_sync = _compile_sync(ROWS["average()"].rule(), params)
    for name in names:
        rows.append(count_costs(name, size, leaves))
        if not repeats:
            print(_format_row(rows[-1]), flush=True)
            continue
        _, state, sync = _compile_sync(ROWS[name].rule(), params)
        count = repeats * ROWS[name].rounds_per_cycle
        state, seconds = _median_seconds(sync, state, count)
        base_state, base_seconds = _median_seconds(base_sync, base_state, repeats)
        rows[-1] |= {"seconds": seconds, "ratio": seconds / base_seconds}
        del state
        print(_format_row(rows[-1]), flush=True)
    return rows


def count_costs(name: str, size: int, leaves: int) -> dict:
    """Returns the bytes and the state of a rule from its compiled program."""
    row = ROWS[name]
    params = (statistics if row.has_statistics else parameters)(size, leaves)
    payload = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    cluster, state = _initial(row.rule(), params)
    return {
        "rule": name,
        "MB": mean_bytes_sent(cluster, state, row.rounds_per_cycle) / 1e6,
        "shared": _bytes(state.shared) / payload,
        "local": _local_bytes(state) / WORKERS / payload,
    }


def _initial(rule: lsgd.SyncRule, params: dict) -> tuple[lsgd.Cluster, lsgd.State]:
    """Returns the cluster of a rule and its initial state."""
    cluster = make_cluster(rule)
    start = {"params": params, "correction": params}
    start |= {"opt_state": optax.adam(1e-3).init(params)}
    fields = {"params", *", ".join(cluster.algorithm.rule_names).split(", ")}
    return cluster, cluster.init({name: start[name] for name in sorted(fields)})


def _compile_sync(rule: lsgd.SyncRule, params: dict) -> tuple:
    """Returns the cluster of a rule, a state, and its compiled synchronisation."""
    cluster, state = _initial(rule, params)
    sync = jax.jit(cluster.sync, donate_argnums=0)
    return cluster, jax.block_until_ready(sync(state)), sync


def _median_seconds(
    sync: Callable, state: lsgd.State, count: int
) -> tuple[lsgd.State, float]:
    """Returns the last state and the median time of some synchronisations."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        state = jax.block_until_ready(sync(state))
        seconds.append(time.perf_counter() - start)
    return state, float(np.median(seconds))


def _local_bytes(state: lsgd.State) -> int:
    """Returns the bytes of per-worker state besides the parameters."""
    fields = {k: v for k, v in state.workers.items() if k != "params"}
    return _bytes((state.local, fields))


def _bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _format_row(row: dict) -> str:
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    return (
        f"| `{row['rule']}` | {row['MB']:.3f} | {row['shared']:.3g} P + "
        f"{row['local']:.3g} P per worker | {ratio} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1_000_000, help="parameters")
    parser.add_argument("--leaves", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rules", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--json", help="file of the rows as JSON")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", WORKERS)
    print(f"{options.size} parameters in {options.leaves} leaves, K = {WORKERS}")
    print(
        "| rule | MB per round | state | time / average() |\n| --- | --- | --- | --- |"
    )
    rows = measure(options.size, options.leaves, options.repeats, options.rules)
    if options.json:
        about = vars(options) | {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
