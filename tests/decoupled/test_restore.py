"""Event log, checkpoints and restart of a syncer, without Ray."""

import threading
import time

import jax
import numpy as np
import pytest
from harness.decoupled_jobs import make_job

from localsgd_jax import decoupled
from localsgd_jax.checkpoint import CheckpointError
from localsgd_jax.decoupled import Contribution, Join
from localsgd_jax.decoupled.event_log import EventLog, payload_like, read_events
from localsgd_jax.decoupled.ray_actors import (
    JobMismatchError,
    SyncerActor,
    _check_fingerprint,
)


def contribution(learner, number, value=1.0):
    payload = np.full(21, value, np.float32)
    metrics = {"loss": 0.5}
    return Contribution(0.0, learner, 7, number, 0, payload, 4, 8, 8, metrics)


def open_syncer(job, directory, save_every):
    return SyncerActor(job, 0, str(directory), time.time(), save_every)


def state_of(actor):
    return actor._host.state


@pytest.mark.parametrize("save_every", [2, 1000])
def test_restarted_syncer_has_the_state_of_the_one_before(tmp_path, save_every):
    job = make_job(merge=decoupled.quorum(2, grace=60.0))
    first = open_syncer(job, tmp_path, save_every)
    for learner in range(3):
        first.handle(Join(0.0, learner, 7))
    waiting = threading.Thread(
        target=first.handle, args=(contribution(0, 1),), daemon=True
    )
    waiting.start()
    answer = first.handle(contribution(1, 1, 3.0))
    assert answer.reply.version == 1
    threading.Thread(
        target=first.handle, args=(contribution(2, 1),), daemon=True
    ).start()
    while not state_of(first).pending:
        time.sleep(0.01)
    with first._condition:  # Held until the checkpoint of the last event has started.
        first._storage._manager.wait_until_finished()
    first._lock.release()  # As at the end of its process.
    second = open_syncer(job, tmp_path, save_every)
    jax.tree.map(np.testing.assert_array_equal, state_of(first), state_of(second))
    assert second.progress(0) == first.progress(0)
    # The acknowledgement was lost: the learner repeats its call.
    repeated = second.handle(contribution(1, 1, 3.0))
    assert repeated.reply.kind == "model" and state_of(second).totals.duplicates == 1
    assert state_of(second).totals.steps == 8


def test_call_of_a_removed_learner_ends(tmp_path):
    actor = open_syncer(make_job(merge=decoupled.quorum(2, 60.0)), tmp_path, 1000)
    for learner in range(3):
        actor.handle(Join(0.0, learner, 7))
    answers = []
    call = threading.Thread(
        target=lambda: answers.append(actor.handle(contribution(0, 1)))
    )
    call.start()
    while not state_of(actor).pending:
        time.sleep(0.01)
    actor.remove(0)
    call.join(30)
    assert [answer.reply.kind for answer in answers] == ["rejoin"]


def test_second_syncer_of_a_directory_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("localsgd_jax.decoupled.ray_actors._LOCK_SECONDS", 0.0)
    first = open_syncer(make_job(), tmp_path, 1000)
    with pytest.raises(CheckpointError, match="in use"):
        open_syncer(make_job(), tmp_path, 1000)
    first.finish()
    open_syncer(make_job(), tmp_path, 1000)


def test_incomplete_record_is_left_out(tmp_path):
    job = make_job()
    log = EventLog(str(tmp_path), 0)
    log.append(Join(0.5, 0, 7))
    log.append(contribution(0, 1))
    log.close()
    (path,) = tmp_path.iterdir()
    like = payload_like(job, 0)
    events = list(read_events(str(tmp_path), like))
    assert events[0] == Join(0.5, 0, 7)
    np.testing.assert_array_equal(events[1].payload, np.ones(21, np.float32))
    path.write_bytes(path.read_bytes()[:-3])
    assert list(read_events(str(tmp_path), like)) == [Join(0.5, 0, 7)]


def test_learner_with_another_version_raises_one_line():
    expected = {"versions": {"jax": "0.10"}, "every": 4}
    found = {"versions": {"jax": "0.12"}, "every": 4}
    message = r'learner 3 does not match the job: versions.jax: "0.10" in the syncer'
    with pytest.raises(JobMismatchError, match=message):
        _check_fingerprint(3, expected, found)
