"""Compiled programs: collectives of steps, rounds and synchronisations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import (
    FEW_RULES,
    ON_DEVICES,
    REPRESENTATIVE_RULES,
    RULES,
    WORKERS,
    algorithm,
    batches,
    cluster,
    mesh,
    network,
    rule_placement_pairs,
    run_manually,
    stack,
)
from harness.selection import in_full, keep
from jax.sharding import NamedSharding, PartitionSpec

import localsgd_jax as lsgd
from localsgd_jax.analysis import total_bytes_sent

on_devices = pytest.mark.parametrize(
    "name, placement", rule_placement_pairs(ON_DEVICES)
)
few_on_devices = pytest.mark.parametrize(
    "name, placement", rule_placement_pairs(ON_DEVICES, REPRESENTATIVE_RULES)
)


def few_rules(placements):
    """Marks the pairs of `rule_placement_pairs` as full, except for a few rules."""
    return [
        pair if isinstance(pair, tuple) and pair[0] in FEW_RULES else in_full(*values)
        for pair in rule_placement_pairs(placements)
        for values in [getattr(pair, "values", pair)]
    ]


def names(ops):
    return [op.name for op in ops]


def initial(placed):
    return placed.init(network()), placed.shard_batch(batches(1)[0])


@pytest.mark.parametrize(
    "name, placement",
    few_rules(["simulate", "simulate_map", *ON_DEVICES, "lanes_map"]),
)
def test_local_step_has_no_collectives(name, placement):
    placed = cluster(placement, name)
    assert lsgd.collective_ops(placed.step, *initial(placed)) == ()


@on_devices
def test_synchronisation_has_only_its_collectives(name, placement):
    placed = cluster(placement, name)
    state, _ = initial(placed)
    ops = lsgd.collective_ops(placed.sync, state)
    assert RULES[name].observed(names(ops)) == RULES[name].kinds
    assert {op.axes for op in ops} <= {("worker",)}
    if RULES[name].conditional:
        assert all(op.in_branch for op in ops)


@pytest.mark.parametrize("name", keep(RULES, FEW_RULES))
def test_simulated_synchronisation_has_no_collectives(name):
    simulated = cluster("simulate", name)
    assert lsgd.collective_ops(simulated.sync, initial(simulated)[0]) == ()


@few_on_devices
def test_gated_step_has_collectives_only_in_conditional(name, placement):
    placed = cluster(placement, name)
    ops = lsgd.collective_ops(lsgd.gated(placed, lsgd.every(4)), *initial(placed))
    assert RULES[name].observed(names(ops)) == RULES[name].kinds
    assert all(op.in_branch for op in ops)


@few_on_devices
def test_fused_round_has_collectives_only_after_loop(name, placement):
    placed = cluster(placement, name)
    state, _ = initial(placed)
    stacked = placed.shard_batch(stack(batches(4)), time=True)
    compiled = jax.jit(lsgd.fused(placed)).lower(state, stacked).compile()
    assert " while(" in compiled.as_text()
    ops = lsgd.collective_ops(compiled)
    assert RULES[name].observed(names(ops)) == RULES[name].kinds
    assert not any(op.in_loop for op in ops)


def test_parser_finds_collectives():
    """A metric reduced at every step is found, so the checks above are not vacuous."""
    placed = cluster("mesh", "average")

    def reducing_step(state, batch):
        state, metrics = placed.step(state, batch)
        return state, jnp.mean(metrics["loss"])

    (op,) = lsgd.collective_ops(reducing_step, *initial(placed))
    assert op.name == "all-reduce" and not op.in_branch


def test_parser_finds_collective_of_many_leaves():
    """In tuple types with six elements or more XLA prints /*index=5*/."""
    made = lsgd.local_sgd(
        lambda params, b: sum(map(jnp.sum, params)) * b,
        optax.sgd(1.0),
        rule=lsgd.average(),
    )
    placed = lsgd.on_mesh(made, mesh(worker=8))
    (op,) = lsgd.collective_ops(placed.sync, placed.init([jnp.zeros(3)] * 9))
    assert (op.name, op.bytes) == ("all-reduce", 9 * 3 * 4)


@pytest.mark.parametrize(
    "name", keep(["average", "chain", "momentum_rule"], ["momentum_rule"])
)
def test_bytes_sent_match_compiled_program(name):
    placed = cluster("mesh", name)
    state, _ = initial(placed)
    payload = sum(leaf.nbytes for leaf in jax.tree.leaves(network()))
    ops = lsgd.collective_ops(placed.sync, state)
    assert sum(op.bytes for op in ops) == payload
    assert (
        placed.bytes_sent(state) == total_bytes_sent(ops) == (2 * payload * 7 // 8,) * 2
    )


def test_weights_add_one_number_to_the_payload():
    placed = cluster("mesh", "average")
    state, _ = initial(placed)
    payload = sum(leaf.nbytes for leaf in jax.tree.leaves(network()))
    (op,) = lsgd.collective_ops(placed.sync, state, np.ones(WORKERS, np.float32))
    assert (op.name, op.bytes) == ("all-reduce", payload + 4)


def test_bytes_sent_of_round_that_is_not_due_are_zero():
    placed = cluster("mesh", "when")
    state, _ = initial(placed)
    due = cluster("mesh", "average").bytes_sent(state)[0]
    assert placed.bytes_sent(state) == (0, due)
    per_round = [placed.bytes_sent(state, number) for number in (1, 2)]
    assert per_round == [(0, 0), (due, due)]


def test_bfloat16_is_summed_in_float32():
    placed = lsgd.on_mesh(algorithm(lsgd.average()), mesh(worker=8))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), network())
    ops = lsgd.collective_ops(placed.sync, placed.init(params))
    assert [op.dtypes for op in ops] == [("f32",)]


@pytest.mark.parametrize("shape", keep([(4, 2), (2, 4)], [(4, 2)]), ids=str)
def test_sharded_worker_sends_only_its_shards(shape):
    """The average of 64 x 32 floats sends 1/m of them and gathers nothing."""
    devices = mesh(worker=shape[0], model=shape[1])
    auto = jax.sharding.Mesh(devices.devices, devices.axis_names)
    params = {
        "w": jax.device_put(
            np.ones((64, 32), np.float32),
            NamedSharding(auto, PartitionSpec(None, "model")),
        )
    }

    def loss_fn(params, batch):
        return jnp.mean((batch @ params["w"]) ** 2)

    made = lsgd.local_sgd(loss_fn, optax.adam(0.1), rule=lsgd.average())
    placed = lsgd.on_mesh(made, devices)
    state = placed.init(params)
    moment = state.workers.opt_state[0].mu["w"]
    for leaf in (state.workers.params["w"], moment):
        assert leaf.sharding.shard_shape(leaf.shape) == (1, 64, 32 // shape[1])
    (op,) = lsgd.collective_ops(placed.sync, state)
    assert (op.name, op.bytes) == ("all-reduce", 64 * 32 * 4 // shape[1])
    assert op.axes == ("worker",)

    batch = np.random.default_rng(0).normal(size=(shape[0], 5, 64)).astype(np.float32)
    simulated = lsgd.simulate(made, shape[0])
    expected = simulated.init(jax.tree.map(np.asarray, params))
    expected, _ = simulated.step(expected, batch)
    state, _ = placed.step(state, batch)
    np.testing.assert_allclose(
        placed.sync(state).workers.params["w"],
        simulated.sync(expected).workers.params["w"],
        rtol=1e-5,
        atol=1e-6,
    )


def test_gradients_are_not_summed_over_workers():
    """Parameters that enter shard_map replicated would get summed gradients."""
    made = lsgd.local_sgd(lambda w, b: w * b, optax.sgd(1.0), rule=lsgd.average())
    placed = lsgd.on_mesh(made, mesh(worker=8))
    batch = np.arange(8, dtype=np.float32)
    state, _ = placed.step(placed.init(np.float32(0)), batch)
    np.testing.assert_array_equal(state.workers.params, -np.arange(8))


@pytest.mark.parametrize("placement", keep(["simulate", "mesh", "lanes"], ["lanes"]))
def test_state_can_be_donated(placement):
    """The anchor equals the initial parameters: a shared buffer would raise here."""
    placed = cluster(placement, "momentum_rule")
    expected, _ = run_manually(placed, batches(4), lsgd.every(2))
    step = jax.jit(lsgd.gated(placed, lsgd.every(2)), donate_argnums=0)
    params = jax.tree.map(jnp.asarray, network())
    state = placed.init(params)
    for batch in batches(4):
        state, _ = step(state, batch)
    np.testing.assert_allclose(
        state.workers.params["out"], expected.workers.params["out"], rtol=1e-6
    )
    np.testing.assert_array_equal(params["out"], network()["out"])


@pytest.mark.parametrize(
    "placement", keep(["simulate", "mesh", "lanes", "sharded"], ["simulate", "lanes"])
)
def test_loss_is_traced_once(placement):
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return jnp.sum((params - batch) ** 2)

    made = lsgd.local_sgd(loss_fn, optax.adam(0.1), rule=lsgd.average())
    placed = {
        "simulate": lambda: lsgd.simulate(made, 8),
        "mesh": lambda: lsgd.on_mesh(made, mesh(worker=8)),
        "lanes": lambda: lsgd.on_mesh(made, mesh(worker=4), workers=8),
        "sharded": lambda: lsgd.on_mesh(made, mesh(worker=4, model=2), workers=8),
    }[placement]()
    step = jax.jit(lsgd.gated(placed, lsgd.every(2)), donate_argnums=0)
    state = placed.init(0.0)
    for t in range(5):
        state, _ = step(state, placed.shard_batch(np.full(8, t, np.float32)))
    assert len(traces) == 1
    assert step._cache_size() == 1
