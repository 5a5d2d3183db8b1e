"""Non-IID partitions of a dataset, and batches from each worker's partition."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import (
    MAX_INT64,
    check,
    check_int,
    check_number,
    check_type,
    describe,
)
from localsgd_jax.data.batching import check_worker_subset, count_examples, index_array


def dirichlet_partition(
    labels: np.ndarray, workers: int, alpha: float, *, seed: int = 0
) -> list[np.ndarray]:
    """Partitions a dataset into shards with different label proportions.

    With the proportions p of the labels in the data, worker k draws

        qₖ ~ Dirichlet(alpha p)

    and then receives n // K examples with labels drawn from qₖ, without replacement; if
    a label is exhausted it receives examples with other labels. A large alpha gives all
    workers similar proportions, a small one few labels to each worker. Up to K − 1
    examples remain unused.

    Args:
      labels: `(n,)`, integers of any dtype, bools or strings.
      workers: K.
      alpha: concentration, positive; 100 is nearly uniform, 0.1 very uneven.
      seed: seed of the random draws.

    Returns:
      For each worker the indices of its examples, `(n // K,)`.

    Raises:
      TypeError: if workers or seed is not an int, or labels are no classes.
      ValueError: if an argument is out of range, labels are not `(n,)`, or there are
        fewer examples than workers.

    Example:
      >>> import numpy as np
      >>> shards = dirichlet_partition(np.arange(1000) % 10, workers=4, alpha=0.1)
      >>> [len(shard) for shard in shards]
      [250, 250, 250, 250]

    References:
      Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution for
      Federated Visual Classification, 2019, section 3. arXiv:1909.06335
    """
    call = "dirichlet_partition"
    workers = check_int(f"{call}(workers)", "workers", workers, 1)
    seed = check_int(f"{call}(seed)", "seed", seed, 0, MAX_INT64)
    labels = _class_labels(f"{call}(labels)", labels)
    if labels.ndim != 1 or len(labels) < workers:
        raise ValueError(
            f"{call}(labels): labels must be one-dimensional, with an example for each "
            f"of the {workers} workers, got shape {labels.shape}"
        )
    alpha = check_number(f"{call}(alpha)", "alpha", alpha, above=0)
    rng = np.random.default_rng(seed)
    _, label_ids, counts = np.unique(labels, return_inverse=True, return_counts=True)
    indices_by_label = [
        rng.permutation(np.flatnonzero(label_ids == label))
        for label in range(len(counts))
    ]
    shards = []
    for _ in range(workers):
        proportions = rng.dirichlet(alpha * counts / len(labels))
        available = np.array([len(indices) for indices in indices_by_label])
        label_counts = _sample_label_counts(
            rng, proportions, available, len(labels) // workers
        )
        pairs = list(zip(indices_by_label, label_counts, strict=True))
        shards.append(np.concatenate([indices[:n] for indices, n in pairs]))
        indices_by_label = [indices[n:] for indices, n in pairs]
    return shards


def _class_labels(call: str, labels: object) -> np.ndarray:
    """Returns labels as an array; raises a TypeError unless they are classes."""
    try:
        array = np.asarray(labels)
    except ValueError:
        array = np.empty(0, object)
    is_integral = array.dtype.kind == "f" and (array == np.floor(array)).all()
    if not (array.dtype.kind in "iubUS" or is_integral):
        rule = "labels must be integers, bools or strings"
        raise TypeError(f"{call}: {rule}, got {describe(labels)}")
    return array


def partitioned_batches(
    data: PyTree,
    shards: Sequence[np.ndarray],
    batch: int,
    *,
    seed: int = 0,
    examples_seen: int = 0,
    local_workers: Sequence[int] | np.ndarray | None = None,
) -> Iterator[PyTree]:
    """Yields batches from each worker's partition indefinitely.

    At step t worker k receives the B examples

        streamₖ[t B : (t + 1) B]

    of a stream that concatenates the epochs of its shard, epoch e shuffled with the
    seed (seed, k, e). `shuffled_batches` draws the examples of all workers from one
    stream instead.

    Args:
      data: pytree of arrays with leaves `(n, ...)` for n examples.
      shards: for each worker the indices of its examples, such as from
        `dirichlet_partition`.
      batch: B, the number of examples per worker and step; at most n.
      seed: seed of the shuffles.
      examples_seen: number of examples consumed before by all workers together, a
        multiple of K B.
      local_workers: indices of the workers to produce rows for, such as
        `local_workers(cluster)`; None for all.

    Returns:
      An iterator of batches with leaves `(K, B, ...)`, or one row for each of the
      `local_workers`.

    Raises:
      TypeError: if a number is not an int.
      ValueError: if a shard is empty or contains an invalid index, or an argument is
        out of range.

    Example:
      >>> import numpy as np
      >>> shards = [np.array([0, 1]), np.array([4])]
      >>> batches = partitioned_batches(np.arange(6), shards, batch=2)
      >>> np.sort(next(batches), axis=1).tolist()
      [[0, 1], [4, 4]]
    """
    call = "partitioned_batches"
    count = count_examples(f"{call}(data)", data)
    batch = check_int(f"{call}(batch)", "batch", batch, 1)
    seed = check_int(f"{call}(seed)", "seed", seed, 0, MAX_INT64)
    examples_seen = check_int(
        f"{call}(examples_seen)", "examples_seen", examples_seen, 0, MAX_INT64
    )
    check_type(f"{call}(shards)", "shards", shards, Sequence, np.ndarray)
    name = "the indices of a shard"
    shards = [index_array(f"{call}(shards)", name, shard) for shard in shards]
    if not shards:
        raise ValueError(f"{call}(shards): at least one shard is needed, got none")
    for k, shard in enumerate(shards):
        if shard.ndim != 1 or not len(shard) or shard.min() < 0 or shard.max() >= count:
            raise ValueError(
                f"{call}(shards): each shard must be a non-empty array of indices in "
                f"[0, {count}), got {describe(shard)} for worker {k}"
            )
    rule = f"batch must be at most the {count} examples"
    check(batch <= count, f"{call}(batch)", rule, batch)
    step, remainder = divmod(examples_seen, len(shards) * batch)
    if remainder:
        raise ValueError(
            f"{call}(examples_seen): examples_seen must be a multiple of the "
            f"{len(shards)} * {batch} examples of a step, got {examples_seen}"
        )
    subset = check_worker_subset(f"{call}(local_workers)", local_workers, len(shards))
    return _batches(data, shards, batch, seed, step, subset)


def _batches(
    data: PyTree,
    shards: list[np.ndarray],
    batch: int,
    seed: int,
    step: int,
    local_workers: np.ndarray,
) -> Iterator[PyTree]:
    """Splits the streams of examples into batches."""
    streams = [_stream(shards[k], (seed, int(k)), step * batch) for k in local_workers]
    while True:
        rows = np.array([[next(stream) for _ in range(batch)] for stream in streams])
        yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)


def _stream(shard: np.ndarray, seed: tuple[int, int], start: int) -> Iterator[int]:
    """Yields the example indices of a shard, epoch after epoch."""
    epoch, position = divmod(start, len(shard))
    while True:
        order = np.random.default_rng((*seed, epoch)).permutation(shard)
        yield from order[position:]
        epoch, position = epoch + 1, 0


def _sample_label_counts(
    rng: np.random.Generator,
    proportions: np.ndarray,
    available: np.ndarray,
    total: int,
) -> np.ndarray:
    """Samples the number of examples of each label, at most the available ones."""
    counts = np.zeros(len(available), np.int64)
    while (missing := total - counts.sum()) > 0:
        weights = np.where(counts < available, proportions, 0)
        if not weights.sum() > 0:
            # All labels with a positive proportion are exhausted: take from the rest.
            weights = (available - counts).astype(float)
        counts += rng.multinomial(missing, weights / weights.sum())
        counts = np.minimum(counts, available)
    return counts
