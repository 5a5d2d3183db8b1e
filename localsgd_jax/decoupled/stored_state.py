"""Checkpoints of a syncer by Orbax, written in the background."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from localsgd_jax.checkpoint.orbax_backend import import_orbax, writer_options
from localsgd_jax.decoupled.leases import Leases
from localsgd_jax.decoupled.merging import Counts
from localsgd_jax.decoupled.syncer_state import Member, Pending, SyncerState, Totals

_ARRAYS = ("params", "aggregation_state", "total")


class StateStorage:
    """Checkpoints of the syncer of a fragment, numbered by events."""

    def __init__(self, directory: str) -> None:
        """Opens a directory.

        Args:
          directory: absolute path; it is created.

        Raises:
          ImportError: if orbax-checkpoint is not installed.
        """
        self._orbax = import_orbax("run")
        options = writer_options(self._orbax, max_to_keep=2, process_local=False)
        self._manager = self._orbax.CheckpointManager(directory, options=options)

    def save(self, count: int, state: SyncerState) -> None:
        """Starts to write a checkpoint; the arrays are copied before it returns.

        Args:
          count: number of events that the state includes.
          state: the state.
        """
        arrays = [np.asarray(x) for x in jax.tree.leaves(_arrays(state))]
        args = self._orbax.args
        items = args.Composite(
            state=args.StandardSave(arrays), metadata=args.JsonSave(_to_json(state))
        )
        self._manager.save(count, args=items)

    def restore(self, init: Callable[[], SyncerState]) -> tuple[int, SyncerState]:
        """Reads the last complete checkpoint.

        Args:
          init: makes the state at the start of the job.

        Returns:
          Number of events and state; 0 and `init()` without a checkpoint.
        """
        initial = init()
        if (count := self._manager.latest_step()) is None:
            return 0, initial
        like = [np.asarray(x) for x in jax.tree.leaves(_arrays(initial))]
        args = self._orbax.args
        items = args.Composite(
            state=args.StandardRestore(like), metadata=args.JsonRestore()
        )
        stored = self._manager.restore(count, args=items)
        structure = jax.tree.structure(_arrays(initial))
        arrays = structure.unflatten([jax.numpy.asarray(x) for x in stored["state"]])
        return count, _from_json(initial, stored["metadata"])._replace(**arrays)

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        self._manager.close()


def _arrays(state: SyncerState) -> dict[str, Any]:
    """Returns the fields of a state that hold arrays."""
    return {name: getattr(state, name) for name in _ARRAYS}


def _to_json(state: SyncerState) -> dict:
    """Returns the other fields as JSON-compatible values."""
    values = {k: v for k, v in state._asdict().items() if k not in _ARRAYS}
    return json.loads(json.dumps(values))


def _from_json(initial: SyncerState, values: dict) -> SyncerState:
    """Inverts `_to_json`."""

    def member(fields: list) -> Member:
        return Member(*fields)._replace(leases=tuple(fields[5]))

    def pending(fields: list) -> Pending:
        learner, session, time, counts, *others = fields
        return Pending(learner, session, time, Counts(*counts), *others)

    next_lease, end, every, returned, reissued = values["leases"]
    return initial._replace(
        version=values["version"],
        members={int(k): member(m) for k, m in values["members"].items()},
        pending=tuple(pending(p) for p in values["pending"]),
        deadline=math.inf if values["deadline"] is None else values["deadline"],
        leases=Leases(next_lease, end, every, tuple(returned), reissued),
        totals=Totals(*values["totals"]),
    )
