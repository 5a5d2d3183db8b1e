"""Means of many small leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import assert_close, assert_same, mesh
from harness.rule_arrays import set_params_algorithm
from harness.selection import in_full
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.core.buckets import map_buckets
from localsgd_jax.core.types import SyncContext

SMALL = 36  # More than a bucket.


def tree(leading=(), seed=0):
    """Small leaves of several shapes and dtypes, and one that is not small."""
    rng = np.random.default_rng(seed)
    shapes = {f"w{i:02}": (4, i % 3 + 1) for i in range(SMALL)}
    shapes |= {"b": (), "half": (3,), "large": (100, 90)}
    dtypes = {"half": jnp.bfloat16, "w03": jnp.complex64}
    return {
        name: jnp.asarray(
            rng.normal(size=(*leading, *shape)), dtypes.get(name, jnp.float32)
        )
        for name, shape in shapes.items()
    }


def synchronise(cluster, params, weights):
    """The state of workers with different parameters after a synchronisation."""
    state, _ = cluster.step(cluster.init({"params": params}), tree((4,), seed=1))
    sync = jax.jit(cluster.sync)
    text = sync.lower(state, weights).as_text()
    return sync(state, weights).workers["params"], text.count('"stablehlo.all_reduce"')


@pytest.mark.full
@pytest.mark.parametrize("weights", [in_full(None), np.array([1, 2, 0, 0.5], "f4")])
@pytest.mark.parametrize(
    "rule", [lsgd.average(), in_full(lsgd.diloco())], ids=["average", "diloco"]
)
def test_buckets_give_the_mean_of_each_leaf(rule, weights):
    algorithm = set_params_algorithm(rule)
    expected, _ = synchronise(lsgd.simulate(algorithm, 4), tree(), weights)
    for devices in (4, 2):
        cluster = lsgd.on_mesh(algorithm, mesh(worker=devices), workers=4)
        mean, sums = synchronise(cluster, tree(), weights)
        assert_close(mean, expected)
        # Two float32 buckets, the complex and the large leaf, the weights, their test.
        assert sums <= 6
        size = sum(np.size(x) for x in jax.tree.leaves(tree()))
        size += np.size(tree()["w03"])  # A complex number is two numbers.
        one_leaf = cluster.init({"params": {"w": jnp.zeros(size)}})
        state = cluster.init({"params": tree()})
        assert cluster.bytes_sent(state) == cluster.bytes_sent(one_leaf)


@pytest.mark.full
def test_leaves_of_sharded_workers_stay_sharded():
    """Nothing is sent inside a worker, and each device keeps its piece."""
    devices = mesh(worker=4, fsdp=2)
    automatic = Mesh(
        devices.devices, devices.axis_names, axis_types=(AxisType.Auto,) * 2
    )
    specs = {
        name: P("fsdp") if name.startswith("w") and i % 2 else P()
        for i, name in enumerate(sorted(tree()))
    }
    params = {
        name: jax.device_put(x, NamedSharding(automatic, specs[name]))
        for name, x in tree().items()
    }
    algorithm = set_params_algorithm(lsgd.average())
    cluster = lsgd.on_mesh(algorithm, devices)
    mean, sums = synchronise(cluster, params, None)
    assert_close(mean, synchronise(lsgd.simulate(algorithm, 4), tree(), None)[0])
    assert sums <= 6
    state = cluster.init({"params": params})
    for op in lsgd.collective_ops(cluster.sync, state):
        assert op.axes == ("worker",)
    for name, x in jax.jit(cluster.sync)(state).workers["params"].items():
        expected = NamedSharding(automatic, P("worker", *specs[name]))
        assert x.sharding.is_equivalent_to(expected, x.ndim), name


@pytest.mark.full
def test_few_small_leaves_are_no_bucket():
    few = {name: x for name, x in tree().items() if name < "w13"}
    seen = []

    def function(tree):
        seen.append(tree)
        return tree

    assert_same(map_buckets(function, few, SyncContext({}, 1)), few)
    assert_same(map_buckets(function, tree(), SyncContext({}, 1)), tree())
    assert_same(seen[0], few)
    assert [len(jax.tree.leaves(tree)) for tree in seen[1:]] == [5]
