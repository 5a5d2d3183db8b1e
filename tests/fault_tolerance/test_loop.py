"""Fault-tolerant training loop in a single process."""

import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.selection import in_full
from programs.fault_tolerant_worker import (
    BATCH,
    WORKERS,
    algorithm,
    data,
    initial_params,
)

import localsgd_jax as lsgd
from localsgd_jax import fault_tolerance
from localsgd_jax.checkpoint import RunCheckpointer
from localsgd_jax.execution.process_local import on_processes
from localsgd_jax.fault_tolerance import EXIT_PREEMPTED


def single_process_cluster(made=None, workers=WORKERS):
    """Returns a process-local cluster on two devices of this process."""
    mesh = jax.make_mesh((2,), ("worker",), devices=jax.devices()[:2])
    return on_processes(made or algorithm(), mesh, workers)


def make_batches(examples_seen=0):
    return lsgd.shuffled_batches(
        data(), workers=WORKERS, batch=BATCH, examples_seen=examples_seen
    )


def train(cluster, params=None, batches=None, state=None, **options):
    """Trains in rounds of four steps without a progress bar."""
    if state is None:
        state = cluster.init(initial_params() if params is None else params)
    batches = make_batches() if batches is None else batches
    options = {"schedule": 4, "progress": False} | options
    return fault_tolerance.train(cluster, state, batches, **options)


def test_single_process_matches_train():
    cluster = lsgd.simulate(algorithm(), WORKERS)
    expected, expected_history = lsgd.train(
        cluster,
        cluster.init(initial_params()),
        make_batches(),
        schedule=4,
        steps=18,
        progress=False,
    )
    rows = []
    state, history = train(single_process_cluster(), steps=18, on_round_end=rows.append)
    for one, other in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for name in ("step", "round", "bytes"):
        assert history[name].tolist() == expected_history[name].tolist()
    np.testing.assert_allclose(history["loss"], expected_history["loss"], rtol=1e-5)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 18]


@pytest.mark.parametrize("overlap", [False, in_full(True)])
def test_adaptive_schedule_is_updated(overlap):
    """A row affects the next round that has not begun."""
    _, history = train(
        single_process_cluster(), schedule=lsgd.adacomm(8), steps=100, overlap=overlap
    )
    lengths, losses = np.diff(history["step"], prepend=0), history["loss"]
    expected = np.ceil(np.sqrt(losses / losses[0]) * 8)
    lag = 1 + overlap
    assert (lengths[: 1 + lag] == 8).all() and lengths[-2] < 6
    decreases = np.flatnonzero(np.minimum.accumulate(losses) == losses)
    for r in decreases[decreases < len(lengths) - lag - 1]:
        assert lengths[r + lag] <= expected[r]


def test_progress_bar_shows_round_and_live_processes(capsys):
    train(single_process_cluster(), steps=18, progress=True)
    shown = capsys.readouterr().err
    assert "18/18" in shown and "round=5" in shown and "live_processes=1" in shown


def test_overlap_matches_overlap_rule():
    """At the end all workers have the mean of the states of the rule's workers."""

    def loss(w, batch):
        return jnp.mean((w - batch[1]) ** 2)

    delayed = lsgd.local_sgd(loss, optax.sgd(0.1), rule=lsgd.overlap(lsgd.average()))
    cluster = lsgd.simulate(delayed, WORKERS)
    expected, _ = lsgd.train(
        cluster,
        cluster.init(jnp.zeros(())),
        make_batches(),
        schedule=4,
        steps=16,
        progress=False,
    )
    plain = lsgd.local_sgd(loss, optax.sgd(0.1), rule=lsgd.average())
    state, history = train(
        single_process_cluster(plain), params=jnp.zeros(()), steps=16, overlap=True
    )
    assert history["step"].tolist() == [4, 8, 12, 16]
    assert int(state.step) == 16 and int(state.round) == 4
    np.testing.assert_allclose(
        state.workers.params, np.full(WORKERS, lsgd.consensus(expected)), rtol=1e-5
    )


def test_resumed_run_continues_from_mean(tmp_path):
    cluster = single_process_cluster()
    mean_cluster = cluster.mean_cluster
    state = None
    for steps in (8, 16):
        with RunCheckpointer(tmp_path, mean_cluster, process_local=True) as saved:
            single, examples = saved.restore(mean_cluster.init(initial_params()))
            assert int(single.step) == steps - 8
            assert examples == (steps - 8) * WORKERS * BATCH
            state, _ = train(
                cluster,
                state=cluster.replicate(single),
                batches=make_batches(examples),
                steps=8,
                save=saved.save,
                save_every=4,
            )
    assert int(state.step) == 16


def test_replicated_workers_have_distinct_keys():
    made = lsgd.from_train_step(lambda s, b: (s, {}), rule=lsgd.average())
    cluster = single_process_cluster(made, workers=4)
    params = {"params": jnp.arange(3.0), "key": jax.random.key(3)}
    single = cluster.mean_cluster.init(params)
    state = cluster.replicate(single)
    assert state.workers["params"].tolist() == [[0.0, 1.0, 2.0]] * 4
    keys = jax.random.key_data(state.workers["key"])
    assert len(np.unique(keys, axis=0)) == 4
    assert (keys[0] == jax.random.key_data(single.workers["key"][0])).all()


def test_non_finite_loss_names_workers_of_process():
    # As if the first four workers were in another process.
    worker_process = (1,) * 4 + (0,) * (WORKERS - 4)
    cluster = single_process_cluster()._replace(worker_process=worker_process)
    batches = itertools.chain(
        itertools.islice(make_batches(), 4),
        (jax.tree.map(lambda x: x * np.inf, batch) for batch in make_batches()),
    )
    with pytest.raises(lsgd.NonFiniteLossError) as caught:
        train(cluster, batches=batches, steps=12)
    assert (caught.value.step, caught.value.workers) == (8, list(range(4, WORKERS)))
    assert caught.value.history["step"].tolist() == [4]


def test_sigterm_saves_and_exits():
    """The signal arrives while a batch is read."""

    def batches():
        for i, batch in enumerate(make_batches()):
            if i == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    saved = []
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        train(
            single_process_cluster(),
            batches=batches(),
            save=lambda state, examples: saved.append((int(state.step), examples)),
        )
    assert caught.value.code == EXIT_PREEMPTED
    assert saved == [(8, 8 * WORKERS * BATCH)]
    assert signal.getsignal(signal.SIGTERM) is previous


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": 0}, r"train\(schedule\): a period must be at least 1, got 0"),
        (
            {"min_processes": 2},
            r"train\(min_processes\): there are 1 processes, got 2",
        ),
        (
            {"min_processes": 0},
            r"train\(min_processes\): min_processes must be at least 1, got 0",
        ),
        in_full({"save_every": 0}, r"train\(save_every\): save_every must be at least"),
        in_full(
            {"evaluate_every": 0},
            r"train\(evaluate_every\): evaluate_every must be at least 1",
        ),
        ({"steps": 2.5}, r"train\(steps\): steps must be an int, got 2.5"),
        in_full({"steps": "a"}, r"train\(steps\): steps must be an int, got 'a'"),
        in_full({"steps": -1}, r"train\(steps\): steps must be at least 0, got -1"),
        (
            {"round_deadline": "x"},
            r"train\(round_deadline\): round_deadline must be a real number, got 'x'",
        ),
        in_full(
            {"round_deadline": 0},
            r"train\(round_deadline\): round_deadline must be positive",
        ),
        (
            {"sync_timeout": np.nan},
            r"train\(sync_timeout\): sync_timeout must be positive",
        ),
        in_full(
            {"sync_timeout": 0},
            r"train\(sync_timeout\): sync_timeout must be positive",
        ),
        in_full(
            {"straggler_timeout": np.inf},
            r"train\(straggler_timeout\): straggler_timeout must be finite",
        ),
    ],
)
@pytest.mark.timeout(60)
def test_invalid_arguments_raise(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(single_process_cluster(), **({"steps": 8} | options))


def test_empty_batches_raise():
    with pytest.raises(ValueError, match=r"train\(batches\): the iterator is empty"):
        train(single_process_cluster(), batches=[])


def test_complete_run_has_all_columns_and_no_rows():
    cluster = single_process_cluster()
    state, history = train(cluster, steps=0)
    _, later_history = train(cluster, state=state, steps=4)
    assert history.keys() == later_history.keys() - {"loss"}
    assert {name: x.shape for name, x in history.items()} == {
        name: (0, *later_history[name].shape[1:]) for name in history
    }


@pytest.mark.parametrize("batch", [None, in_full({})])
def test_batches_without_arrays_raise(batch):
    with pytest.raises(ValueError, match=rf"a batch must hold arrays, got {batch}"):
        train(single_process_cluster(), batches=[batch])
