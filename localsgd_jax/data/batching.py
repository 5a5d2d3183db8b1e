"""Shuffled batches for K workers: each example once per epoch."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import (
    MAX_INT64,
    check_array_leaves,
    check_int,
    describe,
)


def shuffled_batches(
    data: PyTree,
    workers: int,
    batch: int,
    *,
    seed: int = 0,
    examples_seen: int = 0,
    local_workers: Sequence[int] | np.ndarray | None = None,
) -> Iterator[PyTree]:
    """Yields shuffled batches of a dataset for K workers indefinitely.

    The examples of epoch e are shuffled with the seed (seed, e), the epochs are
    concatenated into one stream, and at step t worker k receives the B examples

        stream[(t K + k) B : (t K + k + 1) B]

    The workers' parts of an epoch are disjoint and their union is the epoch, even if
    K B does not divide n: a batch may contain the end of one epoch and the beginning of
    the next. The stream does not depend on K or B, so a run that is resumed at
    `examples_seen` with other values of K or B repeats and skips no example.

    Args:
      data: pytree of arrays with leaves `(n, ...)` for n examples.
      workers: K.
      batch: B, the number of examples per worker and step; at most n // K.
      seed: seed of the shuffles.
      examples_seen: number of examples consumed before, such as
        `int(state.step) * K * B`.
      local_workers: indices of the workers to produce rows for, such as
        `local_workers(cluster)`; None for all.

    Returns:
      An iterator of batches with leaves `(K, B, ...)`, or one row for each of the
      `local_workers`.

    Raises:
      TypeError: if a number is not an int.
      ValueError: if the leaves differ in the number of examples, there are none, or
        an argument is out of range.

    Example:
      >>> import numpy as np
      >>> batches = shuffled_batches({"x": np.arange(6)}, workers=2, batch=1)
      >>> sorted(int(i) for _ in range(3) for i in next(batches)["x"].ravel())
      [0, 1, 2, 3, 4, 5]
    """
    call = "shuffled_batches"
    count = count_examples(f"{call}(data)", data)
    workers = check_int(f"{call}(workers)", "workers", workers, 1)
    batch = check_int(f"{call}(batch)", "batch", batch, 1)
    seed = check_int(f"{call}(seed)", "seed", seed, 0, MAX_INT64)
    examples_seen = check_int(
        f"{call}(examples_seen)", "examples_seen", examples_seen, 0, MAX_INT64
    )
    if batch > count // workers:
        raise ValueError(
            f"{call}(batch): batch must be at most a worker's part of {count} // "
            f"{workers} = {count // workers} examples, got {batch}"
        )
    subset = check_worker_subset(f"{call}(local_workers)", local_workers, workers)
    return _batches(data, count, workers, batch, seed, examples_seen, subset)


def _batches(
    data: PyTree,
    count: int,
    workers: int,
    batch: int,
    seed: int,
    examples_seen: int,
    local_workers: np.ndarray,
) -> Iterator[PyTree]:
    """Splits the stream of examples into batches."""
    epoch, position = divmod(examples_seen, count)
    indices = np.empty(0, np.int64)
    remaining = _epoch_permutation(count, seed, epoch)[position:]
    while True:
        while len(remaining) < workers * batch:
            epoch += 1
            remaining = np.concatenate(
                [remaining, _epoch_permutation(count, seed, epoch)]
            )
        indices, remaining = np.split(remaining, [workers * batch])
        rows = indices.reshape(workers, batch)[local_workers]
        yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)


def _epoch_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the examples in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def count_examples(call: str, data: PyTree) -> int:
    """Returns the number of examples; raises if leaves differ in it."""
    check_array_leaves(call, "data", data)
    for path, leaf in jax.tree.leaves_with_path(data):
        if not hasattr(leaf, "shape"):
            raise TypeError(
                f"{call}: every leaf must be an array, got {describe(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'the root'}"
            )
    counts = {
        jax.tree_util.keystr(path) or "the root": np.shape(leaf)[:1]
        for path, leaf in jax.tree.leaves_with_path(data)
    }
    if len(set(counts.values())) != 1 or set(counts.values()) & {(), (0,)}:
        raise ValueError(
            f"{call}: every leaf must hold the same number of examples along its "
            f"leading axis, and at least one, got {counts}"
        )
    return next(iter(counts.values()))[0]


def check_worker_subset(
    call: str, local_workers: Sequence[int] | np.ndarray | None, workers: int
) -> np.ndarray:
    """Validates a subset of worker indices.

    Args:
      call: public call and argument.
      local_workers: indices, in any order, or None for all workers.
      workers: K.

    Returns:
      The indices.

    Raises:
      TypeError: if they are not ints.
      ValueError: if there are none, or they are not distinct indices in [0, K).
    """
    if local_workers is None:
        return np.arange(workers)
    indices = index_array(call, "local_workers", local_workers)
    if indices.ndim != 1 or not len(indices) or not _are_distinct(indices, workers):
        raise ValueError(
            f"{call}: local_workers must be a non-empty list of distinct indices in "
            f"[0, {workers}), got {local_workers!r}"
        )
    return indices


def index_array(call: str, name: str, indices: object) -> np.ndarray:
    """Returns indices as an array; raises a TypeError unless they are ints.

    Args:
      call: public call and argument.
      name: name of the argument.
      indices: ints, a sequence or an array.

    Returns:
      The array; an empty one has an integer dtype.
    """
    try:
        array = np.asarray(indices)
    except ValueError:
        array = np.empty(0, object)
    if not array.size and array.dtype != object:
        array = array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{call}: {name} must be ints, got {describe(indices)}")
    return array


def _are_distinct(indices: np.ndarray, workers: int) -> bool:
    """Returns whether all indices are workers, and none occurs twice."""
    in_range = np.isin(indices, np.arange(workers)).all()
    return bool(in_range) and len(np.unique(indices)) == len(indices)
