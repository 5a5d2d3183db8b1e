"""Checkpoints of a run: saved while it goes on, restored onto any number of workers."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax import checks, fields, processes
from localsgd_jax.base import Cluster, PyTree, State
from localsgd_jax.rules.describe import describe

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint does not fit, or is damaged."""


class Checkpoints:
    """The checkpoints of one run in a directory.

    A checkpoint holds the whole state, so also the rule's anchors and residuals and
    the counters from which a schedule goes on; the number of examples dealt; the seed;
    and what must be the same in the run that goes on from it. It is written in the
    background and counts only once it is complete: whenever the run is killed, the
    one before is there.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        cluster: Cluster,
        *,
        keep: int = 3,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        alone: bool = False,
    ) -> None:
        """Opens a directory, made if it is not there.

        Args:
          directory: for the checkpoints of this run and nothing else.
          cluster: where the workers live.
          keep: how many of the last checkpoints stay, at least 1.
          seed: of the data, as given to `deal`.
          config: what else must be the same when the run goes on, such as the name of
            the data set: numbers, strings, lists and dicts of them.
          alone: whether this process reads and writes without the others, of whom some
            may be dead; only process 0 may then save.

        Raises:
          ImportError: without orbax-checkpoint.
          ValueError: if keep < 1.

        Example:
          >>> import tempfile
          >>> import jax.numpy as jnp, numpy as np, optax
          >>> import localsgd_jax as lsgd
          >>> from localsgd_jax.checkpoint import Checkpoints
          >>> algorithm = lsgd.local_sgd(lambda w, b: jnp.mean((w - b) ** 2),
          ...                            optax.sgd(0.1), rule=lsgd.average())
          >>> cluster = lsgd.simulate(algorithm, workers=2)
          >>> data = np.arange(12, dtype=np.float32)
          >>> def run(directory, steps):
          ...     with Checkpoints(directory, cluster) as saved:
          ...         state, dealt = saved.restore(cluster.init(jnp.zeros(())))
          ...         batches = lsgd.deal(data, workers=2, batch=3, start=dealt)
          ...         left = steps - int(state.step)
          ...         return lsgd.train(cluster, state, batches, every=4, steps=left,
          ...                           save=saved.save, save_every=8,
          ...                           progress=False)[0]
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     first = run(directory, 16)
          ...     longer = run(directory, 24)          # goes on from step 16
          >>> int(longer.step), int(longer.round)
          (24, 6)
        """
        checks.integer("Checkpoints(keep)", "keep", keep, 1)
        self._orbax = _orbax("Checkpoints")
        self._cluster, self._dealt = cluster, 0
        self._same = {
            "format": FORMAT,
            "seed": checks.integer("Checkpoints(seed)", "seed", seed, 0),
            "config": json.loads(json.dumps(dict(config or {}))),
            "rule": describe(cluster.algorithm.sync),
        }
        directory = os.path.abspath(directory)
        self._alone = alone
        if alone:
            os.makedirs(directory, exist_ok=True)
        self._manager = self._orbax.CheckpointManager(
            directory, options=_options(self._orbax, keep, alone)
        )

    def save(self, state: State, examples: int = 0) -> None:
        """Saves a state; returns as soon as it has a copy.

        Args:
          state: of the cluster, in the middle of a round or after one.
          examples: dealt to all workers since `restore`.

        Raises:
          CheckpointError: if there is a checkpoint of that step or a later one, or
            this or the one before could not be written, such as to a full disk.
        """
        step, latest = int(state.step), self._manager.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"save(state): {self._manager.directory} has a checkpoint of step "
                f"{latest} already, got a state of step {step}; go on with restore, or "
                "take another directory"
            )
        about = self._same | {
            "workers": self._cluster.workers,
            "dealt": self._dealt + examples,
            "leaves": _describe_leaves(state),
        }
        args = self._orbax.args
        raw = [_raw(leaf) for leaf in jax.tree.leaves(state)]
        # Of several processes, Orbax takes from one alone what is in host memory only.
        leaves = [np.asarray(leaf) for leaf in raw] if self._alone else raw
        items = args.Composite(
            state=args.StandardSave(leaves), about=args.JsonSave(about)
        )
        with self._writing("save(state)"):
            self._manager.save(step, args=items)

    def restore(self, state: State, *, fresh: Iterable[str] = ()) -> tuple[State, int]:
        """Returns the state of the last checkpoint, bit for bit, wherever workers live.

        Onto another number of workers, K instead of K₀, what all agreed on and the
        counters stay as they are, and the workers start from the mean:

            xₖ ← (1/K₀) Σⱼ xⱼ

        in float32 at least, for every floating point leaf of the workers, moments and
        a rule's residuals among them. Integers come from worker 0. Worker k < K₀ goes
        on with its own keys; a new one folds k into those of worker 0. At `dealt`,
        `deal` goes on with any number of workers without losing or repeating an
        example.

        Args:
          state: a new one, from `cluster.init`: returned as it is if there is no
            checkpoint, and else what the checkpoint must fit.
          fresh: fields of the train state that begin anew if K changes, such as
            `["opt_state"]`: they are taken from `state`.

        Returns:
          The state, and how many examples have been dealt: `start` for `deal`.

        Raises:
          CheckpointError: if the checkpoint is of another model, rule, seed or
            configuration, says which, or is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return state, 0
        where = f"checkpoint {step} in {self._manager.directory}"
        about = self._read(where, step, about=self._orbax.args.JsonRestore())["about"]
        now = self._same | {"leaves": _describe_leaves(state)}
        if differing := _differences(about, now):
            raise CheckpointError(
                f"restore(state): {where} is of another run: " + "; ".join(differing)
            )
        fresh = tuple(fresh)
        kept = fields.read(state.workers, fresh) if fresh else {}
        same = about["workers"] == self._cluster.workers
        target = jax.tree.map(_in_place, state)
        if not same:
            target = _on_host(state, about["workers"])
        item = self._orbax.args.StandardRestore(jax.tree.leaves(target))
        leaves = self._read(where, step, state=item)["state"]
        stored = jax.tree.unflatten(jax.tree.structure(state), leaves)
        if same:
            restored = jax.tree.map(_typed, stored, state)
        else:
            restored = _respread(stored, state)
            restored = restored._replace(workers=fields.write(restored.workers, kept))
        self._dealt = about["dealt"]
        return restored, self._dealt

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          CheckpointError: if it could not be.
        """
        with self._writing("close()"):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until everything is written."""
        self.close()

    @contextlib.contextmanager
    def _writing(self, call: str) -> Iterator[None]:
        """Says in one line why a checkpoint could not be written."""
        try:
            yield
        except Exception as error:  # Orbax and its stores raise errors of all kinds.
            raise CheckpointError(
                f"{call}: a checkpoint could not be written into "
                f"{self._manager.directory} ({_cause(error)}); those that are complete "
                "are still there"
            ) from error

    def _read(self, where: str, step: int, **items: object) -> Any:
        """Reads parts of a checkpoint."""
        try:
            return self._manager.restore(step, args=self._orbax.args.Composite(**items))
        except Exception as error:  # Orbax and its stores raise errors of all kinds.
            raise CheckpointError(
                f"restore(state): {where} is damaged ({_first_line(error)}); remove "
                "its directory to go on from the one before"
            ) from error


def export(directory: str | os.PathLike, tree: PyTree) -> None:
    """Writes a model as an ordinary checkpoint, for programs without this library.

    Orbax reads it, and so does whatever reads checkpoints of Flax:

        orbax.checkpoint.StandardCheckpointer().restore(directory)

    Args:
      directory: where it goes; must not exist.
      tree: such as `consensus(state)`, or `consensus(state, ("params",
        "batch_stats"))` for the variables of a linen model.

    Raises:
      ImportError: without orbax-checkpoint.
      ValueError: if the directory exists.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from localsgd_jax.checkpoint import export
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     export(pathlib.Path(directory, "model"), {"w": jnp.ones(3)})
    """
    with _orbax("export").StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(directory), tree)


def _options(orbax: ModuleType, keep: int, alone: bool) -> Any:
    """Returns how checkpoints are kept, and by whom."""
    if not alone:
        return orbax.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True
        )
    me = jax.process_index()
    processes = orbax.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}"
    )
    if me:
        return orbax.CheckpointManagerOptions(
            read_only=True, create=False, multiprocessing_options=processes
        )
    return orbax.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=processes,
    )


def _raw(leaf: jax.Array) -> jax.Array:
    """Returns the numbers of a leaf, those of a typed key too."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _typed(stored: Any, like: jax.Array) -> jax.Array:
    """Makes the numbers of a key a key again."""
    if not _is_key(like):
        return stored
    return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(like))


def _is_key(leaf: jax.Array) -> bool:
    """Returns whether a leaf is a typed key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _in_place(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns what a leaf is restored to: the same shape at the same place."""
    raw = _raw(leaf)
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=raw.sharding)


def _on_host(state: State, workers: int) -> State:
    """Returns what a state is restored to: host arrays for so many workers."""

    def same(leaf: jax.Array) -> np.ndarray:
        raw = _raw(leaf)
        return np.broadcast_to(np.zeros((), raw.dtype), raw.shape)

    def other(leaf: jax.Array) -> np.ndarray:
        raw = _raw(leaf)
        return np.broadcast_to(np.zeros((), raw.dtype), (workers, *raw.shape[1:]))

    return jax.tree.map(same, state)._replace(
        workers=jax.tree.map(other, state.workers), own=jax.tree.map(other, state.own)
    )


def _respread(stored: State, state: State) -> State:
    """Gives what K₀ workers left to K others, at the places of a new state."""

    def place(value: np.ndarray, like: jax.Array) -> jax.Array:
        return processes.place(_typed(value, like), like.sharding)

    def spread(old: np.ndarray, like: jax.Array) -> jax.Array:
        if _is_key(like):
            more = _more_keys(_typed(old, like), len(like))
            return processes.place(more, like.sharding)
        if jnp.issubdtype(old.dtype, jnp.inexact):
            wide = jnp.promote_types(old.dtype, jnp.float32)
            one = old.mean(0, dtype=wide).astype(old.dtype)
        else:
            one = old[0]
        return processes.place(np.broadcast_to(one, like.shape), like.sharding)

    return jax.tree.map(place, stored, state)._replace(
        workers=jax.tree.map(spread, stored.workers, state.workers),
        own=jax.tree.map(spread, stored.own, state.own),
    )


def _more_keys(keys: jax.Array, workers: int) -> jax.Array:
    """Returns the keys of the first workers, and makes those that are lacking."""
    flat = keys.reshape(len(keys), -1)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    new = fold(flat[0], jnp.arange(len(keys), max(workers, len(keys))))
    return jnp.concatenate([flat, new])[:workers].reshape(workers, *keys.shape[1:])


def _describe_leaves(state: State) -> dict[str, str]:
    """Describes each leaf by what does not depend on the number of workers."""
    found = {}
    for part in ("workers", "own", "agreed"):
        for path, leaf in jax.tree.leaves_with_path(getattr(state, part)):
            shape = leaf.shape if part == "agreed" else leaf.shape[1:]
            found[part + jax.tree_util.keystr(path)] = f"{leaf.dtype}{list(shape)}"
    return found


def _differences(stored: Mapping, now: Mapping) -> list[str]:
    """Lists what a checkpoint has differently, leaves one by one."""
    lines = [
        f"{name}: {stored.get(name)!r} there, {now[name]!r} here"
        for name in now
        if name != "leaves" and stored.get(name) != now[name]
    ]
    there, here = stored.get("leaves", {}), now["leaves"]
    differing = [
        f"{path}: {there.get(path, 'nothing')} there, {here.get(path, 'nothing')} here"
        for path in dict.fromkeys([*there, *here])
        if there.get(path) != here.get(path)
    ]
    more = [f"and {len(differing) - 5} more leaves"] if len(differing) > 5 else []
    return lines + differing[:5] + more


def _cause(error: Exception) -> str:
    """Returns what the operating system said, or else the beginning of a message."""
    code = getattr(error, "errno", None) or re.search(
        r"os_error_code='(\d+)'", str(error)
    )
    if code is None:
        return _first_line(error)
    return os.strerror(code if isinstance(code, int) else int(code[1]))


def _first_line(error: Exception) -> str:
    """Returns the beginning of a message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def _orbax(call: str) -> ModuleType:
    """Imports what the rest of the library does without."""
    try:
        import orbax.checkpoint
    except ImportError:
        raise ImportError(
            f"{call}() needs orbax-checkpoint: pip install orbax-checkpoint"
        ) from None
    return orbax.checkpoint
