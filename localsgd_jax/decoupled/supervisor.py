"""Decoupled training on Ray: starts, watches and restarts the processes of a job."""

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check, check_int, check_number, check_type
from localsgd_jax.decoupled.fragments import join
from localsgd_jax.decoupled.history import History, history_columns
from localsgd_jax.decoupled.job import Job, check_job, shared_params
from localsgd_jax.decoupled.ray_actors import (
    JobMismatchError,
    LearnerActor,
    SyncerActor,
)
from localsgd_jax.decoupled.ray_backend import (
    actor_options,
    check_room,
    connect,
    import_ray,
    kill_process,
)
from localsgd_jax.training.progress import progress_bar

_POLL_SECONDS = 0.1


def run(
    job: Job,
    learners: int | tuple[int, int],
    *,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
    checkpoint: str | None = None,
    save_every: int = 200,
    restarts: int = 3,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
    progress: bool | None = None,
    record: Callable[[dict], None] | None = None,
) -> tuple[PyTree, History]:
    """Trains with learners in processes of their own, on Ray.

    Each learner and each syncer is a Ray actor. A learner that is lost is replaced. It
    joins with the current model and a new optimizer state, and other learners compute
    the rounds that it held. A learner is also replaced if it contributes nothing for
    `timeout` seconds. A syncer that is lost, or does not answer for `timeout` seconds,
    is restarted and restores its last checkpoint and all later events.

    Args:
      job: description of the job.
      learners: number of learners, or the least and the greatest number. The job
        starts with any number; learners beyond the room in the cluster start when there
        is room.
      address: address of a Ray cluster or "auto"; None starts Ray on this machine,
        on the loopback interface.
      resources: Ray resources of each learner, such as `{"GPU": 1}`; None for
        `{"CPU": 1}`.
      checkpoint: directory of checkpoints and events, on a file system of all nodes
        that may run a syncer. A job in the directory is continued, also with another
        number of learners. None for a temporary directory.
      save_every: events of a syncer from one checkpoint to the next.
      restarts: number of times in a row that a learner may fail without contributing;
        then it is left out.
      timeout: seconds without contribution or answer after which a process is replaced;
        longer than compilation and a round take.
      environment: environment variables of learners and syncers.
      progress: whether to show a progress bar; None: if tqdm is installed.
      record: `record(row)`, called for each merge with its row of the history.

    Returns:
      The model and the history; see the page on history columns.

    Raises:
      ImportError: if Ray or Orbax is not installed.
      TypeError: if an argument has the wrong type.
      ValueError: if a number is out of range.
      ConnectionError: if there is no cluster at the address.
      RuntimeError: if the cluster lacks room for the least number of learners, so many
        are left out that fewer remain, or a learner has another model or version.

    Example:
      >>> def train(job):
      ...     return run(job, learners=4, checkpoint="run")
    """
    check_job("run", job)
    least, most = _learner_range(learners)
    options = {
        "address": (address, str, type(None)),
        "resources": (resources, Mapping, type(None)),
        "checkpoint": (checkpoint, str, os.PathLike, type(None)),
        "environment": (environment, Mapping, type(None)),
        "progress": (progress, bool, type(None)),
        "record": (record, Callable, type(None)),
    }
    for name, (value, *types) in options.items():
        check_type(f"run({name})", name, value, *types)
    check(address != "", "run(address)", "it must not be empty", repr(address))
    for value in (environment or {}).values():
        check_type("run(environment)", "each value", value, str)
    check_int("run(save_every)", "it", save_every, 1)
    check_int("run(restarts)", "it", restarts, 0)
    check_number("run(timeout)", "timeout", timeout, above=0)
    resources = {"CPU": 1.0} if resources is None else dict(resources)
    ray = import_ray("run")
    started = connect(ray, address, most + job.fragments + 1)
    directory = checkpoint or tempfile.mkdtemp(prefix="decoupled-")
    try:
        check_room(ray, least, resources)
        settings = _Settings(
            ray, job, least, most, resources, directory, save_every, restarts, timeout
        )
        with contextlib.closing(_Supervisor(settings, environment or {})) as supervisor:
            with progress_bar(progress, job.steps, ()) as bar:
                return supervisor.run(bar, record or (lambda row: None))
    finally:
        if checkpoint is None:
            shutil.rmtree(directory, ignore_errors=True)
        if started:
            ray.shutdown()


class _Settings:
    """Arguments of a run."""

    def __init__(
        self,
        ray: ModuleType,
        job: Job,
        least: int,
        most: int,
        resources: dict[str, float],
        directory: str,
        save_every: int,
        restarts: int,
        timeout: float,
    ) -> None:
        """Stores the arguments."""
        self.ray, self.job, self.least, self.most = ray, job, least, most
        self.resources, self.directory = resources, directory
        self.save_every, self.restarts, self.timeout = save_every, restarts, timeout


class _Slot:
    """A learner index with its current actor.

    Attributes:
      actor: the actor, None if the learner is left out or has ended.
      call: its training.
      process: node and process id; None until it has started.
      active: time of the last sign of activity.
      failures: failures in a row.
    """

    def __init__(self) -> None:
        """Starts without an actor."""
        self.actor: Any = None
        self.call: Any = None
        self.pending: Any = None
        self.process: tuple[str, int] | None = None
        self.active, self.failures = time.monotonic(), 0


class _Watch:
    """A syncer with its process and the open question for rows."""

    def __init__(self, actor: Any) -> None:
        """Stores the actor."""
        self.actor = actor
        self.process: tuple[str, int] | None = None
        self.question: Any = None
        self.asked, self.merge, self.done = 0.0, 0, False


class _Supervisor:
    """Actors of a run."""

    def __init__(self, settings: _Settings, environment: Mapping[str, str]) -> None:
        """Starts the syncers."""
        self._settings, self._rows = settings, []
        ray, job = settings.ray, settings.job
        runtime = {"env_vars": dict(environment)} if environment else None
        self._job = ray.put(job)
        syncer = ray.remote(SyncerActor).options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2 * settings.most + 8,
            scheduling_strategy="SPREAD",
            runtime_env=runtime,
        )
        origin = time.time()
        self._watches = [
            _Watch(
                syncer.remote(
                    self._job, f, settings.directory, origin, settings.save_every
                )
            )
            for f in range(job.fragments)
        ]
        self._learner = ray.remote(LearnerActor).options(
            runtime_env=runtime,
            max_concurrency=2,
            **actor_options(settings.resources),
        )
        self._slots = [_Slot() for _ in range(settings.most)]
        self._last_error = ""

    def run(self, bar: Any, record: Callable) -> tuple[PyTree, History]:
        """Starts the learners and watches all processes until the job is done."""
        ray, watches = self._settings.ray, self._watches
        ray.get([watch.actor.remove_all.remote() for watch in watches])
        steps = 0
        for index in range(len(self._slots)):
            self._start(index)
        while not watches[0].done:
            rows = self._new_rows()
            for row in rows:
                record(row)
            total = max([steps, *(r["steps"] for r in rows if r["fragment"] == 0)])
            bar.update(total - steps, [_bar_row(row) for row in rows])
            steps = total
            self._watch_learners()
        calls = [slot.call for slot in self._slots if slot.actor is not None]
        ray.wait(calls, num_returns=len(calls), timeout=5) if calls else None
        models = ray.get([watch.actor.finish.remote() for watch in watches])
        for row in self._new_rows(ask=True):
            record(row)
        self._rows.sort(key=lambda row: row["seconds"])
        params = join(shared_params(self._settings.job), *models)
        return params, history_columns(self._rows, self._settings.most)

    def close(self) -> None:
        """Ends all actors."""
        actors = [slot.actor for slot in self._slots] + [w.actor for w in self._watches]
        for actor in filter(None, actors):
            with contextlib.suppress(Exception):
                self._settings.ray.kill(actor)

    def _new_rows(self, ask: bool = False) -> list[dict]:
        """Returns rows of new merges; replaces syncers that do not answer."""
        ray, found = self._settings.ray, []
        for watch in self._watches:
            if watch.question is None or ask:
                watch.question = watch.actor.progress.remote(watch.merge)
                watch.asked = time.monotonic()
            wait = 10.0 if ask else _POLL_SECONDS
            ready, _ = ray.wait([watch.question], timeout=wait)
            if ready:
                rows, watch.done = ray.get(watch.question)
                watch.question = None
                found += rows
                watch.merge = max([watch.merge, *(row["merge"] for row in rows)])
                if watch.process is None:
                    watch.process = ray.get(watch.actor.process.remote())
            elif time.monotonic() - watch.asked > self._settings.timeout:
                self._replace_syncer(watch)
        for learner in {learner for row in found for learner in row["learners"]}:
            if learner < len(self._slots):
                self._slots[learner].active = time.monotonic()
                self._slots[learner].failures = 0
        self._rows += found
        if not found:
            time.sleep(_POLL_SECONDS)
        return found

    def _replace_syncer(self, watch: _Watch) -> None:
        """Kills a syncer that does not answer; Ray restarts it."""
        if watch.process is not None:
            kill_process(self._settings.ray, *watch.process)
        watch.process, watch.asked = None, time.monotonic()

    def _start(self, index: int) -> None:
        """Starts the actor of a learner."""
        slot = self._slots[index]
        syncers = [watch.actor for watch in self._watches]
        slot.actor = self._learner.remote()
        slot.pending, slot.process = slot.actor.process.remote(), None
        slot.call = slot.actor.train.remote(self._job, syncers, index)

    def _watch_learners(self) -> None:
        """Replaces learners that have failed or contribute nothing."""
        ray, settings = self._settings.ray, self._settings
        for index, slot in enumerate(self._slots):
            if slot.actor is None:
                continue
            if slot.process is None and ray.wait([slot.pending], timeout=0)[0]:
                slot.active = time.monotonic()
                with contextlib.suppress(ray.exceptions.RayError):
                    slot.process = ray.get(slot.pending)
            if ray.wait([slot.call], timeout=0)[0]:
                if (error := self._error(slot)) is None:
                    slot.actor = None
                else:
                    self._replace(index, error)
            elif slot.process and time.monotonic() - slot.active > settings.timeout:
                kill_process(ray, *slot.process)
                self._replace(index, f"no contribution for {settings.timeout:g} s")

    def _error(self, slot: _Slot) -> str | None:
        """Returns why a learner has ended; None if the job is done for it."""
        ray = self._settings.ray
        try:
            ray.get(slot.call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, JobMismatchError):
                raise RuntimeError(str(error.cause)) from None
            return f"{type(error.cause).__name__}: {error.cause}"
        except ray.exceptions.RayError as error:
            return str(error).strip().splitlines()[0]
        return None

    def _replace(self, index: int, error: str) -> None:
        """Removes a learner from the syncers and starts it again."""
        slot, settings = self._slots[index], self._settings
        ray, self._last_error = settings.ray, error
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(slot.actor)
        for watch in self._watches:
            watch.actor.remove.remote(index)
        slot.actor, slot.failures = None, slot.failures + 1
        slot.active = time.monotonic()
        if slot.failures <= settings.restarts:
            self._start(index)
            return
        warnings.warn(
            f"run(): learner {index} is left out after {slot.failures} failures in a "
            f"row; the last one: {error}",
            stacklevel=2,
        )
        remaining = sum(other.actor is not None for other in self._slots)
        if remaining < settings.least:
            raise RuntimeError(
                f"run(learners): {settings.least} are needed, {remaining} remain; "
                f"learner {index} failed {slot.failures} times in a row: {error}"
            )


def _learner_range(learners: int | tuple[int, int]) -> tuple[int, int]:
    """Returns the least and the greatest number of learners."""
    least, most = learners if isinstance(learners, tuple) else (learners, learners)
    check_int("run(learners)", "it", least, 1)
    check_int("run(learners)", "the greatest number", most, 1)
    text = "the greatest number must be at least the least number"
    check(most >= least, "run(learners)", text, learners)
    return least, most


def _bar_row(row: dict) -> dict:
    """Returns a row in the form of a progress bar."""
    return row | {"round": row["merge"], "bytes": row["bytes_received"]}
