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
}
