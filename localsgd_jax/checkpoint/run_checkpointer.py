"""Checkpointer of a run: saves while it trains, resumes on any number of workers."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from localsgd_jax.checkpoint import metadata
from localsgd_jax.checkpoint.data_states import DataStates, state_of_process
from localsgd_jax.checkpoint.digests import json_digest, leaf_digests
from localsgd_jax.checkpoint.errors import CheckpointError, Damage
from localsgd_jax.checkpoint.leaves import key_data, state_leaves
from localsgd_jax.checkpoint.reader import CheckpointReader
from localsgd_jax.checkpoint.storage import CheckpointStorage
from localsgd_jax.core import pytrees, train_state, validation
from localsgd_jax.core.types import Cluster, State
from localsgd_jax.data.iterator_state import check_checkpointable, set_iterator_state
from localsgd_jax.execution.ambient_mesh import without_mesh


class RunCheckpointer:
    """Checkpoints of one run in a directory.

    A checkpoint holds the complete state with the rule's anchors and residuals and the
    counters of the schedule, the number of examples seen, the states of checkpointable
    iterators, a fingerprint of the run (`localsgd_jax.checkpoint.metadata`), and
    digests of all of them. It is written in
    the background and becomes visible only when it is complete. If the run is killed,
    the previous checkpoint is intact. The directory is locked until `close` or the end
    of the process.
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
        read_only: bool = False,
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
          read_only: whether the directory is only read, also while another process
            writes. It is not locked and must exist.

        Raises:
          ImportError: if orbax-checkpoint is not installed.
          CheckpointError: if the directory cannot be created or written, or is in use
            by another process.
          ValueError: if max_to_keep < 1 or seed < 0.
          TypeError: if an argument has the wrong type, or `config` is not JSON
            serializable.

        Example:
          >>> import tempfile
          >>> import jax.numpy as jnp, numpy as np, optax
          >>> import localsgd_jax as lsgd
          >>> from localsgd_jax.checkpoint import RunCheckpointer
          >>> algorithm = lsgd.local_sgd(lambda w, b: jnp.mean((w - b) ** 2),
          ...                            optax.sgd(0.1))
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
        largest = validation.MAX_INT64
        validation.check_int(f"{name}(seed)", "seed", seed, 0, largest)
        call = f"{name}(directory)"
        validation.check_type(call, "directory", directory, str, os.PathLike)
        validation.check_type(f"{name}(cluster)", "cluster", cluster, Cluster)
        flags = {"process_local": process_local, "read_only": read_only}
        for flag, value in flags.items():
            validation.check_type(f"{name}({flag})", flag, value, bool)
        if config is not None:
            validation.check_type(f"{name}(config)", "config", config, Mapping)
        self._cluster, self._examples_seen = cluster, 0
        self._changed: tuple[str, ...] = ()
        self._fingerprint = metadata.run_fingerprint(cluster, int(seed), config)
        self._storage = CheckpointStorage(
            directory, max_to_keep, process_local, read_only
        )
        self._data_states = DataStates(self._storage.processes)

    @without_mesh
    def save(
        self, state: State, examples_seen: int = 0, *, data_state: Any = None
    ) -> None:
        """Saves a state; returns when it is copied and writes in the background.

        Args:
          state: state of the cluster, within a round or after one.
          examples_seen: examples consumed by all workers since `restore`.
          data_state: state of the iterator of this process after the last batch that
            was consumed, from its `get_state` or `state_dict`, which `train` passes:
            numbers, strings, bytes, NumPy arrays, lists, tuples and dicts. At most
            some MB in all processes.

        Raises:
          CheckpointError: if there is a checkpoint of this or a later step, if this
            checkpoint or the one before could not be written, such as to a full disk,
            if the checkpointer is closed or read only, or if another process has taken
            the directory.
          TypeError: if `state` is not a `State`, `examples_seen` is not an int, or
            `data_state` has values of another type.
          ValueError: if `examples_seen` < 0, or the state was donated.
        """
        seen = validation.check_int(
            "save(examples_seen)",
            "examples_seen",
            examples_seen,
            0,
            validation.MAX_INT64,
        )
        leaves = _checked_leaves("save(state)", state)
        self._storage.check_writable("save(state)")
        step, latest = int(state.step), self._storage.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"save(state): {self._storage.directory} has a checkpoint of step "
                f"{latest} already, got a state of step {step}; restore it, or use "
                "another directory"
            )
        arrays = [key_data(leaf.value) for leaf in leaves]
        digests = leaf_digests(arrays, [leaf.has_rows for leaf in leaves])
        paths = [leaf.path for leaf in leaves]
        data = self._data_states.gather(data_state)
        values = self._fingerprint | {
            "leaves": metadata.describe_leaves(state),
            "num_workers": self._cluster.num_workers,
            "examples_seen": self._examples_seen + seen,
            "step": step,
            "digests": dict(zip(paths, digests, strict=True)),
        }
        if data is not None:
            values["data_digest"] = json_digest(data)
        self._storage.write(step, arrays, metadata.seal(values), data)

    @without_mesh
    def restore(
        self,
        state: State,
        *,
        batches: Any = None,
        reset_fields: Iterable[str] = (),
        fallback: bool = False,
        changed: Iterable[str] = (),
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

        The digests of all leaves and of the metadata are compared with those of the
        state that was saved. A change within one 32-bit word is always detected, other
        damage with probability 1 − 2⁻⁶⁴.

        Args:
          state: initial state from `cluster.init`, which is returned if there is no
            checkpoint. Otherwise the checkpoint must match it. It may be abstract, from
            `cluster.init` of abstract parameters, so that only the restored state is in
            memory; then there must be a checkpoint.
          batches: checkpointable iterator, which is set to the state that was saved for
            it, so that it continues after the last batch that was consumed. It has
            `get_state` and `set_state`, such as `iter(dataset)` of Grain, or
            `state_dict` and `load_state_dict`. It is unchanged without a checkpoint.
          reset_fields: fields of the train state that are re-initialised if K changes,
            such as `["opt_state"]`: they are taken from `state`.
          fallback: whether an earlier checkpoint is restored if the latest is damaged.
            A warning says which. The damaged checkpoint `N` is renamed to `N.damaged`.
          changed: what differs from the checkpoint on purpose: "optimizer", "rule",
            "seed" or "config". `changed=["optimizer"]` continues with another
            learning rate. Leaves must match in any case.

        Returns:
          The state, whose `step` tells the checkpoint, and the number of examples seen
          by all workers: `examples_seen` of `shuffled_batches`.

        Raises:
          CheckpointError: if the checkpoint has another model, optimizer, rule, seed or
            configuration, with the differences; or if it is damaged, with what is
            damaged and the latest intact checkpoint before it; or if it has no state
            for `batches`, or one for other numbers of processes or workers.
          TypeError: if an argument has the wrong type.
          ValueError: if a reset field does not exist, the state is abstract and a
            field is reset, or `changed` has another name.
        """
        _checked_leaves("restore(state)", state)
        validation.check_type("restore(fallback)", "fallback", fallback, bool)
        if batches is not None:
            check_checkpointable("restore(batches)", batches)
        call, name = "restore(reset_fields)", "reset_fields"
        validation.check_type(call, name, reset_fields, Iterable)
        names, steps = tuple(reset_fields), self._storage.steps()
        self._changed = _checked_changes(changed)
        if not steps:
            if pytrees.is_abstract(state):
                raise CheckpointError(
                    f"restore(state): {self._storage.directory} has no checkpoint, and "
                    "the state is abstract; pass arrays"
                )
            return state, 0
        initial = _initial_fields(state, names) if names else {}
        stored, data, restored = self._restore_latest(state, steps, fallback)
        if batches is not None:
            counts = stored["num_workers"], self._cluster.num_workers
            position = state_of_process("restore(batches)", data, *counts)
            set_iterator_state(batches, position)
        if stored["num_workers"] != self._cluster.num_workers:
            workers = train_state.replace_fields(restored.workers, initial)
            restored = restored._replace(workers=workers)
        self._examples_seen = stored["examples_seen"]
        return restored, self._examples_seen

    def latest_step(self) -> int | None:
        """Returns the step of the latest complete checkpoint, or None.

        Waits for a write in the background. The checkpoint is not checked.

        Raises:
          CheckpointError: if the write has failed.
        """
        return max(self._storage.steps(), default=None)

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

    def _restore_latest(
        self, state: State, steps: Sequence[int], fallback: bool
    ) -> tuple[dict, dict | None, State]:
        """Restores the latest checkpoint, or with `fallback` the latest intact one.

        Returns:
          Metadata, states of iterators, and state.
        """
        reader = self._reader()
        damages: dict[int, Damage] = {}
        for step in reversed(steps):
            try:
                stored = self._read_metadata(reader, step, state)
                data = reader.read_data(step, stored)
                restored = reader.read_state(step, stored, state)
            except Damage as damage:
                if not fallback:
                    raise self._damaged(reader, state, steps, damage) from damage
                damages[step] = damage
                continue
            if damages:
                self._storage.set_aside([*damages])
                warnings.warn(
                    f"restore(fallback=True): restored checkpoint {step} in "
                    f"{self._storage.directory}; {_format_damages(damages)}",
                    stacklevel=5,
                )
            return stored, data, restored
        raise CheckpointError(
            f"restore(state): no checkpoint in {self._storage.directory} is intact; "
            + _format_damages(damages)
        )

    def _damaged(
        self,
        reader: CheckpointReader,
        state: State,
        steps: Sequence[int],
        damage: Damage,
    ) -> CheckpointError:
        """Returns the error for a damaged latest checkpoint, with an intact one."""
        *earlier, latest = steps
        remedy = "no checkpoint before it is intact"
        for step in reversed(earlier):
            try:
                stored = self._read_metadata(reader, step, state)
                reader.read_data(step, stored)
                reader.check_state(step, stored, state)
            except (Damage, CheckpointError):
                continue
            remedy = (
                f"checkpoint {step} before it is intact: restore(state, fallback=True) "
                "restores it"
            )
            break
        return CheckpointError(
            f"restore(state): checkpoint {latest} in {self._storage.directory} is "
            f"damaged ({damage}); {remedy}"
        )

    def _read_metadata(self, reader: CheckpointReader, step: int, state: State) -> dict:
        """Reads metadata; raises if they are of another model, rule, seed or config."""
        stored = reader.read_metadata(step)
        current = self._fingerprint | {"leaves": metadata.describe_leaves(state)}
        if differences := metadata.mismatches(stored, current, self._changed):
            raise CheckpointError(
                f"restore(state): checkpoint {step} in {self._storage.directory} does "
                "not match this run: " + "; ".join(differences)
            )
        return stored

    def _reader(self) -> CheckpointReader:
        """Returns a reader of the directory."""
        return CheckpointReader(self._storage.directory, self._storage.processes)


def _checked_leaves(call: str, state: State) -> list:
    """Returns the leaves of an argument that must be a state with live buffers."""
    validation.check_state(call, state)
    return state_leaves(state)


def _checked_changes(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of entries that may differ from the checkpoint."""
    validation.check_type("restore(changed)", "changed", names, Iterable, str)
    names = (names,) if isinstance(names, str) else tuple(names)
    text = f"each name must be one of {metadata.CHANGEABLE}"
    valid = all(name in metadata.CHANGEABLE for name in names)
    validation.check(valid, "restore(changed)", text, names)
    return names


def _initial_fields(state: State, names: Sequence[str]) -> dict:
    """Returns the fields of the initial workers that replace the restored ones."""
    initial = train_state.get_fields(state.workers, names)
    if pytrees.is_abstract(initial):
        raise ValueError(
            "restore(state, reset_fields): state must hold arrays to reset fields, got "
            "an abstract state"
        )
    return initial


def _format_damages(damages: Mapping[int, Damage]) -> str:
    """Formats the damaged checkpoints, one after another."""
    return "; ".join(f"{step} is damaged ({text})" for step, text in damages.items())
