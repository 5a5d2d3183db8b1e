"""What the compiled programs do: local steps are silent, rounds send what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    ON_DEVICES,
    RULES,
    WORKERS,
    algorithm,
    batches,
    cluster,
    mesh,
    network,
    pairs,
    run,
    stack,
)
from jax.sharding import NamedSharding, PartitionSpec

import localsgd_jax as lsgd
from localsgd_jax.ledger import sent

rules = pytest.mark.parametrize("name", RULES)
on_devices = pytest.mark.parametrize("name, place", pairs(ON_DEVICES))


def names(entries):
    return [entry.name for entry in entries]


def start(verbs):
    return verbs.init(network()), verbs.put(batches(1)[0])


@pytest.mark.parametrize(
    "name, place", pairs(["simulate", "simulate_map", *ON_DEVICES, "lanes_map"])
)
def test_a_local_step_is_silent(name, place):
    verbs = cluster(place, name)
    assert lsgd.ledger(verbs.step, *start(verbs)) == ()


@on_devices
def test_a_synchronisation_holds_its_collectives_and_no_others(name, place):
    verbs = cluster(place, name)
    state, _ = start(verbs)
    found = lsgd.ledger(verbs.sync, state)
    assert RULES[name].seen(names(found)) == RULES[name].kinds
    assert {entry.axes for entry in found} <= {("worker",)}
    if RULES[name].conditional:
        assert all(entry.conditional for entry in found)


@rules
def test_a_simulated_synchronisation_is_silent(name):
    verbs = cluster("simulate", name)
    assert lsgd.ledger(verbs.sync, start(verbs)[0]) == ()


@on_devices
def test_a_gated_step_communicates_inside_the_conditional_only(name, place):
    verbs = cluster(place, name)
    found = lsgd.ledger(lsgd.gated(verbs, lsgd.every(4)), *start(verbs))
    assert RULES[name].seen(names(found)) == RULES[name].kinds
    assert all(entry.conditional for entry in found)


@on_devices
def test_a_round_communicates_after_its_loop(name, place):
    verbs = cluster(place, name)
    state, _ = start(verbs)
    placed = verbs.put(stack(batches(4)), time=True)
    compiled = jax.jit(lsgd.fused(verbs)).lower(state, placed).compile()
    assert " while(" in compiled.as_text()
    found = lsgd.ledger(compiled)
    assert RULES[name].seen(names(found)) == RULES[name].kinds
    assert not any(entry.looped for entry in found)


def test_the_reader_sees_a_noisy_step():
    """A metric reduced at every step is found, so the silence above means something."""
    verbs = cluster("mesh", "average")

    def noisy(state, batch):
        state, metrics = verbs.step(state, batch)
        return state, jnp.mean(metrics["loss"])

    (found,) = lsgd.ledger(noisy, *start(verbs))
    assert found.name == "all-reduce" and not found.conditional


def test_the_reader_sees_an_average_of_many_leaves():
    """In a type of six parts and more the compiler writes /*index=5*/."""
    made = lsgd.local_sgd(
        lambda params, b: sum(map(jnp.sum, params)) * b,
        optax.sgd(1.0),
        rule=lsgd.average(),
    )
    verbs = lsgd.on_mesh(made, mesh(worker=8))
    (found,) = lsgd.ledger(verbs.sync, verbs.init([jnp.zeros(3)] * 9))
    assert (found.name, found.bytes) == ("all-reduce", 9 * 3 * 4)


@pytest.mark.parametrize("name", ["average", "chain", "anchored"])
def test_sent_bytes_are_those_of_the_compiled_program(name):
    verbs = cluster("mesh", name)
    state, _ = start(verbs)
    payload = sum(leaf.nbytes for leaf in jax.tree.leaves(network()))
    found = lsgd.ledger(verbs.sync, state)
    assert sum(entry.bytes for entry in found) == payload
    assert verbs.sent(state) == sent(found) == (2 * payload * 7 // 8,) * 2


def test_weights_add_one_number_to_what_is_sent():
    verbs = cluster("mesh", "average")
    state, _ = start(verbs)
    payload = sum(leaf.nbytes for leaf in jax.tree.leaves(network()))
    (found,) = lsgd.ledger(verbs.sync, state, np.ones(WORKERS, np.float32))
    assert (found.name, found.bytes) == ("all-reduce", payload + 4)


def test_sent_bytes_of_a_round_that_is_not_due_are_none():
    verbs = cluster("mesh", "when")
    state, _ = start(verbs)
    full = cluster("mesh", "average").sent(state)[0]
    assert verbs.sent(state) == (0, full)
    assert [verbs.sent(state, turn) for turn in (1, 2)] == [(0, 0), (full, full)]


def test_half_precision_is_summed_in_float32():
    verbs = lsgd.on_mesh(algorithm(lsgd.average()), mesh(worker=8))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), network())
    found = lsgd.ledger(verbs.sync, verbs.init(params))
    assert [entry.dtypes for entry in found] == [("f32",)]


@pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
def test_a_sharded_worker_sends_only_its_own_pieces(shape):
    """The average of 64 x 32 floats moves 1/m of them and gathers nothing."""
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
    verbs = lsgd.on_mesh(made, devices)
    state = verbs.init(params)
    moment = state.workers.opt_state[0].mu["w"]
    for leaf in (state.workers.params["w"], moment):
        assert leaf.sharding.shard_shape(leaf.shape) == (1, 64, 32 // shape[1])
    (found,) = lsgd.ledger(verbs.sync, state)
    assert (found.name, found.bytes) == ("all-reduce", 64 * 32 * 4 // shape[1])
    assert found.axes == ("worker",)

    batch = np.random.default_rng(0).normal(size=(shape[0], 5, 64)).astype(np.float32)
    plain = lsgd.simulate(made, shape[0])
    expected, _ = plain.step(plain.init(jax.tree.map(np.asarray, params)), batch)
    state, _ = verbs.step(state, batch)
    np.testing.assert_allclose(
        verbs.sync(state).workers.params["w"],
        plain.sync(expected).workers.params["w"],
        rtol=1e-5,
        atol=1e-6,
    )


def test_workers_are_not_summed_behind_your_back():
    """Parameters that entered shard_map replicated would get summed gradients."""
    made = lsgd.local_sgd(lambda w, b: w * b, optax.sgd(1.0), rule=lsgd.average())
    verbs = lsgd.on_mesh(made, mesh(worker=8))
    state, _ = verbs.step(verbs.init(np.float32(0)), np.arange(8, dtype=np.float32))
    np.testing.assert_array_equal(state.workers.params, -np.arange(8))


@pytest.mark.parametrize("place", ["simulate", "mesh", "lanes"])
def test_the_state_can_be_donated(place):
    """The anchor starts as the parameters: one buffer twice would crash here."""
    verbs = cluster(place, "anchored")
    expected, _ = run(verbs, batches(4), lsgd.every(2))
    step = jax.jit(lsgd.gated(verbs, lsgd.every(2)), donate_argnums=0)
    params = jax.tree.map(jnp.asarray, network())
    state = verbs.init(params)
    for batch in batches(4):
        state, _ = step(state, batch)
    np.testing.assert_allclose(
        state.workers.params["out"], expected.workers.params["out"], rtol=1e-6
    )
    np.testing.assert_array_equal(params["out"], network()["out"])


@pytest.mark.parametrize("place", ["simulate", "mesh", "lanes", "sharded"])
def test_the_loss_is_traced_once(place):
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return jnp.sum((params - batch) ** 2)

    made = lsgd.local_sgd(loss_fn, optax.adam(0.1), rule=lsgd.average())
    verbs = {
        "simulate": lambda: lsgd.simulate(made, 8),
        "mesh": lambda: lsgd.on_mesh(made, mesh(worker=8)),
        "lanes": lambda: lsgd.on_mesh(made, mesh(worker=4), workers=8),
        "sharded": lambda: lsgd.on_mesh(made, mesh(worker=4, model=2), workers=8),
    }[place]()
    step = jax.jit(lsgd.gated(verbs, lsgd.every(2)), donate_argnums=0)
    state = verbs.init(0.0)
    for t in range(5):
        state, _ = step(state, verbs.put(np.full(8, t, np.float32)))
    assert len(traces) == 1
    assert step._cache_size() == 1
