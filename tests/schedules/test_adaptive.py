"""Adaptive schedules: periods that depend on the training history."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import drifting_cluster

import localsgd_jax as lsgd


def test_adacomm_matches_hand_computation():
    schedule, step, periods = lsgd.adacomm(16), 0, []
    for loss in (4.0, 3.0, 1.0, 1.0, 0.9, 0.25, 5.0):
        step += schedule.period
        schedule.update({"step": step, "loss": loss}, step)
        periods.append(schedule.period)
    # √(F/F₀) · 16, at most the previous period; halved if the loss has not fallen.
    assert periods == [16, 14, 8, 4, 4, 4, 2]
    bounded = lsgd.adacomm(8, min_period=3)
    for step, loss in enumerate((1.0, 1e-9, 0.0), 1):
        bounded.update({"step": 8 * step, "loss": loss}, 8 * step)
    assert bounded.period == 3


def test_update_applies_after_dispatched_steps():
    schedule = lsgd.drift_triggered(4, threshold=1.0, max_period=32)
    assert [t for t in range(1, 13) if schedule(t)] == [4, 8, 12]
    schedule.update({"step": 4, "consensus_distance": 0.1}, step=6)
    assert [t for t in range(1, 30) if schedule(t)] == [4, 12, 20, 28]
    schedule.update({"step": 12, "consensus_distance": 9.0}, step=20)
    assert [t for t in range(1, 30) if schedule(t)] == [4, 12, 20, 24, 28]
    schedule.update({"step": 20, "consensus_distance": 0.7}, step=20)
    assert [t for t in range(1, 30) if schedule(t)] == [4, 12, 20, 28]


def test_drift_triggered_halves_downwards_and_is_bounded():
    schedule = lsgd.drift_triggered(3, threshold=1.0, max_period=5)
    schedule.update({"step": 3, "consensus_distance": 2.0}, step=3)
    assert schedule.period == 1
    schedule.update({"step": 4, "consensus_distance": 2.0}, step=4)
    assert schedule.period == 1
    steps = [schedule.period]
    for step in (5, 7, 11):
        schedule.update({"step": step, "consensus_distance": 0.1}, step=step)
        steps.append(schedule.period)
    assert steps == [1, 2, 4, 5]


def test_period_shrinks_when_drift_exceeds_threshold():
    cluster, state, batches = drifting_cluster(lsgd.with_diagnostics(lsgd.average()))
    schedule = lsgd.drift_triggered(8, threshold=2.0, max_period=16)
    _, history = lsgd.train(
        cluster,
        state,
        batches,
        schedule=schedule,
        progress=False,
        max_steps_per_dispatch=8,
    )
    lengths = np.diff([0, *history["step"]])
    # After H steps the distance is √¾ H: above 2 for H of 4 and 8, below 1 for H of 1.
    assert lengths[0] == 8 and set(lengths[-6:-1]) == {2}
    np.testing.assert_allclose(history["consensus_distance"], lengths * 0.75**0.5, 1e-5)


def test_adacomm_in_a_run():
    algorithm = lsgd.local_sgd(
        lambda x, b: jnp.sum((x - b) ** 2), optax.sgd(0.05), rule=lsgd.average()
    )
    cluster = lsgd.simulate(algorithm, 4)
    batches = [np.ones((4, 3), np.float32)] * 120
    _, history = lsgd.train(
        cluster,
        cluster.init(jnp.zeros(3)),
        batches,
        schedule=lsgd.adacomm(8),
        progress=False,
        max_steps_per_dispatch=8,
    )
    lengths = np.diff([0, *history["step"]])
    assert lengths[0] == 8 and lengths[-2] == 1
    assert (np.diff(lengths[:-1]) <= 0).all()
    assert history["bytes"][-1] == len(lengths) * 2 * 3 * 12 // 4


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: lsgd.adacomm(0), ValueError, r"adacomm\(h\): h must be at least 1"),
        (
            lambda: lsgd.adacomm(4, factor=0),
            ValueError,
            r"adacomm\(factor\): factor must be in \(0, 1\], got 0",
        ),
        (
            lambda: lsgd.drift_triggered(4, 0.0, 8),
            ValueError,
            r"drift_triggered\(threshold\): threshold must be positive, got 0.0",
        ),
        (
            lambda: lsgd.drift_triggered(4, 1.0, 2),
            ValueError,
            r"drift_triggered\(max_period\): max_period must be at least 4, got 2",
        ),
        (
            lambda: lsgd.drift_triggered(4, 1.0, 8).update({"step": 4, "loss": 1.0}, 4),
            ValueError,
            r"drift_triggered\(\): the history must have the column "
            r"'consensus_distance', got \['loss', 'step'\]",
        ),
        (
            lambda: jax.jit(lsgd.adacomm(4))(jnp.int32(3)),
            TypeError,
            r"adacomm\(4\): an adaptive schedule cannot be traced; pass it to "
            r"train\(schedule=...\), got",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_step_0_is_not_due():
    assert not lsgd.adacomm(4)(0) and not lsgd.drift_triggered(4, 1.0, 8)(0)
