"""What is measured where workers meet, and periods that follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import mesh
from test_rules import WEIGHTS, K, agree, setter, shares, values, weighted

import localsgd_jax as lsgd
from localsgd_jax.journal import notes

# Diagnostics.


def reference(anchor, x, w, momentum):
    """The columns in float64."""
    p, delta = w / w.sum(), anchor - x
    mean = weighted(delta, w)
    alive = np.flatnonzero(w)
    cosines = [
        delta[j] @ delta[k] / np.linalg.norm(delta[j]) / np.linalg.norm(delta[k])
        for j in alive
        for k in alive
        if j != k
    ]
    found = {
        "consensus_distance": np.sqrt(p @ ((x - weighted(x, w)) ** 2).sum(1)),
        "delta_norm": np.linalg.norm(mean),
        "delta_norm.tree": np.linalg.norm(mean),
        "cosine": np.mean(cosines),
        "participants": w.sum() ** 2 / (w**2).sum(),
    }
    if momentum is not None:
        size = np.linalg.norm(momentum) * np.linalg.norm(mean)
        found["momentum_cosine"] = mean @ momentum / size if size else 0.0
    return found


@pytest.mark.parametrize("given", [None, WEIGHTS], ids=["equal", "given"])
@pytest.mark.parametrize("place", ["simulate", "lanes"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_workers_are_measured(given, place, momentum):
    rule = lsgd.measured(lsgd.outer(optax.sgd(0.5, momentum)))
    places = {"lanes": lambda made: lsgd.on_mesh(made, mesh(worker=2), K)}
    anchor, trace = np.zeros(37), None if momentum is None else np.zeros(37)
    x = values()
    for rounds in range(1, len(x) + 1):
        seen, state = agree(rule, x[:rounds], given, place=places.get(place))
    for i in range(len(x)):
        w = shares(given, i)
        expected = reference(anchor, x[i], w, trace)
        delta = anchor - weighted(x[i], w)
        step = delta if trace is None else delta + momentum * trace
        trace = None if trace is None else step
        anchor = anchor - 0.5 * step
    found = notes(state)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, 1e-4, 1e-5, err_msg=name)
    np.testing.assert_allclose(seen[-1][0], anchor, atol=1e-5)


def test_a_norm_for_each_entry_of_the_tree():
    tree = {"a": jnp.zeros(2), "b": [jnp.zeros(1), jnp.zeros(3)]}
    cluster = lsgd.simulate(setter(lsgd.measured(lsgd.average())), 2)
    x = {"a": np.full((2, 2), 3.0), "b": [np.full((2, 1), 4.0), np.zeros((2, 3))]}
    state, _ = cluster.step(cluster.init({"params": tree}), jax.tree.map(np.float32, x))
    found = notes(cluster.sync(state))
    assert float(found["delta_norm.b"]) == 4
    np.testing.assert_allclose(found["delta_norm.a"], np.sqrt(18), rtol=1e-6)
    np.testing.assert_allclose(found["delta_norm"], np.sqrt(34), rtol=1e-6)
    assert float(found["consensus_distance"]) == 0
    np.testing.assert_allclose(found["cosine"], 1, rtol=1e-6)


def test_who_is_absent_may_be_no_number():
    x = values(1)
    x[0, 2] = np.nan
    _, state = agree(lsgd.measured(lsgd.average()), x, [np.array([1.0, 1, 0, 1])])
    assert all(np.isfinite(number) for number in notes(state).values())
    _, state = agree(lsgd.measured(lsgd.average()), x, [np.zeros(K)])
    assert all(number == 0 for number in notes(state).values())


def drifting(rule, workers=4):
    """Workers that walk 1 away from where they were at every step, in their ways."""
    made = lsgd.local_sgd(lambda x, b: jnp.vdot(x, b), optax.sgd(1.0), rule=rule)
    cluster = lsgd.simulate(made, workers)
    return (
        cluster,
        cluster.init(jnp.zeros(workers)),
        [-np.eye(workers, dtype="f4")] * 60,
    )


@pytest.mark.parametrize("every", [lsgd.every(3), lsgd.at([2, 5, 9])])
def test_the_history_has_the_notes_of_each_round(every):
    cluster, state, batches = drifting(lsgd.measured(lsgd.average()))
    state, history = lsgd.train(
        cluster, state, batches, every=every, steps=12, progress=False
    )
    lengths = np.diff([0, *history["step"]])
    expected = lengths * np.sqrt(3 / 4)  # From the mean of four orthogonal moves.
    np.testing.assert_allclose(history["consensus_distance"], expected, rtol=1e-5)
    np.testing.assert_allclose(history["participants"], 4)
    np.testing.assert_allclose(history["cosine"], 0, atol=1e-6)


def test_the_history_counts_who_was_left_out():
    rule = lsgd.guard(lsgd.average())
    made = lsgd.from_train_step(lambda s, b: ({"params": b}, {}), rule)
    cluster = lsgd.simulate(made, 3)
    good = np.arange(6, dtype=np.float32).reshape(3, 2)
    bad = np.where([[0], [1], [0]], np.nan, good).astype(np.float32)
    _, history = lsgd.train(
        cluster,
        cluster.init({"params": jnp.zeros(2)}),
        [good, bad, good, bad],
        every=1,
        progress=False,
    )
    np.testing.assert_array_equal(history["left_out"], [0, 1, 1, 2])


# Adaptive periods.


def test_adacomm_by_hand():
    schedule, step, periods = lsgd.adacomm(16), 0, []
    for loss in (4.0, 3.0, 1.0, 1.0, 0.9, 0.25, 5.0):
        step += schedule.period
        schedule.learn({"step": step, "loss": loss}, step)
        periods.append(schedule.period)
    # √(F/F₀) · 16, at most as before; halved where the loss has not fallen.
    assert periods == [16, 14, 8, 4, 4, 4, 2]
    least = lsgd.adacomm(8, least=3)
    for step, loss in enumerate((1.0, 1e-9, 0.0), 1):
        least.learn({"step": 8 * step, "loss": loss}, 8 * step)
    assert least.period == 3


def test_a_decision_holds_for_steps_that_are_not_on_their_way():
    schedule = lsgd.triggered(4, threshold=1.0, longest=32)
    assert [t for t in range(1, 13) if schedule(t)] == [4, 8, 12]
    schedule.learn({"step": 4, "consensus_distance": 0.1}, step=6)
    assert [t for t in range(1, 30) if schedule(t)] == [4, 12, 20, 28]
    schedule.learn({"step": 12, "consensus_distance": 9.0}, step=20)
    assert [t for t in range(1, 30) if schedule(t)] == [4, 12, 20, 24, 28]
    schedule.learn({"step": 20, "consensus_distance": 0.7}, step=20)
    assert [t for t in range(1, 30) if schedule(t)] == [4, 12, 20, 28]


def test_workers_that_drift_apart_meet_more_often():
    cluster, state, batches = drifting(lsgd.measured(lsgd.average()))
    far = lsgd.triggered(8, threshold=2.0, longest=16)
    _, history = lsgd.train(cluster, state, batches, every=far, progress=False, chunk=8)
    lengths = np.diff([0, *history["step"]])
    # A round of H moves √¾ H apart: above 2 for 4 and 8, below 1 for 1, kept at 2.
    assert lengths[0] == 8 and set(lengths[-6:-1]) == {2}
    np.testing.assert_allclose(history["consensus_distance"], lengths * 0.75**0.5, 1e-5)


def test_adacomm_in_a_run():
    made = lsgd.local_sgd(
        lambda x, b: jnp.sum((x - b) ** 2), optax.sgd(0.05), rule=lsgd.average()
    )
    cluster = lsgd.simulate(made, 4)
    batches = [np.ones((4, 3), np.float32)] * 120
    _, history = lsgd.train(
        cluster,
        cluster.init(jnp.zeros(3)),
        batches,
        every=lsgd.adacomm(8),
        progress=False,
        chunk=8,
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
            r"adacomm\(factor\): it must be in \(0, 1\], got 0",
        ),
        (
            lambda: lsgd.triggered(4, 0.0, 8),
            ValueError,
            r"triggered\(threshold\): it must be positive, got 0.0",
        ),
        (
            lambda: lsgd.triggered(4, 1.0, 2),
            ValueError,
            r"triggered\(longest\): longest must be at least 4, got 2",
        ),
        (
            lambda: lsgd.triggered(4, 1.0, 8).learn({"step": 4, "loss": 1.0}, 4),
            ValueError,
            r"triggered\(\): the history must have the column 'consensus_distance', "
            r"got \['loss', 'step'\]",
        ),
        (
            lambda: jax.jit(lsgd.adacomm(4))(jnp.int32(3)),
            TypeError,
            r"adacomm\(4\): it works in train\(every=...\) only",
        ),
        (
            lambda: lsgd.measured(lsgd.average),
            TypeError,
            r"measured\(rule\): a SyncRule is needed",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
