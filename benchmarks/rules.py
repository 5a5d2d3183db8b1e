"""What every rule sends, keeps and costs: a table, from the compiled programs.

Command: python benchmarks/rules.py (4 minutes; --size 25000000 takes 10)
Expected on two cores: quantize(…, 4) sends an eighth of what average() does.

Bytes are what one of K = 8 workers sends in a round by the ring formulas, read from the
compiled synchronisation; where rounds differ, the mean over a cycle. State is what the
rule keeps, as multiples of the parameters. Time is that of a synchronisation of all
workers on 8 CPU devices, relative to average() in the same run: medians over turns.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("NPROC", "32")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd

WORKERS = 8
SGD = optax.sgd(0.7)


class Row(NamedTuple):
    """A rule, and how many rounds its cycle has."""

    rule: Callable
    cycle: int = 1


ROWS = {
    "average()": Row(lambda: lsgd.average()),
    "keep()": Row(lambda: lsgd.keep()),
    "flatten(average())": Row(lambda: lsgd.flatten(lsgd.average())),
    "outer(sgd)": Row(lambda: lsgd.outer(SGD)),
    "diloco()": Row(lambda: lsgd.diloco()),
    "fedadam()": Row(lambda: lsgd.fedadam()),
    "shard(fedadam(), 8)": Row(lambda: lsgd.shard(lsgd.fedadam(), WORKERS)),
    "elastic()": Row(lambda: lsgd.elastic()),
    "mix(average(), 0.5)": Row(lambda: lsgd.mix(lsgd.average(), 0.5)),
    "overlap(average())": Row(lambda: lsgd.overlap(lsgd.average())),
    "delay(average())": Row(lambda: lsgd.delay(lsgd.average()), 2),
    "fragment(diloco(), 4)": Row(lambda: lsgd.fragment(lsgd.diloco(), 4), 4),
    "cast(average(), bfloat16)": Row(
        lambda: lsgd.outer(SGD, lsgd.cast(lsgd.average()))
    ),
    "cast(average(), float8)": Row(
        lambda: lsgd.outer(SGD, lsgd.cast(lsgd.average(), jnp.float8_e4m3fn))
    ),
    "quantize(average(), 8)": Row(lambda: _quantised(8)),
    "quantize(average(), 4)": Row(lambda: _quantised(4)),
    "quantize(average(), 2)": Row(lambda: _quantised(2)),
    "quantize(average(), 1)": Row(lambda: _quantised(1)),
    "topk(average(), 0.01)": Row(
        lambda: lsgd.outer(SGD, lsgd.topk(lsgd.average(), 0.01))
    ),
    "signs(average())": Row(lambda: lsgd.outer(SGD, lsgd.signs(lsgd.average()))),
    "median()": Row(lambda: lsgd.median()),
    "trimmed_mean(0.25)": Row(lambda: lsgd.trimmed_mean(0.25)),
    "guard(diloco())": Row(lambda: lsgd.guard(lsgd.diloco())),
    'gossip("ring")': Row(lambda: lsgd.gossip("ring")),
    'gossip("exponential")': Row(lambda: lsgd.gossip("exponential")),
    'gossip("one-peer")': Row(lambda: lsgd.gossip("one-peer"), 3),
}


def _quantised(bits: int) -> lsgd.SyncRule:
    return lsgd.outer(SGD, lsgd.quantize(lsgd.average(), bits))


def parameters(size: int, leaves: int) -> dict:
    """A tree of equal leaves, by layer."""
    each = size // leaves
    return {f"layer{i}": np.zeros(each, np.float32) for i in range(leaves)}


def cluster(rule: lsgd.SyncRule) -> lsgd.Cluster:
    mesh = jax.make_mesh((WORKERS,), ("worker",), devices=jax.devices()[:WORKERS])
    made = lsgd.from_train_step(lambda state, batch: (state, {}), rule)
    return lsgd.on_mesh(made, mesh)


def sent(verbs: lsgd.Cluster, state: lsgd.State) -> float:
    """Bytes that a worker sends in a round, the mean over the branches of a cycle."""
    total = 0.0
    for entry in lsgd.ledger(verbs.sync, state):
        branches = [place.count for place in entry.path if hasattr(place, "count")]
        total += entry.sent / np.prod(branches or [1])
    return total


def measure(size: int, leaves: int, turns: int, names: list[str]) -> list[dict]:
    params = parameters(size, leaves)
    payload = sum(leaf.nbytes for leaf in params.values())
    rows = []
    base = _start(ROWS["average()"].rule(), params)
    for name in names:
        verbs, state, sync = _start(ROWS[name].rule(), params)
        seconds, theirs = [], []
        for _ in range(turns * ROWS[name].cycle):
            state, took = _timed(sync, state)
            seconds.append(took)
        base_state = base[1]
        for _ in range(turns):
            base_state, took = _timed(base[2], base_state)
            theirs.append(took)
        base = (base[0], base_state, base[2])
        rows.append(
            {
                "rule": name,
                "MB": sent(verbs, state) / 1e6,
                "agreed": _bytes(state.agreed) / payload,
                "own": _bytes(state.own) / WORKERS / payload,
                "seconds": float(np.median(seconds)),
                "ratio": float(np.median(seconds) / np.median(theirs)),
            }
        )
        del state
        print(_line(rows[-1]), flush=True)
    return rows


def _start(rule: lsgd.SyncRule, params: dict) -> tuple:
    verbs = cluster(rule)
    state = verbs.init({"params": params})
    sync = jax.jit(verbs.sync, donate_argnums=0)
    state, _ = _timed(sync, state)  # Compiles.
    return verbs, state, sync


def _timed(sync: Callable, state: lsgd.State) -> tuple[lsgd.State, float]:
    began = time.perf_counter()
    state = jax.block_until_ready(sync(state))
    return state, time.perf_counter() - began


def _bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _line(row: dict) -> str:
    return (
        f"| `{row['rule']}` | {row['MB']:.3f} | {row['agreed']:.3g} P + "
        f"{row['own']:.3g} P each | {row['ratio']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1_000_000, help="parameters")
    parser.add_argument("--leaves", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rules", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", WORKERS)
    print(f"{options.size} parameters in {options.leaves} leaves, K = {WORKERS}")
    print("| rule | MB a round | state | time / average() |\n| --- | --- | --- | --- |")
    rows = measure(options.size, options.leaves, options.turns, options.rules)
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
