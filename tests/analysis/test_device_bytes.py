"""Bytes in the history against the collectives of the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.analysis import total_bytes_sent

POSITIONS = 4
RULES = {
    "average": lsgd.average(),
    "delay": lsgd.delay(lsgd.average()),
    "fragment": lsgd.fragment(lsgd.average(), 2),
    "cast": lsgd.cast(lsgd.average(), jnp.bfloat16),
}
SCHEDULES = {"fused": 2, "gated": lsgd.at_steps([2, 3, 7])}
FAST = {
    ("fused", 8, "average"),
    ("fused", 8, "delay"),
    ("gated", 8, "average"),
    ("gated", 4, "fragment"),
}
CASES = [
    case if case in FAST else in_full(*case)
    for case in [(s, k, r) for s in SCHEDULES for k in (4, 8) for r in RULES]
]


def loss_fn(params, batch):
    return (params["w"] @ params["v"] * batch).mean()


def train(rule, workers, schedule, mesh=None, steps=9, **options):
    """Returns the cluster, the final state and the history of a run."""
    devices = jax.devices()[:POSITIONS]
    mesh = mesh or jax.make_mesh((POSITIONS,), ("worker",), devices=devices)
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(1e-3), rule=rule)
    cluster = lsgd.on_mesh(algorithm, mesh, workers)
    params = {"w": jnp.ones((64, 32)), "v": jnp.ones(32)}
    batches = [np.ones((workers, 64), np.float32)] * steps
    return cluster, *lsgd.train(
        cluster,
        cluster.init(params),
        batches,
        schedule=schedule,
        progress=False,
        **options,
    )


def bytes_per_round(history):
    return np.diff(history["device_bytes"], prepend=0).tolist()


@pytest.mark.parametrize("schedule, workers, rule", CASES)
def test_history_matches_compiled_programs(schedule, workers, rule):
    rule, schedule = RULES[rule], SCHEDULES[schedule]
    cluster, state, history = train(rule, workers, schedule, max_steps_per_dispatch=4)
    ops = lsgd.collective_ops(cluster.sync, state)
    low, high = total_bytes_sent(ops, "worker")
    found = bytes_per_round(history)
    assert sum(found) and all(low - 1 <= x <= high + 1 for x in found)
    if low == high:
        assert set(found) == {round(high)}
    else:
        # Rounds differ. Where each worker has a device, "bytes" has each of them.
        history = train(rule, POSITIONS, schedule, max_steps_per_dispatch=4)[-1]
        assert found == np.diff(history["bytes"], prepend=0).tolist()
        assert len(set(found)) == 2


def test_workers_on_one_device_share_an_all_reduce():
    _, _, history = train(lsgd.average(), 2 * POSITIONS, 3)
    size = 64 * 32 + 32
    assert bytes_per_round(history) == [2 * 3 * 4 * size // 4] * 3
    assert np.diff(history["bytes"]).tolist() == [2 * 7 * 4 * size // 8] * 2


def test_collectives_within_a_worker_are_not_counted():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("worker", "model"))
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(1e-3), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params = {"w": jax.device_put(jnp.ones((64, 32)), split), "v": jnp.ones(32)}
    batches = [np.ones((2, 64), np.float32)] * 4
    state, history = lsgd.train(
        cluster, cluster.init(params), batches, schedule=2, progress=False
    )
    within = lsgd.collective_ops(cluster.step, state, cluster.shard_batch(batches[0]))
    assert {op.axes for op in within} == {("model",)}
    _, high = total_bytes_sent(lsgd.collective_ops(cluster.sync, state), "worker")
    # Of the replicated vector, the devices of a worker may send a half each.
    assert set(bytes_per_round(history)) <= {round(high), round(high) - 32 * 4 // 2}


def test_single_device_has_no_column():
    mesh = jax.make_mesh((1,), ("worker",), devices=jax.devices()[:1])
    _, _, history = train(lsgd.average(), 4, 3, mesh=mesh)
    assert "device_bytes" not in history and history["bytes"][-1] > 0


def test_no_extra_compilation():
    compiled = []

    def count(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        # The first run also compiles the parts of `init`.
        train(lsgd.average(), POSITIONS, 2)
        compiled.clear()
        cluster, state, _ = train(lsgd.average(), POSITIONS, 2)
        with_init = len(compiled)
        compiled.clear()
        cluster.init(lsgd.consensus(state))
        # Fused rounds, a gated step and the final synchronisation.
        assert with_init - len(compiled) <= 3
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
