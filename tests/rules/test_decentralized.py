"""Gossip against mixing matrices, and shifts across lanes and devices."""

import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import mesh
from harness.rule_arrays import N, random_rounds, sync_arrays
from harness.selection import keep

import localsgd_jax as lsgd
from localsgd_jax.core import collectives
from localsgd_jax.rules.decentralized import TOPOLOGIES, neighbour_shifts


def mixing_matrix(topology, workers, round=1):
    """Returns the mixing matrix W of a round, (K, K).

    References:
      Ying et al., 2021, equation 5. arXiv:2110.13363
    """
    cycle = neighbour_shifts(topology, workers)
    shifts = (0, *cycle[(round - 1) % len(cycle)])
    rows = np.arange(workers)
    matrix = np.zeros((workers, workers))
    for shift in shifts:
        matrix[rows, (rows - shift) % workers] += 1 / len(shifts)
    return matrix


def test_mixing_matrix_of_two_peers():
    np.testing.assert_array_equal(mixing_matrix("one-peer", 2), [[0.5, 0.5]] * 2)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("workers", keep([1, 2, 3, 6, 8], [1, 2, 6, 8]))
def test_gossip_multiplies_by_a_doubly_stochastic_matrix(topology, workers):
    x = random_rounds(4, workers)
    on_four_devices = lambda made: lsgd.on_mesh(made, mesh(worker=4), workers=8)  # noqa: E731
    placement = on_four_devices if workers == 8 else None
    synced, _ = sync_arrays(lsgd.gossip(topology), x, placement=placement)
    for i in range(4):
        matrix = mixing_matrix(topology, workers, i + 1)
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(0), 1)
        np.testing.assert_allclose(matrix.sum(1), 1)
        np.testing.assert_allclose(synced[i], matrix @ x[i], atol=1e-6)


@pytest.mark.parametrize("lanes", keep([1, 2, 4, 8], [2]))
@pytest.mark.parametrize("offset", keep(range(-1, 9), [-1, 0, 1, 3, 8]))
def test_shift_crosses_lanes_and_devices(lanes, offset):
    def apply(tree, state, context):
        return collectives.shift(tree, offset, context), state

    rule = lsgd.SyncRule(lambda tree, specs: lsgd.RuleState(), apply)
    x = random_rounds(1, 8)
    placement = lambda made: lsgd.on_mesh(made, mesh(worker=8 // lanes), 8)  # noqa: E731
    synced, _ = sync_arrays(rule, x, placement=placement)
    np.testing.assert_array_equal(synced[0], np.roll(x[0], offset, axis=0).astype("f4"))


@pytest.mark.parametrize("workers", [2, 4])
def test_one_peer_gives_the_mean_after_a_cycle(workers):
    made = lsgd.from_train_step(
        lambda s, b: ({"params": b}, {}), lsgd.gossip("one-peer")
    )
    cluster = lsgd.simulate(made, workers)
    x = jnp.arange(workers, dtype=jnp.float32)
    state, _ = cluster.step(cluster.init({"params": 0.0}), x)
    for _ in range(workers // 2):
        state = cluster.sync(state)
    np.testing.assert_allclose(state.workers["params"], np.full(workers, x.mean()))


def test_one_peer_reaches_consensus_and_ring_converges_at_the_spectral_gap():
    x = random_rounds(1, 8)[0]

    def consensus_distance(topology, rounds):
        made = lsgd.from_train_step(lambda s, b: (s, {}), lsgd.gossip(topology))
        cluster = lsgd.simulate(made, 8)
        state = cluster.init({"params": jnp.zeros(N)})
        state = state._replace(workers={"params": jnp.asarray(x, jnp.float32)})
        for _ in range(rounds):
            state = cluster.sync(state)
        params = np.asarray(state.workers["params"])
        np.testing.assert_allclose(params.mean(0), x.mean(0), atol=1e-6)
        return np.sqrt(((params - params.mean(0)) ** 2).sum())

    initial = np.sqrt(((x - x.mean(0)) ** 2).sum())
    assert consensus_distance("one-peer", 3) < 1e-5 * initial
    second_eigenvalue = np.sort(np.abs(np.linalg.eigvals(mixing_matrix("ring", 8))))[-2]
    for rounds in (1, 10):
        bound = second_eigenvalue**rounds * initial * 1.001
        assert consensus_distance("ring", rounds) <= bound


def test_gossip_skips_zero_weight_workers():
    x = random_rounds(1, 4)
    x[0, 2] = np.nan
    synced, _ = sync_arrays(lsgd.gossip("ring"), x, [np.array([1, 1, 0, 1])])
    x = x[0]
    np.testing.assert_allclose(synced[0][0], (x[0] + x[1] + x[3]) / 3, atol=1e-6)
    np.testing.assert_allclose(synced[0][1], (2 * x[1] + x[0]) / 3, atol=1e-6)
    assert np.isnan(synced[0][2]).all()


def test_unknown_topology_raises():
    message = r"gossip\(topology\): topology must be .ring. or .* got 'star'"
    with pytest.raises(ValueError, match=message):
        lsgd.gossip("star")
