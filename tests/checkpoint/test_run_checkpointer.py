"""Save and restore on the same number of workers."""

import itertools
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import PLACEMENTS, assert_same, key_data
from harness.checkpoint_run import (
    BATCH,
    STEPS,
    K,
    batches_from,
    initial_state,
    make_algorithm,
    save_with_eight_workers,
)
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer, run_checkpointer


def run_with_checkpoints(
    directory, cluster, schedule, stop=None, save_every=5, **options
):
    """Resumes the run; the data iterator raises at step `stop`."""
    with RunCheckpointer(directory, cluster, **options) as checkpointer:
        state, examples_seen = checkpointer.restore(cluster.init(initial_state()))
        first = int(state.step)

        def batches():
            for step, batch in enumerate(
                batches_from(cluster, examples_seen), first + 1
            ):
                if step == stop:
                    raise KeyboardInterrupt
                yield batch

        return lsgd.train(
            cluster,
            state,
            batches(),
            schedule=schedule,
            steps=STEPS - first,
            max_steps_per_dispatch=6,
            evaluate=lambda params: jnp.sum(params["w"]),
            evaluate_every=3,
            save=checkpointer.save,
            save_every=save_every,
            progress=False,
        )


@pytest.mark.parametrize(
    "placement, schedule",
    [
        in_full("simulate", lsgd.every(4)),
        ("lanes", lsgd.post_local(6, 5)),
        in_full("simulate", lsgd.never()),
    ],
    ids=repr,
)
def test_resumed_run_is_bitwise_identical(tmp_path, placement, schedule):
    """Checkpoints every five steps are also within rounds of four steps."""
    cluster = PLACEMENTS[placement](make_algorithm())
    uninterrupted, history = run_with_checkpoints(
        tmp_path / "uninterrupted", cluster, schedule
    )
    for stop in (3, 12, 17, STEPS):
        with pytest.raises(KeyboardInterrupt):
            run_with_checkpoints(tmp_path / "resumed", cluster, schedule, stop)
    resumed, rest = run_with_checkpoints(tmp_path / "resumed", cluster, schedule)
    assert_same(resumed, uninterrupted)
    again, empty = run_with_checkpoints(tmp_path / "resumed", cluster, schedule)
    assert_same(again, uninterrupted)
    assert empty["step"].size == 0
    last = history["evaluation"][-1]
    assert rest["evaluation"][-1] == last and rest["round"][-1] == history["round"][-1]


@pytest.mark.full
def test_restore_onto_other_placement(tmp_path):
    """Saved on one device and restored bitwise onto eight, four and two."""
    first = PLACEMENTS["simulate"](make_algorithm())
    with pytest.raises(KeyboardInterrupt):
        run_with_checkpoints(tmp_path, first, lsgd.every(4), stop=18)
    states = []
    for placement in ("simulate", "mesh", "lanes", "sharded"):
        cluster = PLACEMENTS[placement](make_algorithm())
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            initial = cluster.init(initial_state())
            state, examples_seen = checkpointer.restore(initial)
        assert examples_seen == 10 * K * BATCH or examples_seen == 15 * K * BATCH
        assert [x.sharding for x in jax.tree.leaves(state)] == [
            x.sharding for x in jax.tree.leaves(initial)
        ]
        states.append(state)
    for state in states[1:]:
        assert_same(jax.tree.leaves(state), jax.tree.leaves(states[0]))


def test_max_to_keep(tmp_path):
    cluster = lsgd.simulate(make_algorithm(), K)
    run_with_checkpoints(tmp_path, cluster, lsgd.every(4), max_to_keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "23"]


def test_saved_state_may_be_donated(tmp_path):
    cluster = lsgd.simulate(make_algorithm(), K)
    step = jax.jit(lsgd.gated(cluster, lsgd.every(2)), donate_argnums=0)
    state, kept = cluster.init(initial_state()), {}
    with RunCheckpointer(tmp_path, cluster, max_to_keep=9) as checkpointer:
        for batch in itertools.islice(batches_from(cluster, 0), 8):
            state, _ = step(state, batch)
            kept[int(state.step)] = jax.tree.map(key_data, state)
            checkpointer.save(state)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        restored, _ = checkpointer.restore(cluster.init(initial_state()))
    assert_same(jax.tree.map(key_data, restored), kept[8])


def test_non_finite_state_is_not_saved(tmp_path):
    cluster = lsgd.simulate(make_algorithm(), K)
    batches = list(itertools.islice(batches_from(cluster, 0), 9))
    batches[6] = batches[6] * np.nan
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        with pytest.raises(lsgd.NonFiniteLossError):
            lsgd.train(
                cluster,
                cluster.init(initial_state()),
                batches,
                schedule=2,
                save=checkpointer.save,
                save_every=2,
                progress=False,
            )
        assert int(checkpointer.restore(cluster.init(initial_state()))[0].step) == 6


def test_train_saves_at_multiples_and_at_the_end():
    cluster = lsgd.simulate(make_algorithm(), K)
    calls = []

    def save(state, examples):
        calls.append((int(state.step), int(state.round), examples))

    state = cluster.init(initial_state())
    for steps in (7, 6, 0):
        batches = itertools.islice(batches_from(cluster, 0), steps)
        state, _ = lsgd.train(
            cluster, state, batches, schedule=4, save=save, save_every=3, progress=False
        )
    n = K * BATCH
    assert calls == [(3, 0, 3 * n), (6, 1, 6 * n), (7, 2, 7 * n)] + [
        (9, 3, 2 * n),
        (12, 4, 5 * n),
        (13, 5, 6 * n),
    ]


def test_empty_directory_returns_the_state(tmp_path):
    cluster = lsgd.simulate(make_algorithm(), K)
    initial = cluster.init(initial_state())
    with RunCheckpointer(tmp_path / "new", cluster) as checkpointer:
        assert checkpointer.restore(initial) == (initial, 0)


def test_save_before_the_latest_step_raises(tmp_path):
    state = save_with_eight_workers(tmp_path)
    cluster = lsgd.simulate(make_algorithm(), K)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        for late in (state, cluster.init(initial_state())):
            with pytest.raises(CheckpointError, match="of step 5 already, got a state"):
                checkpointer.save(late)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"max_to_keep": 0},
            ValueError,
            r"RunCheckpointer\(max_to_keep\): .* at least 1, got 0",
        ),
        ({"seed": -1}, ValueError, r"RunCheckpointer\(seed\): .* at least 0, got -1"),
        ({"config": {"f": len}}, TypeError, "not JSON serializable"),
    ],
)
def test_invalid_arguments_raise(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        RunCheckpointer(tmp_path, lsgd.simulate(make_algorithm(), 2), **arguments)


def test_processes_share_a_checkpoint_by_default(tmp_path, monkeypatch):
    make_storage = unittest.mock.Mock()
    make_storage.return_value.processes = (0,)
    monkeypatch.setattr(run_checkpointer, "CheckpointStorage", make_storage)
    RunCheckpointer(tmp_path, lsgd.simulate(make_algorithm(), K))
    make_storage.assert_called_once_with(tmp_path, 3, False, False)
