"""Contents of a checkpoint, and comparison with the run that restores it.

The checkpoint of step n is the directory `n/` with two Orbax items:

    state     the leaves of the `State`, in the order of `jax.tree.leaves`; typed PRNG
              keys are stored as their key data
    metadata  one JSON object:
      format         FORMAT_VERSION
      seed, config   arguments of `RunCheckpointer`
      rule           name of the synchronisation rule of each field
      leaves         dtype and shape of each leaf, without the worker axis
      num_workers    K, the length of the worker axes
      examples_seen  examples consumed by all workers since the start of the run

The metadata up to `leaves` must be equal in the run that restores the checkpoint.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax

from localsgd_jax.core.types import Cluster, State

FORMAT_VERSION = 2
MAX_LEAVES_IN_MESSAGE = 5


def run_fingerprint(cluster: Cluster, seed: int, config: Mapping | None) -> dict:
    """Returns the metadata that is constant over a run, as JSON-compatible data.

    Args:
      cluster: the cluster.
      seed: seed of the data.
      config: further values that must be equal on resume.

    Returns:
      The fingerprint.

    Raises:
      TypeError: if `config` contains a value that is not JSON serializable.
    """
    return {
        "format": FORMAT_VERSION,
        "seed": seed,
        "config": json.loads(json.dumps(dict(config or {}))),
        "rule": dict(cluster.algorithm.rule_names),
    }


def describe_leaves(state: State) -> dict[str, str]:
    """Returns dtype and shape of each leaf, without the worker axis, by path."""
    described = {}
    for field in ("workers", "local", "shared"):
        for path, leaf in jax.tree.leaves_with_path(getattr(state, field)):
            shape = leaf.shape if field == "shared" else leaf.shape[1:]
            described[field + jax.tree_util.keystr(path)] = f"{leaf.dtype}{list(shape)}"
    return described


def mismatches(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns one line per difference between stored and current metadata.

    Args:
      stored: metadata of the checkpoint.
      current: fingerprint and leaves of the run that restores it.

    Returns:
      The lines; empty if the checkpoint matches.
    """
    lines = [
        f"{name}: {stored.get(name)!r} in the checkpoint, {value!r} in this run"
        for name, value in current.items()
        if name != "leaves" and stored.get(name) != value
    ]
    old, new = stored.get("leaves", {}), current["leaves"]
    leaves = [
        f"{path}: {old.get(path, 'nothing')} in the checkpoint, "
        f"{new.get(path, 'nothing')} in this run"
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    ]
    lines += leaves[:MAX_LEAVES_IN_MESSAGE]
    if len(leaves) > MAX_LEAVES_IN_MESSAGE:
        lines.append(f"and {len(leaves) - MAX_LEAVES_IN_MESSAGE} more leaves")
    return lines
