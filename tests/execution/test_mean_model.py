"""Model of one worker where all workers are equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import (
    PLACEMENTS,
    RULES,
    assert_same,
    batches,
    cluster,
    network,
)
from harness.selection import in_full, keep
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.execution import mean_model

K = 4
VALUES = {
    "float32": jnp.linspace(-1, 1, 12).reshape(3, 4),
    "bfloat16": jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(3, 4),
    "float8": jnp.linspace(-1, 1, 12).astype(jnp.float8_e4m3fn).reshape(3, 4),
    "int8": jnp.arange(12, dtype=jnp.int8).reshape(3, 4),
    "complex64": jnp.arange(12).reshape(3, 4) * jnp.complex64(1 + 2j),
    "bool": (jnp.arange(12) % 3 == 0).reshape(3, 4),
    "key": jax.random.split(jax.random.key(0), 12).reshape(3, 4),
}


FAST = {("average", "sharded"), ("average", "simulate"), ("gossip_ring", "lanes")}


@pytest.mark.parametrize("name", keep(VALUES, {"float32", "key"}))
def test_checksums_detect_any_difference(name):
    value = VALUES[name]
    equal = jnp.stack([value] * K)
    assert mean_model._workers_are_equal({"a": equal, "b": jnp.zeros(K)})
    changed = equal.at[2, 1, 3].set(value[0, 0])
    swapped = equal.at[1].set(value[::-1])
    other_axis = equal.at[3].set(value[:, ::-1])
    for different in (changed, swapped, other_axis):
        assert not mean_model._workers_are_equal({"a": different})


def test_leaves_with_exchanged_values_differ():
    a, b = jnp.zeros((K, 3)), jnp.ones((K, 3))
    exchanged = {"a": a.at[1].set(1), "b": b.at[1].set(0)}
    assert not mean_model._workers_are_equal(exchanged)


@pytest.mark.parametrize(
    "name, placement",
    [
        (name, placement) if (name, placement) in FAST else in_full(name, placement)
        for name in RULES
        for placement in PLACEMENTS
        if name not in ("when", "when_every_round", "conditional_momentum_rule")
        and (not RULES[name].placements or placement in RULES[name].placements)
    ],
)
def test_model_is_common_after_rules_that_reach_consensus(name, placement):
    tested = cluster(placement, name)
    state = tested.init(network())
    assert mean_model.common_model(state) is not None
    state, _ = tested.step(state, batches(1)[0])
    assert mean_model.common_model(state) is None
    state = tested.sync(state)
    model = mean_model.common_model(state)
    if name != "reset_to_init":
        assert (model is not None) == RULES[name].reaches_consensus
    if model is not None:
        assert_same(model, jax.tree.map(lambda x: x[0], state.workers.params))


def test_no_parameters_are_sent_and_shards_stay():
    devices, specs = (
        lsgd.worker_mesh(2, inner_axes={"fsdp": 4}),
        (P("worker", "fsdp"), P("worker")),
    )
    leaves = [
        jax.device_put(jnp.ones((2, 8, 16)), NamedSharding(devices, spec))
        for spec in specs
    ]
    first_rows = mean_model._first_row_of_positions(devices, specs)
    assert len(lsgd.collective_ops(first_rows, leaves, mesh=devices)) == 0
    for row, spec in zip(mean_model._first_rows(leaves), specs, strict=True):
        expected = NamedSharding(devices, P(*spec[1:]))
        assert row.sharding.is_equivalent_to(expected, 2)
        np.testing.assert_array_equal(row, np.ones((8, 16)))
    ops = lsgd.collective_ops(mean_model._workers_are_equal, leaves, mesh=devices)
    assert ops and all(op.bytes <= 16 for op in ops)


def test_fields_keep_their_order():
    values = {"a": 1, "b": 2}
    assert list(mean_model.in_order(values, ["b", "a"])) == ["b", "a"]
    assert mean_model.in_order(values, None) is values
    assert mean_model.in_order(3, "a") == 3
