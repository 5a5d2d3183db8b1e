"""The host loop: the same numbers as by hand, nothing dropped, nothing in the way."""

import itertools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    WORKERS,
    assert_close,
    assert_same,
    batches,
    cluster,
    loss_fn,
    network,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import localsgd_jax as lsgd
from localsgd_jax.journal import Journal
from localsgd_jax.train import Segment, plan

SCHEDULES = [
    lsgd.every(1),
    lsgd.every(3),
    lsgd.every(8),
    lsgd.every(50),
    lsgd.never(),
    lsgd.at([2, 3, 7, 16]),
    lsgd.post_local(5, 4),
    lsgd.growing(8),
    lambda t: t % 3 == 0,
]


def by_hand(verbs, batches, due, weight=None):
    state, losses = run(verbs, batches, due, weight)
    ends = [t for t in range(1, len(batches) + 1) if due(t)]
    if (ends or [0])[-1] < len(batches):
        state = verbs.sync(state, weight)
        ends.append(len(batches))
    return state, losses, ends


@pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda due: getattr(due, "name", "plain function")
)
@pytest.mark.parametrize("place", ["simulate", "lanes"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_training_is_by_hand_with_the_remainder(schedule, place, chunk):
    verbs = cluster(place, "anchored")
    expected, losses, ends = by_hand(verbs, batches(23), schedule)
    state, history = lsgd.train(
        verbs,
        verbs.init(network()),
        batches(23),
        every=schedule,
        chunk=chunk,
        progress=False,
    )
    assert_close(state, expected, rtol=2e-5, atol=2e-6)
    assert history["step"].tolist() == ends
    assert history["round"].tolist() == list(range(1, len(ends) + 1))
    means = [losses[a:b].mean() for a, b in itertools.pairwise([0, *ends])]
    np.testing.assert_allclose(history["loss"], means, rtol=1e-5)
    per_round = verbs.sent(state)[0]
    assert history["bytes"].tolist() == [per_round * r for r in history["round"]]
    assert np.all(np.diff(history["seconds"]) >= 0)


def test_weights_reach_every_mean():
    weight = np.arange(WORKERS, dtype=np.float32)
    verbs = cluster("mesh", "average")
    for schedule in (lsgd.every(3), lsgd.at([2, 3, 9])):
        expected, _, _ = by_hand(verbs, batches(10), schedule, weight)
        state, _ = lsgd.train(
            verbs,
            verbs.init(network()),
            batches(10),
            every=schedule,
            weight=weight,
            progress=False,
        )
        assert_close(state, expected)


def test_two_runs_are_one():
    """A run resumed at a step in the middle of a schedule takes it up there."""
    verbs = cluster("simulate", "average")
    schedule = lsgd.post_local(4, 4)
    whole, _, _ = by_hand(verbs, batches(20), schedule)
    state, _ = lsgd.train(
        verbs, verbs.init(network()), batches(20)[:8], every=schedule, progress=False
    )
    state, history = lsgd.train(
        verbs, state, batches(20)[8:], every=schedule, progress=False
    )
    assert_close(state, whole)
    assert history["step"].tolist() == [12, 16, 20]
    assert history["round"].tolist() == [6, 7, 8]


def test_steps_bound_an_endless_stream():
    verbs = cluster("simulate", "average")
    read = []
    stream = (read.append(1) or batch for batch in itertools.cycle(batches(4)))
    state, _ = lsgd.train(
        verbs, verbs.init(network()), stream, every=4, steps=10, progress=False
    )
    assert (int(state.step), int(state.round), len(read)) == (10, 3, 10)


def test_batches_without_arrays_are_refused():
    verbs = cluster("simulate", "average")
    with pytest.raises(ValueError, match="a batch must hold arrays, got None"):
        lsgd.train(verbs, verbs.init(network()), [None], every=4, progress=False)


def test_no_batches_change_nothing():
    verbs = cluster("simulate", "average")
    before = verbs.init(network())
    state, history = lsgd.train(verbs, before, [], every=4, progress=False)
    assert_same(state, before)
    assert {name: x.tolist() for name, x in history.items()} == {
        "step": [],
        "round": [],
        "bytes": [],
        "seconds": [],
    }


@pytest.mark.parametrize("schedule", [lsgd.every(2), lsgd.post_local(4, 3)], ids=repr)
def test_evaluation_sees_the_consensus_every_n_rounds_and_at_the_end(schedule):
    verbs = cluster("mesh", "average")
    seen = []

    def evaluate(params):
        seen.append(params)
        return {"norm": optax.tree.norm(params)}

    _, history = lsgd.train(
        verbs,
        verbs.init(network()),
        batches(17),
        every=schedule,
        evaluate=evaluate,
        evaluate_every=3,
        progress=False,
    )
    rounds = len(history["round"])
    looks = sorted({*range(3, rounds + 1, 3), rounds})
    assert np.flatnonzero(~np.isnan(history["norm"])).tolist() == [r - 1 for r in looks]
    for turn, params in zip(looks, seen, strict=True):
        step = history["step"][turn - 1]
        expected, _, _ = by_hand(verbs, batches(17)[:step], schedule)
        assert_close(params, lsgd.consensus(expected), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_looks_where_the_whole_run_looks():
    verbs = cluster("simulate", "average")
    state = verbs.init(network())
    rounds = []
    for part in (batches(20)[:8], batches(20)[8:]):
        state, history = lsgd.train(
            verbs,
            state,
            part,
            every=2,
            evaluate=lambda params: 1.0,
            evaluate_every=3,
            progress=False,
        )
        seen = ~np.isnan(history["evaluation"])
        rounds.append(history["round"][seen].tolist())
    assert rounds == [[3, 4], [6, 9, 10]]


def test_evaluation_sees_the_mean_of_workers_that_differ():
    verbs = cluster("simulate", "keep")
    seen = []
    state, _ = lsgd.train(
        verbs,
        verbs.init(network()),
        batches(3),
        every=3,
        evaluate=lambda params: seen.append(params) or 0,
        progress=False,
    )
    mean = jax.tree.map(lambda x: np.mean(x, axis=0), state.workers.params)
    assert_close(seen[0], mean)


def test_a_number_from_evaluate_is_called_evaluation():
    verbs = cluster("simulate", "average")
    _, history = lsgd.train(
        verbs,
        verbs.init(network()),
        batches(4),
        every=2,
        evaluate=lambda params: 7,
        progress=False,
    )
    assert history["evaluation"].tolist() == [7, 7]


def test_rows_are_recorded_once_each_as_they_become_known():
    verbs = cluster("simulate", "average")
    rows = []
    _, history = lsgd.train(
        verbs,
        verbs.init(network()),
        batches(11),
        every=2,
        evaluate=lambda params: {"one": 1.0},
        evaluate_every=2,
        record=rows.append,
        progress=False,
    )
    assert [row["round"] for row in rows] == history["round"].tolist()
    assert ["one" in row for row in rows] == [False, True] * 3
    assert [row["loss"] for row in rows] == history["loss"].tolist()


def test_every_number_per_worker_becomes_a_column():
    def train_step(state, batch):
        metrics = {
            "loss": batch,
            "more": {"twice": 2 * batch},
            "row": batch * jnp.ones(3),
        }
        return {"params": state["params"] + batch}, metrics

    verbs = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    _, history = lsgd.train(
        verbs,
        verbs.init({"params": jnp.zeros(())}),
        [jnp.array([1.0, 3.0])] * 2,
        every=2,
        progress=False,
    )
    assert history["loss"].tolist() == [2] and history["more.twice"].tolist() == [4]
    assert "row" not in history


def test_a_smaller_last_batch_is_trained_too():
    verbs = cluster("simulate", "average")
    uneven = [*batches(6), *batches(1, batch=1)]
    expected, _, _ = by_hand(verbs, uneven, lsgd.every(2))
    state, history = lsgd.train(
        verbs, verbs.init(network()), uneven, every=2, progress=False
    )
    assert_close(state, expected)
    assert history["step"].tolist() == [2, 4, 6, 7]


def test_batches_of_another_dtype_are_not_stacked_with_the_rest():
    """16777217 has no float32: promoted together with floats it would change."""

    def train_step(state, batch):
        return {"params": state["params"] + (batch == 16777217)}, batch

    verbs = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    whole, real = np.full(2, 16777217, np.int32), np.zeros(2, np.float32)
    state, _ = lsgd.train(
        verbs,
        verbs.init({"params": jnp.zeros(())}),
        [real, whole, real, whole],
        every=4,
        progress=False,
    )
    assert state.workers["params"].tolist() == [2, 2]


@pytest.mark.parametrize("every", [1, 4, lsgd.at([2, 3, 70])], ids=repr)
def test_a_loss_that_is_no_number_stops_with_step_and_workers(every):
    verbs = cluster("lanes", "average")
    poisoned = batches(90)
    for worker in (1, 6):
        poisoned[10][1][worker] = np.nan
    rows = []
    with pytest.raises(lsgd.NonFiniteLossError, match=r"step 11 .*\[1, 6\]") as caught:
        lsgd.train(
            verbs,
            verbs.init(network()),
            poisoned,
            every=every,
            record=rows.append,
            chunk=8,
            progress=False,
        )
    assert (caught.value.step, caught.value.workers) == (11, [1, 6])
    assert isinstance(caught.value.state, lsgd.State)
    assert caught.value.history["round"].tolist() == [row["round"] for row in rows]
    assert np.isfinite(caught.value.history["loss"]).all()
    due = lsgd.every(every) if isinstance(every, int) else every
    assert [row["step"] for row in rows] == due.steps(10)


def test_the_host_reads_ahead_while_devices_compute(monkeypatch):
    """Batches of the second dispatch are read before the metrics of the first are."""
    verbs = cluster("simulate", "average")
    log, read = [], Journal.read

    def watched(self, computed, state, last=False):
        if computed is not None:
            log.append("metrics")
        read(self, computed, state, last)

    monkeypatch.setattr(Journal, "read", watched)
    stream = (log.append("batch") or batch for batch in batches(12))
    lsgd.train(verbs, verbs.init(network()), stream, every=4, chunk=4, progress=False)
    assert log[: log.index("metrics")].count("batch") == 8


def test_the_bar_shows_loss_round_and_bytes(capsys):
    verbs = cluster("simulate", "average")
    lsgd.train(verbs, verbs.init(network()), batches(6), every=2, progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "loss=" in shown and "round=3" in shown and "MB=" in shown


def test_the_state_is_donated():
    verbs = cluster("mesh", "average")
    before = verbs.init(network())
    lsgd.train(verbs, before, batches(4), every=2, progress=False)
    assert before.workers.params["out"].is_deleted()


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        st.integers(1, 9).map(lsgd.every),
        st.sets(st.integers(1, 60), min_size=1).map(lsgd.at),
        st.builds(lsgd.post_local, st.integers(0, 20), st.integers(1, 9)),
        st.integers(1, 9).map(lsgd.growing),
    ),
    st.integers(0, 30),
    st.integers(1, 40),
    st.integers(1, 12),
)
def test_a_plan_is_true_to_the_schedule(schedule, start, limit, chunk):
    steps, period = plan(schedule, start, limit, chunk)
    assert 1 <= steps <= min(limit, chunk)
    if period is None:
        assert steps in (1, chunk)
    else:
        due = [schedule(start + i) for i in range(1, steps + 1)]
        assert due == [i % period == 0 for i in range(1, steps + 1)]
        assert steps in (period, chunk // period * period)


def test_regular_rounds_are_fused_and_irregular_ones_gated():
    assert plan(lsgd.every(4), 0, 64, 64) == Segment(64, 4)
    assert plan(lsgd.every(4), 0, 63, 64) == Segment(4, 4)
    assert plan(lsgd.every(4), 2, 64, 64) == Segment(64, None)
    assert plan(lsgd.at([5, 9]), 0, 64, 64) == Segment(64, None)
    assert plan(lsgd.at([5, 9]), 0, 30, 64) == Segment(1, None)
    assert plan(lsgd.every(100), 0, 64, 64) == Segment(64, None)


def test_few_programs_are_compiled():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    verbs = lsgd.simulate(
        lsgd.local_sgd(counted, optax.sgd(0.1), rule=lsgd.average()), WORKERS
    )
    lsgd.train(
        verbs,
        verbs.init(network()),
        batches(200),
        every=lsgd.growing(16, rounds=3),
        chunk=16,
        progress=False,
    )
    assert len(traces) <= 1  # every program reuses the step traced first


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"every": 0}, ValueError, r"every\(h\): h must be at least 1, got 0"),
        ({"every": "often"}, TypeError, r"every\(h\): h must be an int, got 'often'"),
        ({"steps": -1}, ValueError, r"train\(steps\): \w+ must be at least 0, got -1"),
        ({"save_every": 0}, ValueError, r"train\(save_every\): .* got 0"),
        ({"chunk": 0}, ValueError, r"train\(chunk\): \w+ must be at least 1, got 0"),
        ({"evaluate_every": 0}, ValueError, r"train\(evaluate_every\)"),
        (
            {"batches": batches(2, workers=5)},
            ValueError,
            r"8 workers, got shape \(2, 5",
        ),
        ({"batches": [batches(1)[0], [1.0]]}, TypeError, "one structure"),
        (
            {"evaluate": lambda p: np.ones(2)},
            TypeError,
            r"train\(evaluate\).*array\(\[",
        ),
        ({"evaluate": lambda p: {"a": "x"}}, TypeError, r"got 'x' for 'a'"),
        ({"weight": np.ones(3)}, ValueError, r"shape \(8,\).*got \(3,\)"),
        (
            {"weight": np.full(8, -1.0)},
            ValueError,
            "not negative, got -1.0 for worker 0",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    verbs = cluster("mesh", "average")
    arguments = {"batches": batches(2), "every": 2, "progress": False} | arguments
    with pytest.raises(error, match=message):
        lsgd.train(verbs, verbs.init(network()), **arguments)


def test_an_error_of_the_batches_comes_through():
    def stream():
        yield from batches(3)
        raise OSError("the disk is gone")

    verbs = cluster("simulate", "average")
    with pytest.raises(OSError, match="the disk is gone"):
        lsgd.train(verbs, verbs.init(network()), stream(), every=2, progress=False)


# A local step slow enough for the host to run ahead of the devices.
QUEUES_ROUNDS = """
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import localsgd_jax as lsgd

    def loss_fn(w, batch):
        return jnp.mean((batch @ jnp.linalg.matrix_power(jnp.outer(w, w), 8)) ** 2)

    made = lsgd.local_sgd(loss_fn, optax.sgd(1e-9), rule=lsgd.average())
    cluster = lsgd.on_mesh(made, jax.make_mesh((8,), ("worker",)))
    state = cluster.init(np.full(128, 0.01, np.float32))
    batch = np.ones((8, 4, 128), np.float32)
    state, history = lsgd.train(
        cluster, state, (batch for _ in range(1000)), every=2, chunk=2, progress=False
    )
    print(len(history["round"]))
"""


def test_five_hundred_rounds_do_not_starve_the_cpu():
    """Without NPROC, JAX 0.10 and 0.11 abort when so many rounds queue unwaited."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("NPROC", "PJRT_NPROC")
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(QUEUES_ROUNDS)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["500"]
