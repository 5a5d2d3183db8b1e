"""Actors of a decoupled job on Ray: syncers and learners."""

import itertools
import json
import os
import threading
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from localsgd_jax.checkpoint.errors import CheckpointError
from localsgd_jax.checkpoint.lock import DirectoryLock
from localsgd_jax.decoupled.event_log import (
    EventLog,
    fragment_directory,
    payload_like,
    read_events,
)
from localsgd_jax.decoupled.events import Event, Leave, Reply, Tick
from localsgd_jax.decoupled.job import Job, fingerprint
from localsgd_jax.decoupled.learner import (
    Answer,
    Receive,
    Send,
    learner_program,
    make_learner_functions,
)
from localsgd_jax.decoupled.ray_backend import import_ray
from localsgd_jax.decoupled.stored_state import StateStorage
from localsgd_jax.decoupled.syncer import make_syncer
from localsgd_jax.decoupled.syncer_host import SyncerHost
from localsgd_jax.decoupled.syncer_state import is_done
from localsgd_jax.distributed.launcher.ports import free_port
from localsgd_jax.distributed.mismatches import describe_mismatches

_LOCK_SECONDS = 30.0


class SyncerActor:
    """Syncer of a fragment in a process of its own.

    Each event is in the log before it is applied. A restarted process restores the last
    checkpoint and applies the events after it, so that nothing is lost. A learner whose
    call is repeated is answered as if it had been called once.
    """

    def __init__(
        self, job: Job, fragment: int, directory: str, origin: float, save_every: int
    ) -> None:
        """Restores the state.

        Args:
          job: description of the job.
          fragment: index of the fragment.
          directory: directory of the job.
          origin: time of the start of the run, in seconds since the epoch.
          save_every: events between two checkpoints.
        """
        directory = fragment_directory(directory, fragment)
        os.makedirs(directory, exist_ok=True)
        self._lock = _lock(directory)
        self._job, self._fragment, self._save_every = job, fragment, save_every
        self._storage = StateStorage(os.path.join(directory, "checkpoints"))
        syncer = make_syncer(job, fragment)
        self._saved, state = self._storage.restore(syncer.init)
        self._host = SyncerHost(syncer, state, lambda event: self._log.append(event))
        self._rows_path = os.path.join(directory, "history.jsonl")
        self._host.rows = _read_rows(self._rows_path, state.version)
        count = self._saved
        for event in read_events(directory, payload_like(job, fragment), count):
            self._host.replay(event)
            count += 1
        self._log = EventLog(directory, count)
        self._rows_file = open(self._rows_path, "a", buffering=1)
        # Hosts share the wall clock only; the events of an actor follow its own clock.
        passed = max(time.time() - origin, self._host.last_time)
        self._origin = time.monotonic() - passed
        self._condition = threading.Condition()
        self._answers: dict[tuple[int, int], Answer] = {}
        threading.Thread(target=self._watch_deadlines, daemon=True).start()

    def process(self) -> tuple[str, int]:
        """Returns the node and the process id."""
        ray = import_ray("run")
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def fingerprint(self) -> dict:
        """Returns the fingerprint of the job here."""
        return fingerprint(self._job)

    def remove(self, learner: int) -> None:
        """Removes a learner that has ended."""
        with self._condition:
            self._apply(Leave(0.0, learner))

    def remove_all(self) -> None:
        """Removes all members; a run that was killed leaves some."""
        with self._condition:
            for learner in list(self._host.state.members):
                self._apply(Leave(0.0, learner))

    def handle(self, event: Any) -> Answer | None:
        """Applies an event; returns when there is a reply.

        Args:
          event: from a learner; its time is set here.
        """
        key = event.learner, event.session
        with self._condition:
            self._answers.pop(key, None)
            self._apply(event)
            if isinstance(event, Leave):
                return None
            # A learner that is removed gets no reply; its call must not stay open.
            self._condition.wait_for(
                lambda: key in self._answers or not self._is_member(*key)
            )
            rejoin = Reply(*key, "rejoin", self._host.state.version)
            return self._answers.get(key, Answer(rejoin))

    def progress(self, merge: int) -> tuple[list[dict], bool]:
        """Returns the rows after a merge, and whether the job is done."""
        with self._condition:
            rows = [row for row in self._host.rows if row["merge"] > merge]
            return rows, is_done(self._host.state)

    def finish(self) -> dict[str, np.ndarray]:
        """Writes a last checkpoint; returns the leaves of the fragment."""
        self.remove_all()
        with self._condition:
            self._save()
            self._storage.close()
            self._lock.release()
            return self._host.model()

    def _is_member(self, learner: int, session: int) -> bool:
        """Returns whether a membership still exists."""
        member = self._host.state.members.get(learner)
        return member is not None and member.session == session

    def _apply(self, event: Event) -> None:
        """Applies an event and stores the answers; the lock is held."""
        host, first = self._host, len(self._host.rows)
        replies = host.apply(event._replace(time=time.monotonic() - self._origin))
        if isinstance(event, Leave):
            for key in [key for key in self._answers if key[0] == event.learner]:
                del self._answers[key]
        for row in host.rows[first:]:
            self._rows_file.write(json.dumps(row) + "\n")
        if replies:
            model = host.model() if any(r.kind == "model" for r in replies) else None
            for reply in replies:
                answer = Answer(reply, model if reply.kind == "model" else None)
                self._answers[reply.learner, reply.session] = answer
        if self._log.count - self._saved >= self._save_every:
            self._save()
        self._condition.notify_all()

    def _save(self) -> None:
        """Starts to write a checkpoint."""
        if self._log.count > self._saved:
            self._storage.save(self._log.count, self._host.state)
            self._saved = self._log.count

    def _watch_deadlines(self) -> None:
        """Applies a Tick at each deadline."""
        with self._condition:
            while True:
                now = time.monotonic() - self._origin
                deadline = self._host.state.deadline
                if deadline <= now:
                    self._apply(Tick(0.0))
                    continue
                self._condition.wait(min(deadline - now, 60.0))


def _lock(directory: str) -> DirectoryLock:
    """Locks the directory of a fragment; a process that was killed may still hold it.

    Raises:
      CheckpointError: if another one holds it for longer than `_LOCK_SECONDS`.
    """
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return DirectoryLock(directory)
        except CheckpointError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


class LearnerActor:
    """One process of a learner.

    The processes of a learner compute the same program on their common devices. The
    first one, the leader, sends the events; the others get the answers from it.
    """

    def __init__(self) -> None:
        """Starts without answers."""
        self._condition = threading.Condition()
        self._answers: dict[int, tuple[Answer, int]] = {}
        self._port = 0

    def process(self) -> tuple[str, int]:
        """Returns the node and the process id."""
        ray = import_ray("run")
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def coordinator(self) -> str:
        """Returns an address of this node for `jax.distributed`."""
        with self._condition:
            self._port = self._port or free_port()
        return f"{import_ray('run').util.get_node_ip_address()}:{self._port}"

    def answer(self, number: int) -> Answer:
        """Returns an answer that the leader has received; waits for it.

        Args:
          number: 0, 1, … in the order of reception.
        """
        with self._condition:
            self._condition.wait_for(lambda: number in self._answers)
            answer, readers = self._answers.pop(number)
            if readers > 1:
                self._answers[number] = answer, readers - 1
            return answer

    def train(
        self, job: list, syncers: list, learner: int, leader: Any, rank: int, count: int
    ) -> None:
        """Trains until the job is done.

        Args:
          job: reference to the description of the job, which may hold arrays: they
            must not exist before the processes are joined.
          syncers: actor of each fragment.
          learner: index of the learner.
          leader: actor of the first process; None in the first process.
          rank: index of the process.
          count: number of processes of the learner.

        Raises:
          JobMismatchError: if this process has another model or version.
        """
        ray = import_ray("run")
        if count > 1:
            address = ray.get(leader.coordinator.remote()) if rank else None
            jax.distributed.initialize(address or self.coordinator(), count, rank)
        description: Job = ray.get(job[0])
        expected = ray.get(syncers[0].fingerprint.remote())
        _check_fingerprint(learner, expected, fingerprint(description))
        functions = make_learner_functions(description)
        program, answer = learner_program(functions, learner, time.time_ns()), None
        calls: dict[int, Any] = {}
        for number in itertools.count():
            receive = _next_receive(program, answer, [] if rank else syncers, calls)
            if receive is None:
                return
            if rank:
                answer = ray.get(leader.answer.remote(number))
                continue
            answer = ray.get(calls.pop(receive.fragment))
            if count > 1:
                with self._condition:
                    self._answers[number] = answer, count - 1
                    self._condition.notify_all()


def _next_receive(
    program: Generator[Any, Any, None],
    answer: Answer | None,
    syncers: list,
    calls: dict[int, Any],
) -> Receive | None:
    """Runs the program of a learner up to its next wait.

    Args:
      program: the program.
      answer: answer to the last `Receive`.
      syncers: actors that receive its events; empty if another process sends them.
      calls: open call of each fragment, changed in place.

    Returns:
      What it waits for; None at its end.
    """
    while True:
        try:
            effect = program.send(answer)
        except StopIteration:
            return None
        answer = None
        if isinstance(effect, Receive):
            return effect
        if isinstance(effect, Send) and syncers:
            call = syncers[effect.fragment].handle.remote(effect.event)
            calls[effect.fragment] = call


class JobMismatchError(RuntimeError):
    """A learner has another model or another version than the syncer."""


def _check_fingerprint(learner: int, expected: dict, found: dict) -> None:
    """Raises a JobMismatchError that names the differences."""
    if expected == found:
        return
    lines = describe_mismatches({0: expected, 1: found})
    text = "; ".join(lines).replace("process 0", "the syncer")
    text = text.replace("process 1", f"learner {learner}")
    raise JobMismatchError(f"run(): learner {learner} does not match the job: {text}")


def _read_rows(path: str, version: int) -> list[dict]:
    """Reads the rows of the history up to a merge."""
    if not os.path.exists(path):
        return []
    rows = {}
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):
                row = json.loads(line)
                rows[row["merge"]] = row | {"learners": tuple(row["learners"])}
    return [row for merge, row in sorted(rows.items()) if merge <= version]
