"""Data that belongs to workers: shards that differ, and batches from a worker's own."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from localsgd_jax import checks
from localsgd_jax.base import PyTree
from localsgd_jax.deal import check_examples, check_only


def dirichlet(
    labels: np.ndarray, workers: int, alpha: float, *, seed: int = 0
) -> list[np.ndarray]:
    """Splits examples so that every worker sees labels in proportions of its own.

    With the proportions p of the labels in the data, worker k draws

        qₖ ~ Dirichlet(alpha p)

    and then takes n // K examples with labels from qₖ, none of them twice; where a
    label is used up it takes the others. A large alpha gives every worker the same
    mix, a small one few labels each. Up to K − 1 examples are left over.

    Args:
      labels: whole numbers or anything else that can be told apart, `(n,)`.
      workers: K.
      alpha: concentration, positive: 100 is nearly the same for all, 0.1 very uneven.
      seed: of the draws.

    Returns:
      For each worker the indices of its examples.

    Raises:
      TypeError: if workers or seed is not an int.
      ValueError: if a number is out of range, labels are not `(n,)`, or there are
        fewer examples than workers.

    Example:
      >>> import numpy as np
      >>> shards = dirichlet(np.arange(1000) % 10, workers=4, alpha=0.1)
      >>> [len(shard) for shard in shards]
      [250, 250, 250, 250]

    References:
      Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution for
      Federated Visual Classification, 2019, section 3. arXiv:1909.06335
    """
    workers = checks.integer("dirichlet(workers)", "workers", workers, 1)
    seed = checks.integer("dirichlet(seed)", "seed", seed, 0)
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) < workers:
        raise ValueError(
            "dirichlet(labels): one label for each example is needed, and an example "
            f"for each of the {workers} workers, got shape {labels.shape}"
        )
    if not alpha > 0:
        raise ValueError(f"dirichlet(alpha): alpha must be positive, got {alpha}")
    rng = np.random.default_rng(seed)
    _, kinds, counts = np.unique(labels, return_inverse=True, return_counts=True)
    piles = [
        rng.permutation(np.flatnonzero(kinds == kind)) for kind in range(len(counts))
    ]
    shards = []
    for _ in range(workers):
        wanted = rng.dirichlet(alpha * counts / len(labels))
        taken = _draw(
            rng, wanted, np.array([len(p) for p in piles]), len(labels) // workers
        )
        shards.append(
            np.concatenate([p[:n] for p, n in zip(piles, taken, strict=True)])
        )
        piles = [p[n:] for p, n in zip(piles, taken, strict=True)]
    return shards


def deal_shards(
    data: PyTree,
    shards: Sequence[np.ndarray],
    batch: int,
    *,
    seed: int = 0,
    start: int = 0,
    only: Sequence[int] | np.ndarray | None = None,
) -> Iterator[PyTree]:
    """Deals every worker its own shard, over and over, shuffled anew each time.

    Step t hands worker k the B examples

        streamₖ[t B : (t + 1) B]

    of the stream in which epochs of its shard follow each other, epoch e shuffled with
    the seed (seed, k, e). `deal` gives all workers examples from one deck instead.

    Args:
      data: pytree of arrays whose leading axis counts the same examples.
      shards: for each worker the indices of its examples, such as from `dirichlet`.
      batch: B, examples for each worker and step.
      seed: of the shuffles.
      start: examples dealt to all workers before: a multiple of K B.
      only: workers whose rows are wanted, such as `own_workers(cluster)`; None for all.

    Returns:
      An iterator of batches with leaves `(K, B, ...)`, or fewer rows with `only`.

    Raises:
      TypeError: if a number is not an int.
      ValueError: if a shard is empty or holds what is no index, or a number is out of
        range.

    Example:
      >>> import numpy as np
      >>> shards = [np.array([0, 1]), np.array([4])]
      >>> batches = deal_shards(np.arange(6), shards, batch=2)
      >>> np.sort(next(batches), axis=1).tolist()
      [[0, 1], [4, 4]]
    """
    count = check_examples("deal_shards(data)", data)
    batch = checks.integer("deal_shards(batch)", "batch", batch, 1)
    seed = checks.integer("deal_shards(seed)", "seed", seed, 0)
    start = checks.integer("deal_shards(start)", "start", start, 0)
    shards = [np.asarray(shard) for shard in shards]
    if not shards:
        raise ValueError("deal_shards(shards): at least one is needed, got none")
    for k, shard in enumerate(shards):
        if shard.ndim != 1 or not len(shard) or shard.min() < 0 or shard.max() >= count:
            raise ValueError(
                f"deal_shards(shards): each must hold indices of the {count} examples, "
                f"and at least one, got {shard!r} for worker {k}"
            )
    step, rest = divmod(start, len(shards) * batch)
    if rest:
        raise ValueError(
            f"deal_shards(start): start must be a multiple of the {len(shards)} * "
            f"{batch} examples of a step, got {start}"
        )
    chosen = check_only("deal_shards(only)", only, len(shards))
    return _batches(data, shards, batch, seed, step, chosen)


def _batches(
    data: PyTree,
    shards: list[np.ndarray],
    batch: int,
    seed: int,
    step: int,
    chosen: np.ndarray,
) -> Iterator[PyTree]:
    """Cuts the streams into batches."""
    streams = [_stream(shards[k], (seed, int(k)), step * batch) for k in chosen]
    while True:
        rows = np.array([[next(stream) for _ in range(batch)] for stream in streams])
        yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)


def _stream(shard: np.ndarray, seed: tuple[int, int], start: int) -> Iterator[int]:
    """Yields the examples of a shard, epoch after epoch."""
    epoch, position = divmod(start, len(shard))
    while True:
        order = np.random.default_rng((*seed, epoch)).permutation(shard)
        yield from order[position:]
        epoch, position = epoch + 1, 0


def _draw(
    rng: np.random.Generator, wanted: np.ndarray, left: np.ndarray, count: int
) -> np.ndarray:
    """Draws how many examples of each label to take, no more than are left."""
    taken = np.zeros(len(left), np.int64)
    while (lacking := count - taken.sum()) > 0:
        share = np.where(taken < left, wanted, 0)
        if not share.sum() > 0:  # Nothing left of what was wanted: anything else.
            share = (left - taken).astype(float)
        taken += rng.multinomial(lacking, share / share.sum())
        taken = np.minimum(taken, left)
    return taken
