"""Faults planted in `localsgd_jax/checkpoint/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "hides why a checkpoint was not written": Mutant(
        "checkpoint/storage.py",
        "({_root_cause(error)}); ",
        "; ",
        "multi_process/test_disk_and_clock_failures.py -k full_disk",
    ),
    "counts examples from the restart": Mutant(
        "checkpoint/run_checkpointer.py",
        '"examples_seen": self._examples_seen + seen',
        '"examples_seen": seen',
        "checkpoint/test_run_checkpointer.py -k bitwise",
    ),
    "derives keys of new workers with the indices of old ones": Mutant(
        "checkpoint/resize.py",
        "jnp.arange(len(keys), max(num_workers, len(keys)))",
        "jnp.arange(0, max(num_workers, len(keys)) - len(keys))",
        "checkpoint/test_resize.py -k distinct_keys",
    ),
    "restores worker 0 onto all workers": Mutant(
        "checkpoint/resize.py",
        "return (total / count.astype(dtype)).astype(rows.dtype)",
        "return rows[0]",
        "checkpoint/test_resize.py -k other_number",
    ),
    "does not store the rule": Mutant(
        "checkpoint/metadata.py",
        '"rule": dict(cluster.algorithm.rule_names)',
        '"rule": {}',
        "checkpoint/test_metadata.py -k by_name",
    ),
    "does not compare the digests of leaves": Mutant(
        "checkpoint/metadata.py",
        "if a != b",
        "if False",
        "checkpoint/test_damage.py -k flipped",
    ),
    "does not compare the digest of the metadata": Mutant(
        "checkpoint/metadata.py",
        "json_digest(values):",
        "json_digest(values) and False:",
        "checkpoint/test_damage.py -k metadata",
    ),
    "sums words without their positions": Mutant(
        "checkpoint/digests.py",
        "_mix(words ^ ",
        "_mix(words ^ 0 * ",
        "checkpoint/test_digests.py -k passes",
    ),
    "counts positions from the start of each shard": Mutant(
        "execution/shard_mapping.py",
        "function(shard, [start[0] for start in starts])",
        "function(shard, [0 for start in starts])",
        "checkpoint/test_digests.py -k independent",
    ),
    "averages integers of workers": Mutant(
        "checkpoint/resize.py",
        "jnp.issubdtype(rows.dtype, jnp.inexact)",
        "jnp.issubdtype(rows.dtype, jnp.number)",
        "checkpoint/test_resize.py -k integers",
    ),
    "does not compare the digest of the states of iterators": Mutant(
        "checkpoint/reader.py",
        'json_digest(data) != stored["data_digest"]',
        "False",
        "training/test_data_state.py -k damaged -m full",
    ),
}
