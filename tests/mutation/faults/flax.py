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
        "nnx.merge(graph, *_to_variables(state, positions))",
        "nnx.merge(graph, *_to_variables(state._replace(other=start.other), positions))",
        "flax/test_flax.py -k masks",
    ),
    "adds the squares of workers without the distance of their means": Mutant(
        "flax/nnx_metrics.py",
        "m2 + count * (mean - joint) ** 2",
        "m2",
        "flax/test_nnx_objects.py -k moments",
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
