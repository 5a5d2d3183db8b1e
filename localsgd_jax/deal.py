"""Data for workers: every example once per epoch, whatever the number of workers."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from localsgd_jax import checks
from localsgd_jax.base import PyTree


def deal(
    data: PyTree,
    workers: int,
    batch: int,
    *,
    seed: int = 0,
    start: int = 0,
    only: Sequence[int] | np.ndarray | None = None,
) -> Iterator[PyTree]:
    """Deals a dataset to K workers like a deck of cards, without end.

    The examples of epoch e are shuffled with the seed (seed, e), the epochs follow
    each other in one stream, and step t hands worker k the B examples

        stream[(t K + k) B : (t K + k + 1) B]

    So the workers' shards of an epoch are disjoint and their union is the epoch, even
    if K B does not divide n: a batch may end one epoch and begin the next. The
    stream does not depend on K or B, so a run resumed with other ones, at `start`,
    repeats no example and loses none.

    Args:
      data: pytree of arrays whose leading axis counts the same n examples.
      workers: K.
      batch: B, examples for each worker and step; at most n // K.
      seed: of the shuffles.
      start: examples that were dealt before, such as `int(state.step) * K * B`.
      only: workers whose rows are wanted, such as `own_workers(cluster)`; None for all.

    Returns:
      An iterator of batches with leaves `(K, B, ...)`, or fewer rows with `only`.

    Raises:
      TypeError: if a number is not an int.
      ValueError: if the leaves do not count the same examples, there are none, or a
        number is out of range.

    Example:
      >>> import numpy as np
      >>> batches = deal({"x": np.arange(6)}, workers=2, batch=1)
      >>> sorted(int(i) for _ in range(3) for i in next(batches)["x"].ravel())
      [0, 1, 2, 3, 4, 5]
    """
    count = check_examples("deal(data)", data)
    workers = checks.integer("deal(workers)", "workers", workers, 1)
    batch = checks.integer("deal(batch)", "batch", batch, 1)
    seed = checks.integer("deal(seed)", "seed", seed, 0)
    start = checks.integer("deal(start)", "start", start, 0)
    if batch > count // workers:
        raise ValueError(
            f"deal(batch): a batch must fit into a worker's shard of {count} // "
            f"{workers} = {count // workers} examples, got {batch}"
        )
    chosen = check_only("deal(only)", only, workers)
    return _batches(data, count, workers, batch, seed, start, chosen)


def _batches(
    data: PyTree,
    count: int,
    workers: int,
    batch: int,
    seed: int,
    start: int,
    chosen: np.ndarray,
) -> Iterator[PyTree]:
    """Cuts the stream into batches."""
    epoch, position = divmod(start, count)
    hand = np.empty(0, np.int64)
    deck = _shuffled(count, seed, epoch)[position:]
    while True:
        while len(deck) < workers * batch:
            epoch += 1
            deck = np.concatenate([deck, _shuffled(count, seed, epoch)])
        hand, deck = np.split(deck, [workers * batch])
        rows = hand.reshape(workers, batch)[chosen]
        yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)


def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def check_examples(call: str, data: PyTree) -> int:
    """Returns the number of examples; refuses leaves that do not agree on it."""
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


def check_only(
    call: str, only: Sequence[int] | np.ndarray | None, workers: int
) -> np.ndarray:
    """Returns the workers that are wanted; refuses who is none of them, or twice."""
    chosen = np.arange(workers) if only is None else np.asarray(only)
    if chosen.ndim != 1 or not len(chosen) or not _distinct(chosen, workers):
        raise ValueError(
            f"{call}: at least one of the workers 0 to {workers - 1} is needed, none "
            f"twice, and nobody else, got {only!r}"
        )
    if not np.issubdtype(chosen.dtype, np.integer):
        raise TypeError(f"{call}: workers must be ints, got {only!r}")
    return chosen


def _distinct(chosen: np.ndarray, workers: int) -> bool:
    """Whether all are workers, and none of them twice."""
    known = np.isin(chosen, np.arange(workers)).all()
    return bool(known) and len(np.unique(chosen)) == len(chosen)
