"""Faults planted in `localsgd_jax/rules/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "applies the own update again a round later": Mutant(
        "rules/eager.py",
        "share.astype(mean.dtype) * (new - last)",
        "share.astype(mean.dtype) * new",
        "rules/test_eager.py -k eager_outer",
    ),
    "shortens the radial mean": Mutant(
        "rules/radial_directional.py",
        "return _divide(direction, _norm(direction)) *",
        "return direction *",
        "rules/test_radial_directional.py -k hand",
    ),
    "shifts the levels of 4-bit floats": Mutant(
        "rules/float4_codec.py",
        "jnp.exp2(level - _LEVELS)",
        "jnp.exp2(level - _LEVELS - 1)",
        "rules/test_float4_codec.py -k nearest",
    ),
    "keeps the complete error of a sparse mean": Mutant(
        "rules/sparse.py",
        "decay * (vector - join_rows(sent, vector.size))",
        "vector - join_rows(sent, vector.size)",
        "rules/test_sparse.py -k fixture",
    ),
    "swaps the levels of a sparse message": Mutant(
        "rules/sparse_messages.py",
        "jnp.where(is_large == 1, high, low)",
        "jnp.where(is_large == 1, low, high)",
        "rules/test_sparse.py -k messages",
    ),
    "sends sparse positions as bytes": Mutant(
        "rules/sparse_messages.py",
        "return max((chunk - 1).bit_length(), 1)",
        "return 16",
        "rules/test_sparse.py -k 14_bits",
    ),
    "clips to the median of all workers": Mutant(
        "rules/norm_clipping.py",
        "jnp.where(included, values, jnp.inf)",
        "values",
        "rules/test_sparse.py -k clip_to",
    ),
    "gives leaves to the last rule of a partition": Mutant(
        "rules/partitioning.py",
        "next(updated) if own == label else leaf",
        "next(updated) if own == label else jax.numpy.zeros_like(leaf)",
        "rules/test_partitioning.py -k each_leaf",
    ),
    "averages second moments with the first": Mutant(
        "rules/partitioning.py",
        '"second_moment": second_moment}',
        '"second_moment": first_moment}',
        "rules/test_partitioning.py -k own_rounds",
    ),
    "corrects gradients in the wrong direction": Mutant(
        "rules/variance_reduction.py",
        "x.astype(dtype) - x_mean.astype(dtype)",
        "x_mean.astype(dtype) - x.astype(dtype)",
        "rules/test_variance_reduction.py -k hand",
    ),
    "corrects inactive workers": Mutant(
        "rules/variance_reduction.py",
        "jnp.where(is_active, drift, 0)",
        "drift",
        "rules/test_variance_reduction.py -k numpy",
    ),
    "omits the variance between the means": Mutant(
        "rules/batch_statistics.py",
        "promote(x) + d**2",
        "promote(x)",
        "rules/test_batch_statistics.py -k union",
    ),
    "takes deviations from zero": Mutant(
        "rules/batch_statistics.py",
        "last = state.shared",
        "last = jax.tree.map(jnp.zeros_like, state.shared)",
        "rules/test_batch_statistics.py -k cancel",
    ),
    "merges statistics without active workers": Mutant(
        "rules/batch_statistics.py",
        "return where(any_active, merged, tree), new_state",
        "return merged, new_state",
        "rules/test_batch_statistics.py -k all_zero",
    ),
    "averages step counts": Mutant(
        "rules/optimizer_state.py",
        "jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None",
        "not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else None",
        "rules/test_optimizer_state.py -k counts",
    ),
    "resets to zero": Mutant(
        "rules/optimizer_state.py",
        "jnp.where(any_active, initial, x)",
        "jnp.where(any_active, 0 * initial, x)",
        "rules/test_optimizer_state.py -k not_zero",
    ),
    "drops the state of a rule in a chain": Mutant(
        "rules/combinators.py",
        "states.append(rule_state)",
        "states.append(RuleState(shared, local))",
        "rules/test_combinators.py -k chain_of_one",
    ),
    "ignores the schedule of when": Mutant(
        "rules/combinators.py",
        "due = schedule(context.round)",
        "due = True",
        "rules/test_combinators.py -k when",
    ),
    "omits one leaf": Mutant(
        "core/averaging.py",
        "return where(any_active, mean, tree), state",
        "leaves, structure = jax.tree.flatten(where(any_active, mean, tree))\n"
        "        leaves[-1] = jax.tree.leaves(tree)[-1]\n"
        "        return structure.unflatten(leaves), state",
        "rules/test_invariants.py -k workers_are_equal",
    ),
    "returns the empty mean": Mutant(
        "core/averaging.py",
        "return where(any_active, mean, tree), state",
        "return mean, state",
        "rules/test_invariants.py -k all_zero_weights",
    ),
    "ascends the pseudo-gradient": Mutant(
        "rules/outer_optimizer.py",
        "jnp.subtract, anchor, promote(tree)",
        "jnp.subtract, promote(tree), anchor",
        "rules/test_conformance.py -k nesterov",
    ),
    "keeps the anchor in half precision": Mutant(
        "rules/outer_optimizer.py",
        "anchor = promote(tree)",
        "anchor = tree",
        "rules/test_outer_optimizer.py -k half_precision",
    ),
    "sums shards instead of averaging": Mutant(
        "rules/sharded.py",
        "collectives.reduce_scatter(split_rows(x, workers), context) / total",
        "collectives.reduce_scatter(split_rows(x, workers), context)",
        "rules/test_sharded.py -k matches_the_rule",
    ),
    "interpolates with exchanged weights": Mutant(
        "rules/elastic_averaging.py",
        "x + (1 - alpha) * (t - x)",
        "x + alpha * (t - x)",
        "rules/test_elastic_averaging.py -k interpolate",
    ),
    "moves workers towards the mean instead of the centre": Mutant(
        "rules/elastic_averaging.py",
        "x - alpha * (x - z), workers, centre",
        "x - alpha * (x - z), workers, mean",
        "rules/test_elastic_averaging.py -k elastic_average",
    ),
    "does not update the snapshot": Mutant(
        "rules/delayed.py",
        "new_state = RuleState(inner.shared, (new_tree, inner.local))",
        "new_state = RuleState(inner.shared, (snapshot, inner.local))",
        "rules/test_delayed.py -k overlap",
    ),
    "counts the rounds of all fragments": Mutant(
        "rules/streaming.py",
        "fragment_round = slot // n * rounds_per_fragment + round_in_slot + 1",
        "fragment_round = context.round",
        "rules/test_streaming.py -k own_rounds",
    ),
    "forgets the server error": Mutant(
        "rules/compression.py",
        "chunk = chunk + errors[index]",
        "chunk = chunk + 0 * index",
        "rules/test_compression.py -k preserves_the_sum",
    ),
    "forgets the worker error": Mutant(
        "rules/error_feedback.py",
        "jax.tree.map(jnp.add, promote(tree), old.worker_error)",
        "promote(tree)",
        "rules/test_compression.py -k preserves_the_sum",
    ),
    "keeps the numbers that were sent": Mutant(
        "rules/compression.py",
        "vector.at[positions].set(0)\n",
        "vector\n",
        "rules/test_compression.py -k test_top_k",
    ),
    "takes the scale of positive numbers": Mutant(
        "rules/codecs.py",
        "jnp.maximum(blocks.max(axis=-2), -blocks.min(axis=-2))",
        "blocks.max(axis=-2)",
        "rules/test_codecs.py -k consecutive_blocks",
    ),
    "selects among the last part only": Mutant(
        "rules/compression.py",
        "positions = columns + length * jnp.arange(len(rows), dtype=columns.dtype)[:, None]",
        "positions = columns + length * (len(rows) - 1)",
        "rules/test_compression.py -k parts_one_after_the_other",
    ),
    "rounds codes down": Mutant(
        "rules/codecs.py",
        "if stochastic else 0.5",
        "if stochastic else 0.0",
        "rules/test_codecs.py -k round_trip",
    ),
    "packs neighbours instead of parts": Mutant(
        "rules/codecs.py",
        "codes.reshape(*codes.shape[:-1], parts, -1, width)",
        "codes.reshape(*codes.shape[:-1], -1, width, parts)\n"
        "    codes = jnp.moveaxis(codes, -1, -3)",
        "rules/test_codecs.py -k inverts",
    ),
    "pads short rows to whole tiles": Mutant(
        "rules/codecs.py",
        "if multiple <= _MAX_PADDING * length:",
        "if multiple <= length:",
        "rules/test_codecs.py -k padded_to_tiles",
    ),
    "counts inactive workers in a median": Mutant(
        "rules/robust.py",
        "combine(values, jnp.maximum(jnp.sum(active), 1))",
        "combine(values, len(values))",
        "rules/test_robust.py -k median",
    ),
    "accepts non-finite workers": Mutant(
        "rules/robust.py",
        "inliers = (weights > 0) & jnp.isfinite(log_norms)",
        "inliers = weights > 0",
        "rules/test_robust.py -k non_finite",
    ),
    "shifts in the wrong direction": Mutant(
        "rules/decentralized.py",
        "collectives.shift(promoted, shift, context)",
        "collectives.shift(promoted, -shift, context)",
        "rules/test_decentralized.py -k doubly_stochastic",
    ),
    "ignores weights in diagnostics": Mutant(
        "rules/diagnostics.py",
        "normalized = weights / weights.sum()",
        "normalized = jnp.ones_like(weights) / len(weights)",
        "rules/test_diagnostics.py -k match_reference",
    ),
}
