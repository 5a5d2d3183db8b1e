"""What the history says of bytes, against the ledger of the programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localsgd_jax as lsgd
from localsgd_jax.ledger import sent

PLACES = 4
RULES = {
    "average": lsgd.average(),
    "delayed": lsgd.delay(lsgd.average()),
    "in pieces": lsgd.fragment(lsgd.average(), 2),
    "in short floats": lsgd.cast(lsgd.average(), jnp.bfloat16),
}


def loss_fn(params, batch):
    return (params["w"] @ params["v"] * batch).mean()


def trained(rule, workers, every, mesh=None, steps=9, **settings):
    mesh = mesh or jax.make_mesh((PLACES,), ("worker",), devices=jax.devices()[:PLACES])
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(1e-3), rule=rule)
    cluster = lsgd.on_mesh(algorithm, mesh, workers)
    params = {"w": jnp.ones((64, 32)), "v": jnp.ones(32)}
    batches = [np.ones((workers, 64), np.float32)] * steps
    return cluster, *lsgd.train(
        cluster, cluster.init(params), batches, every=every, progress=False, **settings
    )


def each_round(history):
    return np.diff(history["device_bytes"], prepend=0).tolist()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("workers", [PLACES, 2 * PLACES])
@pytest.mark.parametrize("every", [2, lsgd.at([2, 3, 7])], ids=["fused", "gated"])
def test_every_round_sends_what_the_programs_say(rule, workers, every):
    cluster, state, history = trained(rule, workers, every, chunk=4)
    entries = lsgd.ledger(cluster.sync, state)
    least, most = sent(entries, "worker")
    found = each_round(history)
    assert sum(found) and all(least - 1 <= x <= most + 1 for x in found)
    if least == most:
        assert set(found) == {round(most)}
    else:  # Rounds differ: a worker with its own device knows which is which.
        alone = trained(rule, PLACES, every, chunk=4)[-1]
        assert found == np.diff(alone["bytes"], prepend=0).tolist()
        assert len(set(found)) == 2


def test_workers_that_share_a_device_send_less_together():
    _, _, history = trained(lsgd.average(), 2 * PLACES, 3)
    numbers = 64 * 32 + 32
    assert each_round(history) == [2 * 3 * 4 * numbers // 4] * 3
    assert np.diff(history["bytes"]).tolist() == [2 * 7 * 4 * numbers // 8] * 2


def test_what_moves_within_a_worker_does_not_count():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("worker", "model"))
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(1e-3), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params = {"w": jax.device_put(jnp.ones((64, 32)), split), "v": jnp.ones(32)}
    batches = [np.ones((2, 64), np.float32)] * 4
    state, history = lsgd.train(
        cluster, cluster.init(params), batches, every=2, progress=False
    )
    inside = lsgd.ledger(cluster.step, state, cluster.put(batches[0]))
    assert {entry.axes for entry in inside} == {("model",)}
    found = sent(lsgd.ledger(cluster.sync, state), "worker")
    assert each_round(history) == [round(found[1])] * 2


def test_on_one_device_nothing_is_sent():
    one = jax.make_mesh((1,), ("worker",), devices=jax.devices()[:1])
    _, _, history = trained(lsgd.average(), 4, 3, mesh=one)
    assert "device_bytes" not in history and history["bytes"][-1] > 0


def test_nothing_is_compiled_twice_for_it():
    compiled = []

    def heard(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        trained(lsgd.average(), PLACES, 2)  # The first use of the parts of `init`.
        compiled.clear()
        cluster, state, _ = trained(lsgd.average(), PLACES, 2)
        with_init = len(compiled)
        compiled.clear()
        cluster.init(lsgd.consensus(state))
        assert with_init - len(compiled) <= 3  # A round, a step alone, a last sync.
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
