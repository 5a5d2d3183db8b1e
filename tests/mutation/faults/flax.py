"""Faults planted in `localsgd_jax/flax/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "does not synchronise batch statistics": Mutant(
        "flax/default_rules.py",
        'rules.setdefault("batch_stats", merge_batch_stats())',
        "pass",
        "flax/test_flax.py -k default_rules",
    ),
    "resets variables that are neither parameters nor statistics": Mutant(
        "flax/nnx.py",
        "merged = nnx.merge(model_graph, state.params, state.batch_stats, state.other)",
        "merged = nnx.merge(model_graph, state.params, state.batch_stats, start.other)",
        "flax/test_flax.py -k masks",
    ),
    "replicates parameters with metadata": Mutant(
        "execution/partition_metadata.py",
        "    return _put(layout, x, spec)\n",
        "    return x\n",
        "flax/test_partitioning.py -k boxes_without",
    ),
    "ignores the metadata of NNX variables": Mutant(
        "flax/nnx.py",
        "return algorithm._replace(partition_specs=specs), start",
        "return algorithm, start",
        "flax/test_partitioning.py -k not_placed",
    ),
    "ignores logical rules": Mutant(
        "flax/linen.py",
        "return spmd.logical_to_mesh_axes(names, rules) if rules else names",
        "return names",
        "flax/test_partitioning.py -k rules_may_surround",
    ),
    "overwrites shardings by metadata": Mutant(
        "execution/partition_metadata.py",
        "if placed is not None and set(inner) & _names(placed):",
        "if False:",
        "flax/test_partitioning.py -k do_not_follow",
    ),
}
