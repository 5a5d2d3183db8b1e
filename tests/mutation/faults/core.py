"""Faults planted in `localsgd_jax/core/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "mixes sharded and replicated leaves in a bucket": Mutant(
        "core/buckets.py",
        "for _, indices in group_leaves(leaves, specs).values()",
        "for _, indices in group_leaves(leaves, None).values()",
        "core/test_buckets.py -k stay_sharded",
    ),
    "exchanges the leaves of buckets": Mutant(
        "core/buckets.py",
        "for i, leaf in zip(group, split",
        "for i, leaf in zip(group[::-1], split",
        "core/test_buckets.py -k mean_of_each",
    ),
    "adds no correction to gradients": Mutant(
        "core/algorithm.py",
        "if is_corrected:\n            grad",
        "if False:\n            grad",
        "rules/test_variance_reduction.py -k hand",
    ),
    "ignores the weights of a mean": Mutant(
        "core/collectives.py",
        "x * weight.astype(x.dtype), 0",
        "x, 0",
        "rules/test_averaging.py -k weighted",
    ),
    "adds NaN of workers of weight 0": Mutant(
        "core/collectives.py",
        "jnp.where(weight > 0, x * weight.astype(x.dtype), 0)",
        "x * weight.astype(x.dtype)",
        "rules/test_invariants.py -k weight_zero",
    ),
    "uses one worker's weight for its group": Mutant(
        "core/collectives.py",
        "return _psum(promote(jnp.asarray(weight)), inner)",
        "return promote(jnp.asarray(weight))",
        "rules/test_hierarchies.py -k group_weights",
    ),
    "gives moments no sharding": Mutant(
        "core/pieces.py",
        "            if found_shape == shape:\n                return spec",
        "            if found_shape == shape:\n                return P()",
        "execution/test_sharded_rules.py -k follow_the_path",
    ),
    "mixes replicated leaves with sharded ones": Mutant(
        "core/pieces.py",
        "groups.setdefault(_axes(spec), [])",
        'groups.setdefault(("fsdp",), [])',
        "execution/test_sharded_rules.py -k compressed_by_itself",
    ),
    "counts replicated leaves once for each device": Mutant(
        "core/pieces.py",
        "jax.lax.psum(x, self.axes) if self.axes else x",
        'jax.lax.psum(x, tuple(inner_axes()) or ("fsdp",))',
        "execution/test_sharded_rules.py -k with_diagnostics",
    ),
    "accumulates in half precision": Mutant(
        "core/collectives.py",
        "promoted = promote(tree)",
        "promoted = tree",
        "core/test_algorithm.py -k half_precision",
    ),
    "shifts across devices without a carry": Mutant(
        "core/collectives.py",
        "blocks + 1)",
        "blocks)",
        "rules/test_decentralized.py -k shift",
    ),
    "omits the arguments of a rule from its name": Mutant(
        "core/call_names.py",
        "return f\"{function}({', '.join(parts)})\"",
        'return f"{function}()"',
        "rules/test_names.py -k with_its_arguments",
    ),
}
