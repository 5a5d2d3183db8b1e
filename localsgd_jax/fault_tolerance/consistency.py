"""Comparison of the processes of a fault-tolerant run before its first step."""

import jax
import jax.numpy as jnp

from localsgd_jax.core.types import State
from localsgd_jax.distributed import arrays
from localsgd_jax.distributed.coordination import assert_equal_across_processes
from localsgd_jax.fault_tolerance.run import RoundLimits
from localsgd_jax.training.callbacks import Callbacks
from localsgd_jax.training.consistency import upcoming_syncs

NUM_COMPARED_STEPS = 64


def assert_equal_runs(
    state: State,
    limits: RoundLimits,
    overlap: bool,
    callbacks: Callbacks,
    processes: list[int],
) -> None:
    """Raises the same error in all processes unless their arguments are equal.

    Args:
      state: state of the workers of this process.
      limits: limits of a round and of the run.
      overlap: as in `train`.
      callbacks: evaluation and saving.
      processes: indices of all processes.

    Raises:
      CoordinationError: names the entries that differ, or a missing process.
    """
    step = int(state.step)
    rows = jax.tree.leaves_with_path((state.workers, state.local))
    fingerprint = {
        "schedule": upcoming_syncs(limits.schedule, step, NUM_COMPARED_STEPS),
        "steps": None if limits.steps is None else int(limits.steps),
        "round_deadline": limits.round_deadline is not None,
        "min_processes": int(limits.min_processes),
        "weights": str(limits.weights),
        "overlap": overlap,
        "evaluate_every": int(callbacks.evaluate_every) if callbacks.evaluate else None,
        "eval_fields": callbacks.eval_fields,
        "save_every": int(callbacks.save_every) if callbacks.save else None,
        "state": {"step": step, "round": int(state.round)},
        "leaves": {
            jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape[1:])}"
            for path, x in rows
        },
        # After the first step, workers of different processes may differ.
        "start": _describe_first_worker(state) if step == 0 else {},
    }
    assert_equal_across_processes("train()", fingerprint, processes)


def _describe_first_worker(state: State) -> dict[str, str]:
    """Describes the first worker of this process; PRNG keys differ between workers."""

    def first_row(x: jax.Array) -> jax.Array | None:
        return None if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x[0]

    return arrays.describe_leaves(jax.tree.map(first_row, state.workers))
