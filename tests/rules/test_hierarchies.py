"""Rules on two worker axes: averages within pods, and rules across pods."""

import numpy as np
import optax
import pytest
from harness.cases import (
    PLACEMENTS,
    algorithm,
    assert_close,
    batches,
    mesh,
    network,
    random_weights,
    run_manually,
)
from harness.selection import in_full, keep

import localsgd_jax as lsgd

HIERARCHIES = {
    "simulate": lambda made: lsgd.simulate(made, (2, 4), axis=("pod", "worker")),
    "mesh": lambda made: lsgd.on_mesh(
        made, mesh(pod=2, worker=4), axis=("pod", "worker")
    ),
    "lanes": lambda made: lsgd.on_mesh(
        made, mesh(pod=2, worker=2), workers=8, axis=("pod", "worker")
    ),
    "sharded": lambda made: lsgd.on_mesh(
        made, mesh(pod=2, worker=2, model=2), workers=8, axis=("pod", "worker")
    ),
}


@pytest.mark.parametrize("placement", keep(HIERARCHIES, ["lanes"]))
def test_average_within_pods_and_in_some_rounds_across_pods(placement):
    rule = lsgd.chain(
        lsgd.average("worker"), lsgd.when(lsgd.every(2), lsgd.average("pod"))
    )
    cluster = HIERARCHIES[placement](algorithm(rule))
    state, _ = run_manually(cluster, batches(2), lsgd.never())
    before = np.asarray(state.workers.params["out"])
    pods = before.reshape(2, 4, -1).mean(1)
    within = cluster.sync(state)
    np.testing.assert_allclose(
        within.workers.params["out"], np.repeat(pods, 4, axis=0), rtol=1e-6
    )
    across = cluster.sync(within).workers.params["out"]
    np.testing.assert_allclose(
        across, np.broadcast_to(before.mean(0), before.shape), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("placement", keep(HIERARCHIES, ["lanes"]))
def test_average_over_both_axes_matches_average_over_all_workers(placement):
    made = algorithm(lsgd.average(("pod", "worker")))
    expected, _ = run_manually(
        PLACEMENTS["simulate"](algorithm(lsgd.average())), batches(6), lsgd.every(3)
    )
    state, _ = run_manually(HIERARCHIES[placement](made), batches(6), lsgd.every(3))
    assert_close(state, expected)


@pytest.mark.parametrize("placement", keep(HIERARCHIES, ["lanes"]))
@pytest.mark.parametrize("inactive", [[2], [0, 1, 2, 3]], ids=["worker", "pod"])
def test_group_weights_are_summed(placement, inactive):
    weight = random_weights()
    weight[inactive] = 0
    levels = lsgd.chain(lsgd.average("worker"), lsgd.average("pod"))
    flat = PLACEMENTS["simulate"](algorithm(lsgd.average()))
    expected, _ = run_manually(flat, batches(6), lsgd.every(3), weight)
    state, _ = run_manually(
        HIERARCHIES[placement](algorithm(levels)), batches(6), lsgd.every(3), weight
    )
    assert_close(state.workers, expected.workers)


ACROSS_PODS = {
    "outer": lambda: lsgd.outer(optax.sgd(0.7, momentum=0.9), "pod"),
    "quantize": lambda: lsgd.outer(
        optax.sgd(0.7), lsgd.quantize(lsgd.average("pod"), 8, block=8)
    ),
    "fragment": lambda: lsgd.fragment(lsgd.outer(optax.sgd(0.7), "pod"), 2),
    "overlap": lambda: lsgd.overlap(lsgd.average("pod")),
    "interpolate": lambda: lsgd.interpolate(lsgd.diloco(), 0.5),
}


@pytest.mark.full
@pytest.mark.parametrize("placement", [in_full("mesh"), "lanes", in_full("sharded")])
@pytest.mark.parametrize("name", keep(ACROSS_PODS, ["quantize"]))
@pytest.mark.parametrize(
    "weight",
    [in_full(None, id="equal"), pytest.param(random_weights(), id="weighted")],
)
def test_rules_across_pods_match_simulate(name, placement, weight):
    """After a synchronous phase, pods are synchronised in every second round."""
    across = lsgd.when(lsgd.post_local(2, 2), ACROSS_PODS[name]())
    made = algorithm(lsgd.chain(lsgd.average("worker"), across))
    simulated = HIERARCHIES["simulate"](made)
    expected, _ = run_manually(simulated, batches(8), lsgd.post_local(2, 2), weight)
    state, _ = run_manually(
        HIERARCHIES[placement](made), batches(8), lsgd.post_local(2, 2), weight
    )
    assert_close(state, expected, rtol=1e-4, atol=1e-5)
    out = np.asarray(state.workers.params["out"]).reshape(2, 4, -1)
    if name != "overlap":  # Local progress since the snapshot differs between workers.
        np.testing.assert_allclose(out, np.repeat(out[:, :1], 4, axis=1), rtol=1e-6)


def test_outer_optimizer_across_pods_matches_hand_computation():
    rule = lsgd.chain(
        lsgd.average("worker"),
        lsgd.when(lsgd.every(2), lsgd.outer(optax.sgd(0.5), "pod")),
    )
    cluster = HIERARCHIES["simulate"](algorithm(rule))
    state, _ = run_manually(cluster, batches(2), lsgd.never())
    before = np.asarray(state.workers.params["out"], np.float64)
    anchor = network()["out"].astype(np.float64)
    once = cluster.sync(state)
    twice = cluster.sync(once).workers.params["out"]
    expected = anchor - 0.5 * (anchor - before.mean(0))
    np.testing.assert_allclose(twice, np.tile(expected, (8, 1)), rtol=1e-5)
