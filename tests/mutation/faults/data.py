"""Faults planted in `localsgd_jax/data/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "yields the rows of other workers for a worker subset": Mutant(
        "data/batching.py",
        "rows = indices.reshape(workers, batch)[local_workers]",
        "rows = indices.reshape(workers, batch)[: len(local_workers)]",
        "data/test_batching.py -k worker_subset",
    ),
    "yields an example twice": Mutant(
        "data/batching.py",
        "indices, remaining = np.split(remaining, [workers * batch])",
        "indices, remaining = remaining[: workers * batch], remaining[workers * batch - 1 :]",
        "data/test_batching.py",
    ),
    "restarts the streams of a resumed run": Mutant(
        "data/partitioning.py",
        "(seed, int(k)), step * batch",
        "(seed, int(k)), 0 * step * batch",
        "data/test_partitioning.py -k resuming",
    ),
    "assigns an example to two shards": Mutant(
        "data/partitioning.py",
        "indices_by_label = [indices[n:] for",
        "indices_by_label = [indices[n // 2 :] for",
        "data/test_partitioning.py -k disjoint",
    ),
    "shuffles every epoch with one seed": Mutant(
        "data/batching.py",
        "np.random.default_rng((seed, epoch))",
        "np.random.default_rng(seed)",
        "data/test_batching.py",
    ),
    "ignores the examples consumed before": Mutant(
        "data/batching.py",
        "divmod(examples_seen, count)",
        "divmod(0, count)",
        "data/test_batching.py",
    ),
    "does not publish that its batches cannot be read": Mutant(
        "data/prefetch.py",
        """                self._coordinator.all_gather(
                    {"error": f"{type(error).__name__}: {error}"}
                )
""",
        "                pass\n",
        "multi_process/test_training.py -k data_error",
    ),
    "compares no shapes after the first batches": Mutant(
        "data/prefetch.py",
        "if messages and num_ready:",
        "if messages and num_ready and not self._last_description:",
        "multi_process/test_training.py -k smaller -m full",
    ),
    "reads no batch ahead": Mutant(
        "data/prefetch.py",
        "while len(self._buffer) < buffer_size:",
        "while not self._buffer:",
        "training/test_dispatch.py -k reads_batches",
    ),
    "saves the state after batches that were read in advance": Mutant(
        "data/prefetch.py",
        "self.data_state = states[-1]",
        "self.data_state = self._read_state()",
        "training/test_data_state.py -k consumed_last",
    ),
    "keeps the object that an iterator changes": Mutant(
        "data/iterator_state.py",
        "copy.deepcopy(read())",
        "read()",
        "data/test_iterator_state.py -k copies",
    ),
}
