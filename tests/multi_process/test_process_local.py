"""Process-local execution: equality with one-device simulation, zero-copy views."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.process_jobs import run
from harness.selection import in_full
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs.process_local_worker import (
    RULES,
    RUNS,
    WORKERS,
    algorithm,
    initial_params,
    keyed_algorithm,
    round_batches,
)

import localsgd_jax as lsgd
from localsgd_jax.execution.process_local import merge_late_sync, on_processes
from localsgd_jax.execution.process_programs import SubCluster


@pytest.mark.full
def test_process_0_of_recoverable_job_exits_last():
    assert [row["process"] for row in run("shutdown_worker.py", 3)] == [0, 1, 2]


def simulate_run(rule, kind):
    """Runs the rounds of the worker program on one device."""
    if kind == "overlapped":
        rules = rule if isinstance(rule, dict) else {"params": rule}
        rule = {name: lsgd.overlap(part) for name, part in rules.items()}
    cluster = lsgd.simulate(algorithm(rule), WORKERS)
    state = cluster.init(initial_params())
    if kind == "overlapped":
        # The first round of `overlap` synchronises the initial parameters, which
        # changes only the round number.
        state = state._replace(round=state.round - 1)
    for stacked in round_batches()[: 1 if kind == "weighted" else None]:
        for batch in stacked:
            state, _ = cluster.step(state, batch)
        weight = np.repeat([1.0, 2.0], WORKERS // 2) if kind == "weighted" else None
        state = cluster.sync(state, weight)
    return state


@pytest.fixture(scope="module")
def results():
    """The results of two processes."""
    return run("process_local_worker.py", 2)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("rule", RULES)
def test_process_local_matches_simulate(results, rule, kind):
    expected = simulate_run(RULES[rule](), kind).workers.params
    for name in expected:
        rows = np.concatenate([row[f"{rule} {kind}"][name] for row in results])
        np.testing.assert_allclose(rows, expected[name], rtol=1e-5, atol=1e-6)


def test_local_workers(results):
    half = WORKERS // 2
    local = [row["local_workers"] for row in results]
    assert local == [list(range(half)), list(range(half, WORKERS))]


@pytest.mark.parametrize("rule", RULES)
def test_mean_matches_consensus_in_every_process(results, rule):
    expected = lsgd.consensus(simulate_run(RULES[rule](), "weighted"))
    for row in results:
        for name, value in expected.items():
            np.testing.assert_allclose(
                row[f"{rule} mean"][name], value, rtol=1e-5, atol=1e-6
            )


def test_initial_keys_match_simulate(results):
    params = {"params": jnp.zeros(()), "key": jax.random.key(3)}
    state = lsgd.simulate(keyed_algorithm(), WORKERS).init(params)
    rows = np.concatenate([row["keys"] for row in results])
    assert rows.tolist() == jax.random.key_data(state.workers["key"]).tolist()


def mesh(devices):
    return jax.make_mesh((devices,), ("worker",), devices=jax.devices()[:devices])


def test_sharded_workers_match_on_mesh():
    mesh = lsgd.worker_mesh(inner_axes={"model": 2})
    columns = NamedSharding(mesh, P(None, "model"))
    params = {"w": jax.device_put(jnp.ones((4, 6)), columns), "b": jnp.zeros(())}
    made = lsgd.local_sgd(
        lambda p, b: jnp.mean((b @ p["w"] - p["b"]) ** 2),
        optax.adam(0.1),
        rule=lsgd.diloco(),
    )
    batches = np.random.default_rng(0).normal(size=(3, 4, 2, 4)).astype(np.float32)
    local, cluster = on_processes(made, mesh), lsgd.on_mesh(made, mesh)
    state, _ = local.local_steps(local.init(params), batches)
    state, _ = local.sync(state)
    expected, _ = jax.lax.scan(cluster.step, cluster.init(params), batches)
    expected = cluster.sync(expected)
    for x, y in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    split = P("worker", None, "model")
    assert state.workers.params["w"].sharding.spec == split
    assert local.mean(state.workers.params)["w"].sharding.spec == P(None, "model")
    single = local.mean_cluster.init(jax.device_get(params))
    replicated = local.replicate(single, state)
    assert replicated.workers.params["w"].sharding.spec == split


def test_global_view_does_not_copy():
    cluster = lsgd.on_mesh(algorithm(lsgd.average()), mesh(4), 8)
    state = cluster.init(initial_params())
    view = SubCluster(mesh(4), cluster, ("worker",)).view(state)
    for x, y in zip(*map(jax.tree.leaves, (state, view)), strict=True):
        assert x is not y
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert a.data.unsafe_buffer_pointer() == b.data.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    "options, message",
    [
        in_full(
            {"weighted": True},
            r"sync\(weighted\): the first entry .* weight.*, got \[\]",
        ),
        (
            {"weighted": True, "report": [-1.0]},
            r"sync\(weighted\): .* not negative, got \[-1",
        ),
        in_full(
            {"weighted": True, "report": [np.nan]},
            r"sync\(weighted\): .* finite .*, got \[nan",
        ),
        (
            {"devices": []},
            r"sync\(devices\): the devices of this process must .*, got .*\[\]",
        ),
    ],
)
def test_invalid_sync_arguments_raise(options, message):
    cluster = on_processes(algorithm(lsgd.average()), mesh(2), 4)
    state = cluster.init(initial_params())
    with pytest.raises(ValueError, match=message):
        cluster.sync(state, **options)
    with pytest.raises(ValueError, match=r"mean\(devices\): the devices of this proc"):
        cluster.mean(state.workers.params, jax.devices()[:1])


def sub_cluster_of(processes, axes=("worker",)):
    """A sub-cluster with devices of the given processes."""
    devices = np.vectorize(lambda p: types.SimpleNamespace(process_index=p))(processes)
    mesh = types.SimpleNamespace(axis_names=("worker", "model"), devices=devices)
    return SubCluster(mesh, None, axes)


def test_positions_of_a_process_must_be_contiguous():
    cluster = sub_cluster_of([[1], [1], [0], [2]])
    assert cluster.process_of_position.tolist() == [1, 1, 0, 2]
    assert cluster.first_positions.tolist() == [0, 2, 3]
    message = r"must be contiguous along .*'worker', got .* \[0, 1, 0, 1\]"
    with pytest.raises(ValueError, match=message):
        _ = sub_cluster_of([[0], [1], [0], [1]]).process_of_position


def test_positions_must_not_be_shared():
    cluster = sub_cluster_of([[0, 0], [1, 1]])
    assert cluster.process_of_position.tolist() == [0, 1]
    message = r"must belong to one process, got .* \[\[0, 1\], \[0, 1\]\]"
    with pytest.raises(ValueError, match=message):
        _ = sub_cluster_of([[0, 1], [0, 1]]).process_of_position


def test_merge_late_sync_keeps_unsynchronised_fields():
    """Values are kept bitwise: (a − s) + s is not computed for them."""
    current = lsgd.simulate(algorithm(lsgd.average()), 2).init(initial_params())
    # Far enough away that (current − state) + state differs from current in float32.
    state = jax.tree.map(lambda x: x + jnp.asarray(1e4 / 3, x.dtype), current)
    merged = merge_late_sync(state, current, state)
    for x, y in zip(
        *map(jax.tree.leaves, (merged.workers, current.workers)), strict=True
    ):
        assert (x == y).all()


def test_initial_state_matches_on_mesh():
    made = lsgd.from_train_step(lambda s, b: (s, {}), rule=lsgd.diloco())
    params = {"params": jnp.arange(3.0), "key": jax.random.key(3)}
    local = on_processes(made, mesh(4), 8).init(params)
    expected = lsgd.on_mesh(made, mesh(4), 8).init(params)
    assert jax.tree.structure(local) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (local, expected)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert (x == y).all()
