"""Contents of a checkpoint, and comparison with the run that restores it.

The checkpoint of step n is the directory `n/` with two or three Orbax items:

    state     the leaves of the `State`, in the order of `jax.tree.leaves`; typed PRNG
              keys are stored as their key data
    data      state of the iterator of each process, by process index; only if `save`
              was given one (`localsgd_jax.data.iterator_state`)
    metadata  one JSON object:
      format         FORMAT_VERSION
      seed, config   arguments of `RunCheckpointer`
      rule           name of the synchronisation rule of each field, with its numbers
      optimizer      name of the inner optimizer with its numbers, if it is known
      leaves         dtype and shape of each leaf, without the worker axis
      num_workers    K, the length of the worker axes
      examples_seen  examples consumed by all workers since the start of the run
      step           n
      digests        digests of each leaf, one per worker or a single one
      data_digest    SHA-256 of the item `data`, if there is one
      digest         SHA-256 of all other entries

The metadata up to `leaves` must be equal in the run that restores the checkpoint.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from localsgd_jax.checkpoint.digests import json_digest
from localsgd_jax.checkpoint.errors import Damage
from localsgd_jax.checkpoint.leaves import piece_counts, state_leaves
from localsgd_jax.core.types import Cluster, State

FORMAT_VERSION = 4
# Entries that may differ if the user says so.
CHANGEABLE = ("rule", "optimizer", "seed", "config")
MAX_ITEMS_IN_MESSAGE = 5


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
        "config": _json_values(config or {}),
        "rule": dict(cluster.algorithm.rule_names),
        "optimizer": cluster.algorithm.optimizer_name,
    }


def _json_values(config: Mapping) -> dict:
    """Returns a configuration after a round trip through JSON."""
    try:
        return json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError) as error:
        text = "each value must be JSON serialisable"
        raise TypeError(f"RunCheckpointer(config): {text}, got {error}") from None


def describe_leaves(state: State) -> dict[str, str]:
    """Returns dtype and shape of each leaf, without the worker axis, by path.

    The number of pieces is added for a leaf whose order depends on it.
    """
    described, pieces = {}, piece_counts(state)
    for path, leaf, has_rows in state_leaves(state):
        if path in ("step", "round"):
            continue
        shape = leaf.shape[1:] if has_rows else leaf.shape
        described[path] = f"{leaf.dtype}{list(shape)}"
        if path in pieces:
            sizes = (f"{name}={size}" for name, size in pieces[path].items())
            described[path] += f" of pieces {', '.join(sizes)}"
    return described


def seal(values: Mapping[str, Any]) -> dict:
    """Returns JSON-compatible metadata with its digest."""
    return {**values, "digest": json_digest(values)}


def check_seal(step: int, stored: object) -> dict:
    """Checks the digest of stored metadata.

    Args:
      step: number of the checkpoint.
      stored: metadata as read.

    Returns:
      The metadata. Those of another format, without a digest, are not checked.

    Raises:
      Damage: if they differ from the metadata as written.
    """
    if not isinstance(stored, dict):
        raise Damage("metadata: no JSON object")
    values = {name: value for name, value in stored.items() if name != "digest"}
    if "digest" not in stored and stored.get("format") != FORMAT_VERSION:
        return stored
    if stored.get("digest") != json_digest(values):
        raise Damage("metadata: digest differs")
    if stored.get("format") == FORMAT_VERSION and stored["step"] != step:
        raise Damage(f"metadata: of step {stored['step']}")
    return stored


def compare_digests(path: str, stored: Sequence[str], found: Sequence[str]) -> None:
    """Raises Damage with the path and the workers of a leaf with other digests."""
    different = [
        k for k, (a, b) in enumerate(zip(stored, found, strict=True)) if a != b
    ]
    if not different:
        return
    if len(stored) == 1:
        raise Damage(f"leaf {path}: digest differs")
    workers = ", ".join(map(str, different[:MAX_ITEMS_IN_MESSAGE]))
    if len(different) > MAX_ITEMS_IN_MESSAGE:
        workers += f" and {len(different) - MAX_ITEMS_IN_MESSAGE} more"
    raise Damage(f"leaf {path}: digest differs for worker {workers}")


def mismatches(
    stored: Mapping[str, Any],
    current: Mapping[str, Any],
    changed: Collection[str] = (),
) -> list[str]:
    """Returns one line per difference between stored and current metadata.

    Args:
      stored: metadata of the checkpoint.
      current: fingerprint and leaves of the run that restores it.
      changed: entries of `CHANGEABLE` that may differ.

    Returns:
      The lines; empty if the checkpoint matches.
    """
    if stored.get("format") != current["format"]:
        return [_difference("format", stored.get("format"), current["format"])]
    lines = [
        _difference(name, stored.get(name), value) + _remedy(name)
        for name, value in current.items()
        if name not in ("leaves", *changed) and stored.get(name) != value
    ]
    old, new = stored.get("leaves", {}), current["leaves"]
    leaves = [
        f"{path}: {old.get(path, 'nothing')} in the checkpoint, "
        f"{new.get(path, 'nothing')} in this run"
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    ]
    lines += leaves[:MAX_ITEMS_IN_MESSAGE]
    if len(leaves) > MAX_ITEMS_IN_MESSAGE:
        lines.append(f"and {len(leaves) - MAX_ITEMS_IN_MESSAGE} more leaves")
    return lines


def _remedy(name: str) -> str:
    """Returns how an entry can be changed on purpose."""
    if name not in CHANGEABLE:
        return ""
    return f' (to change it: restore(state, changed=["{name}"]))'


def _difference(name: str, stored: object, current: object) -> str:
    """Formats a value of the checkpoint and that of this run."""
    return f"{name}: {stored!r} in the checkpoint, {current!r} in this run"
