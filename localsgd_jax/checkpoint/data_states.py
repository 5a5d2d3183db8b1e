"""States of the iterators of all processes, as an item of a checkpoint."""

from collections.abc import Sequence
from typing import Any

import jax

from localsgd_jax.checkpoint.errors import CheckpointError
from localsgd_jax.data.iterator_state import from_json, to_json
from localsgd_jax.distributed.coordination import CoordinationError, Coordinator

_CALL = "save(data_state)"


class DataStates:
    """Exchange of iterator states between the processes that save together."""

    def __init__(self, processes: Sequence[int]) -> None:
        """Assigns the keys of the exchange; does not communicate.

        Args:
          processes: indices of the processes that make the same calls.
        """
        self._coordinator = Coordinator(f"RunCheckpointer.{_CALL}", processes)

    def gather(self, state: Any) -> dict | None:
        """Returns the states of all processes in JSON, by process index.

        Args:
          state: state of the iterator of this process; None for none.

        Returns:
          The item of the checkpoint; None if no process has a state.

        Raises:
          TypeError: if the state of this process has no form in JSON.
          CoordinationError: if that of another process has none.
        """
        error, message = None, None
        try:
            if state is not None:
                message = {"state": to_json(_CALL, state)}
        except TypeError as raised:
            error, message = raised, {"error": str(raised)}
        messages = self._coordinator.all_gather(message)
        if error is not None:
            raise error
        for process, other in messages.items():
            if "error" in other:
                raise CoordinationError(f"{other['error']} in process {process}")
        return {str(i): messages[i]["state"] for i in sorted(messages)} or None


def state_of_process(call: str, data: dict | None, stored_workers: int, workers: int):
    """Returns the state of the iterator of this process.

    Args:
      call: public call and argument for the error.
      data: the item of a checkpoint; None if it has none.
      stored_workers: number of workers of the checkpoint.
      workers: number of workers of this run.

    Returns:
      The state.

    Raises:
      CheckpointError: if the checkpoint has no state for this process, or is of other
        numbers of processes or workers, whose batches are others.
    """
    if data is None:
        raise CheckpointError(
            f"{call}: the checkpoint holds no state of the batches; it was saved "
            "without data_state"
        )
    processes = jax.process_count()
    if len(data) != processes or str(jax.process_index()) not in data:
        raise CheckpointError(
            f"{call}: the states of the batches are those of the processes "
            f"{', '.join(data)}, got {processes} processes; restore without batches "
            "and choose the position of the data from the number of examples"
        )
    if stored_workers != workers:
        raise CheckpointError(
            f"{call}: the states of the batches are those of {stored_workers} workers, "
            f"got {workers} workers; restore without batches and choose the position "
            "of the data from the number of examples"
        )
    return from_json(data[str(jax.process_index())])
