"""Checkpointable iterators in `train`: states of consumed batches, SIGKILL, resume."""

import os
import signal
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.launched_jobs import LaunchedJob
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer

K = 2


class Numbers:
    """Checkpointable iterator over 0, 1, …, in batches of one example per worker."""

    def __init__(self, end=40):
        self.next, self.end = 0, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.next >= self.end:
            raise StopIteration
        self.next += 1
        return np.full(K, self.next - 1, np.float32)

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def make_cluster(workers=K):
    algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1))
    return lsgd.simulate(algorithm, workers)


def train(cluster, state, batches, save, **options):
    options = {"schedule": 4, "save_every": 6, "progress": False} | options
    return lsgd.train(cluster, state, batches, save=save, **options)


def test_state_of_the_batch_that_was_consumed_last():
    cluster, states = make_cluster(), []

    def save(state, examples, data_state):
        states.append((int(state.step), data_state["next"]))

    train(cluster, cluster.init(jnp.zeros(())), Numbers(), save, steps=15)
    assert states == [(6, 6), (12, 12), (15, 15)]


def test_functions_and_batches_without_states_are_called_as_before():
    cluster, calls = make_cluster(), []

    def save(state, examples):
        calls.append(examples)

    for batches in (Numbers(6), [np.zeros(K, np.float32)] * 6):
        train(cluster, cluster.init(jnp.zeros(())), batches, save)
    train(
        cluster,
        cluster.init(jnp.zeros(())),
        iter([np.zeros(K, np.float32)] * 6),
        lambda state, examples, **more: calls.append(more),
    )
    assert calls == [K * 6, K * 6, {}]


class Interrupted(Exception):
    """End of a run between two checkpoints."""


def test_resume_after_an_interruption_equals_a_run_without_one(tmp_path):
    cluster = make_cluster()

    def run(batches, on_round_end=None):
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            state, _ = checkpointer.restore(
                cluster.init(jnp.zeros(())), batches=batches
            )
            return train(
                cluster, state, batches, checkpointer.save, on_round_end=on_round_end
            )[0]

    def interrupt(row):
        if row["step"] == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(Numbers(), interrupt)
    batches = Numbers()
    resumed = run(batches)
    plain, _ = train(cluster, cluster.init(jnp.zeros(())), Numbers(), None)
    assert int(resumed.step) == 40 and batches.next == 40
    np.testing.assert_array_equal(
        lsgd.consensus(resumed), lsgd.consensus(plain), strict=True
    )


def save_one(directory, cluster, data_state=None):
    with RunCheckpointer(directory, cluster) as checkpointer:
        state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.zeros(K))
        checkpointer.save(state, K, data_state=data_state)


@pytest.mark.parametrize(
    "saved, workers, message",
    [
        (None, K, "holds no state of the batches"),
        in_full({"next": 1}, K + 1, "those of 2 workers, got 3 workers"),
    ],
)
def test_states_that_cannot_be_restored_raise(tmp_path, saved, workers, message):
    save_one(tmp_path, make_cluster(), saved)
    cluster = make_cluster(workers)
    with (
        RunCheckpointer(tmp_path, cluster) as checkpointer,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpointer.restore(cluster.init(jnp.zeros(())), batches=Numbers())


@pytest.mark.full
def test_states_of_other_processes_raise(tmp_path, monkeypatch):
    cluster = make_cluster()
    save_one(tmp_path, cluster, {"next": 1})
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        state = cluster.init(jnp.zeros(()))
        monkeypatch.setattr(
            "localsgd_jax.checkpoint.data_states.jax.process_count", lambda: 3
        )
        with pytest.raises(CheckpointError, match="processes 0, got 3 processes"):
            checkpointer.restore(state, batches=Numbers())


@pytest.mark.full
def test_damaged_states_raise_and_fall_back(tmp_path):
    cluster = make_cluster()
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        state = cluster.init(jnp.zeros(()))
        for step in (1, 2):
            state, _ = cluster.step(state, jnp.zeros(K))
            checkpointer.save(state, K, data_state={"next": step})
    files = (tmp_path / "2" / "data").iterdir()
    (path,) = [path for path in files if b"next" in path.read_bytes()]
    path.write_text(path.read_text().replace("2", "3"))
    batches = Numbers()
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        initial = cluster.init(jnp.zeros(()))
        with pytest.raises(CheckpointError, match="damaged .data: digest differs"):
            checkpointer.restore(initial, batches=batches)
        assert batches.next == 0
        with pytest.warns(UserWarning, match="restored checkpoint 1"):
            checkpointer.restore(initial, batches=batches, fallback=True)
    assert batches.next == 1


def run_job(directory, processes, source, kills, pause=0.01):
    """Runs a job to its end with kills of all processes; returns their results."""
    settings = {"directory": f"{directory}/run", "result": f"{directory}/result"}
    settings |= {"source": source, "pause": pause}
    starts = []
    for rows in [*kills, None]:
        with LaunchedJob(processes, "data_state_worker.py", settings) as job:
            if rows is None:
                assert job.end(400) == 0, job.tail()
            else:
                assert job.wait_for_row(rows, 300), job.tail()
                time.sleep(0.05)
                for pid in job.pids().values():
                    os.kill(pid, signal.SIGKILL)
                job.end(120)
            starts += [m.content["from"] for m in job.messages if "from" in m.content]
    results = [np.load(f"{directory}/result.{i}.npz") for i in range(processes)]
    return starts, [dict(result) for result in results]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "source, processes",
    [
        in_full("dataset", 2),
        *(
            pytest.param(source, count, marks=pytest.mark.slow)
            for source in ("state_dict", "dataset", "loader")
            for count in (1, 2)
            if (source, count) != ("dataset", 2)
        ),
    ],
)
def test_sigkill_loses_and_repeats_no_example(tmp_path, source, processes):
    """The state is that of a run without a kill, and each example is used once."""
    if source != "state_dict":
        pytest.importorskip("grain")
    starts, killed = run_job(tmp_path / "killed", processes, source, [4])
    _, plain = run_job(tmp_path / "plain", processes, source, [], pause=0)
    assert starts[0] == 0 and starts[-1] > 0, starts
    for one, other in zip(killed, plain, strict=True):
        assert one.keys() == other.keys() and int(one["step"]) == 120
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)
    counts = np.concatenate([result["counts"] for result in killed])
    assert (counts.sum(0) == 1).all()
