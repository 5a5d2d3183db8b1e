"""Checkpointer of a run: saves while it trains, resumes on any number of workers."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from localsgd_jax.checkpoint import metadata, resize
from localsgd_jax.checkpoint.leaves import key_data, restore_target, wrap_keys
from localsgd_jax.checkpoint.storage import CheckpointError, CheckpointStorage
from localsgd_jax.core import train_state, validation
from localsgd_jax.core.types import Cluster, State


class RunCheckpointer:
    """Checkpoints of one run in a directory.

    A checkpoint holds the complete state with the rule's anchors and residuals and the
    counters of the schedule, the number of examples seen, and a fingerprint of the
    run (`localsgd_jax.checkpoint.metadata`). It is written in the background and
    becomes visible only when it is complete. If the run is killed, the previous
    checkpoint is intact.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        cluster: Cluster,
        *,
        max_to_keep: int = 3,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        process_local: bool = False,
    ) -> None:
        """Opens a directory; creates it if it does not exist.

        Args:
          directory: directory that holds only the checkpoints of this run.
          cluster: cluster of the run.
          max_to_keep: number of latest checkpoints that are kept, at least 1.
          seed: seed of the data, as given to `shuffled_batches`.
          config: further values that must be equal on resume, such as the name of the
            data set: numbers, strings, lists and dicts of them.
          process_local: whether this process reads and writes without barriers, since
            other processes may have failed. Then only process 0 may save.

        Raises:
          ImportError: if orbax-checkpoint is not installed.
          ValueError: if max_to_keep < 1 or seed < 0.
          TypeError: if `config` is not JSON serializable.

        Example:
          >>> import tempfile
          >>> import jax.numpy as jnp, numpy as np, optax
          >>> import localsgd_jax as lsgd
          >>> from localsgd_jax.checkpoint import RunCheckpointer
          >>> algorithm = lsgd.local_sgd(lambda w, b: jnp.mean((w - b) ** 2),
          ...                            optax.sgd(0.1), rule=lsgd.average())
          >>> cluster = lsgd.simulate(algorithm, workers=2)
          >>> data = np.arange(12, dtype=np.float32)
          >>> def run(directory, steps):
          ...     with RunCheckpointer(directory, cluster) as checkpointer:
          ...         state, seen = checkpointer.restore(cluster.init(jnp.zeros(())))
          ...         batches = lsgd.shuffled_batches(data, workers=2, batch=3,
          ...                                         examples_seen=seen)
          ...         return lsgd.train(cluster, state, batches, schedule=4,
          ...                           steps=steps - int(state.step),
          ...                           save=checkpointer.save, save_every=8,
          ...                           progress=False)[0]
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     first = run(directory, 16)
          ...     longer = run(directory, 24)          # resumes at step 16
          >>> int(longer.step), int(longer.round)
          (24, 6)
        """
        name = "RunCheckpointer"
        validation.check_int(f"{name}(max_to_keep)", "max_to_keep", max_to_keep, 1)
        validation.check_int(f"{name}(seed)", "seed", seed, 0)
        self._cluster, self._examples_seen = cluster, 0
        self._fingerprint = metadata.run_fingerprint(cluster, int(seed), config)
        self._storage = CheckpointStorage(directory, max_to_keep, process_local)

    def save(self, state: State, examples_seen: int = 0) -> None:
        """Saves a state; returns when it is copied and writes in the background.

        Args:
          state: state of the cluster, within a round or after one.
          examples_seen: examples consumed by all workers since `restore`.

        Raises:
          CheckpointError: if there is a checkpoint of this or a later step, or if this
            checkpoint or the one before could not be written, such as to a full disk.
        """
        step, latest = int(state.step), self._storage.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"save(state): {self._storage.directory} has a checkpoint of step "
                f"{latest} already, got a state of step {step}; restore it, or use "
                "another directory"
            )
        leaves = [key_data(leaf) for leaf in jax.tree.leaves(state)]
        self._storage.write(
            step,
            leaves,
            self._fingerprint
            | {
                "leaves": metadata.describe_leaves(state),
                "num_workers": self._cluster.num_workers,
                "examples_seen": self._examples_seen + examples_seen,
            },
        )

    def restore(
        self, state: State, *, reset_fields: Iterable[str] = ()
    ) -> tuple[State, int]:
        """Restores the latest checkpoint, bitwise, onto any placement of the workers.

        On another number of workers, K instead of K₀, shared state and counters are
        restored as they are, and the workers start from the mean:

            xₖ ← (1/K₀) Σⱼ xⱼ

        in float32 at least, for every floating leaf of the workers, including optimizer
        moments and a rule's residuals. Integers come from worker 0. Worker k < K₀ keeps
        its PRNG keys; a new worker k folds k into the keys of worker 0. With
        `examples_seen`, `shuffled_batches` continues on any number of workers without
        losing or repeating an example.

        Args:
          state: initial state from `cluster.init`. It is returned if there is no
            checkpoint; otherwise the checkpoint must match it.
          reset_fields: fields of the train state that are re-initialised if K changes,
            such as `["opt_state"]`: they are taken from `state`.

        Returns:
          The state, and the number of examples seen by all workers: `examples_seen` of
          `shuffled_batches`.

        Raises:
          CheckpointError: if the checkpoint has another model, rule, seed or
            configuration, with the differences, or if it is damaged.
          ValueError: if a reset field does not exist.
        """
        step = self._storage.latest_step()
        if step is None:
            return state, 0
        stored = self._storage.read_metadata(step)
        self._check_run(step, stored, state)
        names = tuple(reset_fields)
        initial = train_state.get_fields(state.workers, names) if names else {}
        if stored["num_workers"] == self._cluster.num_workers:
            restored = self._restore(step, state)
        else:
            restored = self._restore_resized(step, state, stored["num_workers"])
            workers = train_state.replace_fields(restored.workers, initial)
            restored = restored._replace(workers=workers)
        self._examples_seen = stored["examples_seen"]
        return restored, self._examples_seen

    def close(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
          CheckpointError: if one could not be written.
        """
        self._storage.close()

    def __enter__(self) -> "RunCheckpointer":
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until all checkpoints are written."""
        self.close()

    def _check_run(self, step: int, stored: Mapping, state: State) -> None:
        """Raises if a checkpoint is of another model, rule, seed or configuration."""
        current = self._fingerprint | {"leaves": metadata.describe_leaves(state)}
        if differences := metadata.mismatches(stored, current):
            raise CheckpointError(
                f"restore(state): checkpoint {step} in {self._storage.directory} does "
                "not match this run: " + "; ".join(differences)
            )

    def _restore(self, step: int, state: State) -> State:
        """Restores a checkpoint of the same number of workers, directly to devices."""
        leaves, structure = jax.tree.flatten(state)
        targets = [restore_target(leaf) for leaf in leaves]
        stored = self._storage.read_leaves(step, targets)
        return structure.unflatten(map(wrap_keys, stored, leaves))

    def _restore_resized(self, step: int, state: State, num_workers: int) -> State:
        """Restores a checkpoint of another number of workers through host memory."""
        targets, structure = jax.tree.flatten(resize.host_targets(state, num_workers))
        stored = self._storage.read_leaves(step, targets)
        return resize.resize_workers(structure.unflatten(stored), state)
