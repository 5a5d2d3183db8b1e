"""Training loop: the state and the history match a manual loop."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import (
    WORKERS,
    assert_close,
    assert_same,
    batches,
    cluster,
    network,
    run_manually,
)
from harness.selection import in_full

import localsgd_jax as lsgd

SCHEDULES = {
    "every(1)": lsgd.every(1),
    "every(3)": lsgd.every(3),
    "every(8)": lsgd.every(8),
    "every(50)": lsgd.every(50),
    "never": lsgd.never(),
    "at_steps": lsgd.at_steps([2, 3, 7, 16]),
    "post_local": lsgd.post_local(5, 4),
    "geometric": lsgd.geometric(8),
    "function": lambda step: step % 3 == 0,
}


def schedule_cases():
    """Returns schedules, placements and limits; few of them in the default run."""
    fast = [(schedule, "lanes", 5) for schedule in SCHEDULES]
    fast += [("every(3)", "simulate", 1), ("at_steps", "simulate", 64)]
    fast += [("every(8)", "lanes", 64)]
    cases = itertools.product(SCHEDULES, ("simulate", "lanes"), (1, 5, 64))
    return [case if case in fast else in_full(*case) for case in cases]


def reference_loop(cluster, batches, due, weights=None):
    """Returns state, losses and round ends of a manual loop with a final sync."""
    state, losses = run_manually(cluster, batches, due, weights)
    ends = [t for t in range(1, len(batches) + 1) if due(t)]
    if (ends or [0])[-1] < len(batches):
        state = cluster.sync(state, weights)
        ends.append(len(batches))
    return state, losses, ends


def train(cluster, batches, **options):
    """Trains from the network's initial parameters without a progress bar."""
    options = {"schedule": 2, "progress": False} | options
    return lsgd.train(cluster, cluster.init(network()), batches, **options)


@pytest.mark.parametrize("schedule, placement, max_steps", schedule_cases())
def test_train_matches_manual_loop(schedule, placement, max_steps):
    schedule = SCHEDULES[schedule]
    workers = cluster(placement, "momentum_rule")
    expected, losses, ends = reference_loop(workers, batches(23), schedule)
    state, history = train(
        workers, batches(23), schedule=schedule, max_steps_per_dispatch=max_steps
    )
    assert_close(state, expected, rtol=2e-5, atol=2e-6)
    assert history["step"].tolist() == ends
    assert history["round"].tolist() == list(range(1, len(ends) + 1))
    means = [losses[a:b].mean() for a, b in itertools.pairwise([0, *ends])]
    np.testing.assert_allclose(history["loss"], means, rtol=1e-5)
    per_round = workers.bytes_sent(state)[0]
    assert history["bytes"].tolist() == [per_round * r for r in history["round"]]
    assert np.all(np.diff(history["seconds"]) >= 0)


@pytest.mark.parametrize(
    "schedule", [lsgd.every(3), lsgd.at_steps([2, 3, 9])], ids=repr
)
def test_weights_are_used_in_every_mean(schedule):
    weights = np.arange(WORKERS, dtype=np.float32)
    workers = cluster("mesh", "average")
    expected, _, _ = reference_loop(workers, batches(10), schedule, weights)
    state, _ = train(workers, batches(10), schedule=schedule, weights=weights)
    assert_close(state, expected)


def test_resumed_run_matches_uninterrupted_run():
    """The second run starts in the middle of a schedule."""
    workers, schedule = cluster("simulate", "average"), lsgd.post_local(4, 4)
    expected, _, _ = reference_loop(workers, batches(20), schedule)
    state, _ = train(workers, batches(20)[:8], schedule=schedule)
    state, history = lsgd.train(
        workers, state, batches(20)[8:], schedule=schedule, progress=False
    )
    assert_close(state, expected)
    assert history["step"].tolist() == [12, 16, 20]
    assert history["round"].tolist() == [6, 7, 8]


def test_steps_limit_an_endless_iterator():
    read = []
    stream = (read.append(1) or batch for batch in itertools.cycle(batches(4)))
    state, _ = train(cluster("simulate", "average"), stream, schedule=4, steps=10)
    assert (int(state.step), int(state.round), len(read)) == (10, 3, 10)


def test_no_batches_return_the_initial_state():
    workers = cluster("simulate", "average")
    before = workers.init(network())
    state, history = lsgd.train(workers, before, [], schedule=4, progress=False)
    assert_same(state, before)
    assert {name: x.tolist() for name, x in history.items()} == {
        "step": [],
        "round": [],
        "bytes": [],
        "seconds": [],
    }


def test_smaller_last_batch_is_trained():
    workers = cluster("simulate", "average")
    uneven = [*batches(6), *batches(1, batch=1)]
    expected, _, _ = reference_loop(workers, uneven, lsgd.every(2))
    state, history = train(workers, uneven)
    assert_close(state, expected)
    assert history["step"].tolist() == [2, 4, 6, 7]


def test_batches_of_other_dtype_are_not_promoted():
    """16777217 has no float32 representation; stacked with floats it would change."""

    def train_step(state, batch):
        return {"params": state["params"] + (batch == 16777217)}, batch

    workers = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    integers, floats = np.full(2, 16777217, np.int32), np.zeros(2, np.float32)
    state, _ = lsgd.train(
        workers,
        workers.init({"params": jnp.zeros(())}),
        [floats, integers, floats, integers],
        schedule=4,
        progress=False,
    )
    assert state.workers["params"].tolist() == [2, 2]


def test_state_is_donated():
    workers = cluster("mesh", "average")
    before = workers.init(network())
    lsgd.train(workers, before, batches(4), schedule=2, progress=False)
    assert before.workers.params["out"].is_deleted()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"schedule": 0},
            ValueError,
            r"train\(schedule\): a period must be at least 1, got 0",
        ),
        in_full(
            {"schedule": "often"},
            TypeError,
            r"train\(schedule\): a period must be an int, got 'often'",
        ),
        ({"steps": -1}, ValueError, r"train\(steps\): steps must be at least 0, got -"),
        in_full({"save_every": 0}, ValueError, r"train\(save_every\): .* got 0"),
        in_full(
            {"max_steps_per_dispatch": 0},
            ValueError,
            r"train\(max_steps_per_dispatch\): \w+ must be at least 1, got 0",
        ),
        ({"evaluate_every": 0}, ValueError, r"train\(evaluate_every\)"),
        (
            {"batches": batches(2, workers=5)},
            ValueError,
            r"train\(batches\): .* 8 workers, got shape \(5",
        ),
        ({"batches": [batches(1)[0], [1.0]]}, TypeError, "one structure"),
        ({"batches": [None]}, ValueError, "a batch must hold arrays, got None"),
        (
            {"evaluate": lambda p: np.ones(2)},
            TypeError,
            r"train\(evaluate\).*got float64\[2\]",
        ),
        in_full({"evaluate": lambda p: {"a": "x"}}, TypeError, r"got 'x' for 'a'"),
        ({"weights": np.ones(3)}, ValueError, r"shape \(8,\).*got \(3,\)"),
        in_full(
            {"weights": np.full(8, -1.0)},
            ValueError,
            "must be 0 or in .*got -1.0 for worker 0",
        ),
    ],
)
def test_invalid_arguments_raise(arguments, error, message):
    arguments = {"batches": batches(2)} | arguments
    with pytest.raises(error, match=message):
        train(cluster("mesh", "average"), **arguments)


def test_error_of_the_iterator_is_raised():
    def stream():
        yield from batches(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(cluster("simulate", "average"), stream())
