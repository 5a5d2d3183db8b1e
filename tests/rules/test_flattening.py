"""Concatenation of leaves into one vector per dtype."""

import jax
import jax.numpy as jnp
import numpy as np
from harness.rule_arrays import K, set_params_algorithm

import localsgd_jax as lsgd


def test_leaves_of_several_dtypes_are_unchanged_by_flattening():
    tree = {
        "a": jnp.zeros((2, 3), jnp.bfloat16),
        "b": jnp.zeros(4),
        "c": jnp.zeros((), jnp.bfloat16),
    }
    rng = np.random.default_rng(0)
    x = jax.tree.map(
        lambda v: jnp.asarray(rng.normal(size=(K, *v.shape)), v.dtype), tree
    )
    results = []
    for rule in (lsgd.diloco(), lsgd.flatten(lsgd.diloco())):
        cluster = lsgd.simulate(set_params_algorithm(rule), K)
        state, _ = cluster.step(cluster.init({"params": tree}), x)
        results.append(cluster.sync(state).workers["params"])
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for left, right in zip(*map(jax.tree.leaves, results), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
