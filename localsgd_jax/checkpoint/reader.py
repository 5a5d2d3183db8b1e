"""Reads of complete checkpoints, and agreement of all processes on their results."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from localsgd_jax.checkpoint import metadata
from localsgd_jax.checkpoint.digests import json_digest, leaf_digests
from localsgd_jax.checkpoint.errors import Damage, first_line
from localsgd_jax.checkpoint.leaves import (
    Leaf,
    restore_target,
    state_leaves,
    wrap_keys,
)
from localsgd_jax.checkpoint.orbax_backend import import_orbax
from localsgd_jax.checkpoint.resize import resize_rows, stored_rows
from localsgd_jax.core.types import State
from localsgd_jax.distributed.coordination import Coordinator

# Leaves are read in groups of at most this share of all bytes, so that buffers in host
# memory, and rows of K₀ workers, exist for one group at a time.
GROUP_SHARE = 1 / 16

Value = TypeVar("Value")


class CheckpointReader:
    """Reads the checkpoints in a directory, in all processes that restore together."""

    def __init__(self, directory: str, processes: Sequence[int]) -> None:
        """Stores the directory.

        Args:
          directory: absolute path.
          processes: indices of the processes that make the same calls.
        """
        self._orbax = import_orbax("RunCheckpointer")
        self._path = self._orbax.utils.epath.Path
        self._directory = directory
        self._coordinator = Coordinator("RunCheckpointer.restore()", processes)

    def read_metadata(self, step: int) -> dict:
        """Reads the metadata of a checkpoint and checks their digest.

        Args:
          step: number of the checkpoint.

        Returns:
          The metadata.

        Raises:
          Damage: in all processes, if they are damaged in one.
        """

        def read() -> dict:
            if not os.listdir(os.path.join(self._directory, str(step))):
                raise Damage("metadata: empty directory")
            return metadata.check_seal(step, self._read_json(step, "metadata"))

        return self._in_all_processes(read)

    def read_data(self, step: int, stored: Mapping[str, Any]) -> dict | None:
        """Reads the states of the iterators and checks their digest.

        Args:
          step: number of the checkpoint.
          stored: its metadata.

        Returns:
          The item as written; None if the checkpoint has none.

        Raises:
          Damage: in all processes, if the item is damaged in one.
        """

        def read() -> dict | None:
            if "data_digest" not in stored:
                return None
            data = self._read_json(step, "data")
            if json_digest(data) != stored["data_digest"]:
                raise Damage("data: digest differs")
            return data

        return self._in_all_processes(read)

    def read_state(self, step: int, stored: Mapping[str, Any], state: State) -> State:
        """Reads the state of a checkpoint and checks the digests.

        Args:
          step: number of the checkpoint.
          stored: its metadata, which match `state`.
          state: arrays or abstract arrays of K workers.

        Returns:
          The state of K workers, with the shardings of `state`.

        Raises:
          Damage: in all processes, if a leaf is damaged.
        """
        leaves = list(self._iterate_leaves(step, stored, state))
        return jax.tree.structure(state).unflatten(leaves)

    def check_state(self, step: int, stored: Mapping[str, Any], state: State) -> None:
        """Checks the digests of a checkpoint; keeps one group of leaves at a time.

        Args:
          step: number of the checkpoint.
          stored: its metadata, which match `state`.
          state: arrays or abstract arrays of K workers.

        Raises:
          Damage: in all processes, if a leaf is damaged.
        """
        for _ in self._iterate_leaves(step, stored, state):
            pass

    def _iterate_leaves(
        self, step: int, stored: Mapping[str, Any], state: State
    ) -> Iterator[jax.Array]:
        """Yields the leaves of the state in the order of `jax.tree.leaves`."""
        leaves, count = state_leaves(state), stored["num_workers"]
        targets = [_target(leaf, count) for leaf in leaves]
        for group in _groups([_num_bytes(target) for target in targets]):
            chosen = {i: targets[i] for i in group}
            arrays = self._in_all_processes(
                lambda chosen=chosen: self._read_leaves(step, chosen, leaves)
            )
            digests = leaf_digests(arrays, [leaves[i].has_rows for i in group])
            for i, digest in zip(group, digests, strict=True):
                path = leaves[i].path
                metadata.compare_digests(path, stored["digests"][path], digest)
            for i in group:
                yield _convert(arrays.pop(0), leaves[i], count)

    def _read_leaves(
        self, step: int, targets: Mapping[int, Any], leaves: Sequence[Leaf]
    ) -> list[jax.Array]:
        """Reads the leaves with the given indices, without barriers."""
        item = [targets.get(i, self._orbax.PLACEHOLDER) for i in range(len(leaves))]
        args = self._orbax.args.PyTreeRestore(
            item=item, restore_args=[self._restore_args(target) for target in item]
        )
        handler = self._orbax.PyTreeCheckpointHandler()
        try:
            restored = handler.restore(self._item(step, "state"), args=args)
        except Exception as error:  # Orbax and its backends raise many types.
            named = re.search(r'Error reading \\?"(\d+)/', str(error))
            where = [leaves[int(named[1])].path] if named else []
            where = where or [leaves[i].path for i in targets][:1]
            raise Damage(f"leaf {where[0]}: {first_line(error)}") from error
        return [restored[i] for i in targets]

    def _restore_args(self, target: Any) -> Any:
        """Returns the arguments for reading an array, or for a leaf that is skipped."""
        if not isinstance(target, jax.ShapeDtypeStruct):
            return self._orbax.RestoreArgs()
        return self._orbax.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=target.sharding,
            global_shape=target.shape,
            dtype=target.dtype,
        )

    def _read_json(self, step: int, name: str) -> Any:
        """Reads an item in JSON; raises Damage with its name if it cannot be read."""
        handler = self._orbax.JsonCheckpointHandler()
        try:
            args = self._orbax.args.JsonRestore()
            return handler.restore(self._item(step, name), args=args)
        except Exception as error:  # Orbax raises many types.
            raise Damage(f"{name}: {first_line(error)}") from error

    def _item(self, step: int, name: str) -> Any:
        """Returns the path of an item of a checkpoint."""
        return self._path(self._directory) / str(step) / name

    def _in_all_processes(self, read: Callable[[], Value]) -> Value:
        """Calls a function; raises Damage in all processes if it does so in one."""
        value, damage = None, None
        try:
            value = read()
        except Damage as error:
            damage = error
        messages = self._coordinator.all_gather(str(damage or ""))
        if damage is not None:
            raise damage
        if found := [text for text in messages.values() if text]:
            raise Damage(found[0])
        return value  # type: ignore[return-value]


def _target(leaf: Leaf, num_workers: int) -> jax.ShapeDtypeStruct:
    """Returns the target for reading a leaf of a checkpoint of K₀ workers."""
    if not leaf.has_rows or leaf.value.shape[0] == num_workers:
        return restore_target(leaf.value)
    return stored_rows(leaf.value, num_workers)


def _convert(stored: jax.Array, leaf: Leaf, num_workers: int) -> jax.Array:
    """Converts a leaf of a checkpoint of K₀ workers to the leaf of the state."""
    if not leaf.has_rows or leaf.value.shape[0] == num_workers:
        return wrap_keys(stored, leaf.value)
    return resize_rows(stored, leaf.value)


def _num_bytes(target: jax.ShapeDtypeStruct) -> int:
    """Returns the size of a leaf on all devices."""
    return target.size * np.dtype(target.dtype).itemsize


def _groups(sizes: Sequence[int]) -> list[list[int]]:
    """Groups consecutive leaves with at most a share of all bytes, or one leaf."""
    limit, groups, filled = sum(sizes) * GROUP_SHARE, [], float("inf")
    for i, size in enumerate(sizes):
        if filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += size
    return groups
