"""Decoupled training on Ray: starts, watches and restarts the processes of a job."""

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

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
    placement_groups,
    placements,
)
from localsgd_jax.training.progress import progress_bar

_POLL_SECONDS = 0.1
_SILENCE_SECONDS = 1.0  # A syncer answers within it unless it is lost or stopped.


def run(
    job: Job,
    learners: int | tuple[int, int],
    *,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
    processes: int = 1,
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
      resources: Ray resources of each process of a learner, such as `{"GPU": 1}`; None
        for `{"CPU": 1}`.
      processes: processes of each learner, which `jax.distributed` joins, such as one
        for each host of a TPU slice. `Job.cluster` places its workers on the devices of
        all of them.
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
        are left out that fewer remain, a learner has another model or version, or
        another job uses the directory.

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
    check_int("run(processes)", "it", processes, 1)
    check_number("run(timeout)", "timeout", timeout, above=0)
    resources = {"CPU": 1.0} if resources is None else dict(resources)
    ray = import_ray("run")
    started = connect(ray, address, most * processes + job.fragments + 1)
    directory = checkpoint or tempfile.mkdtemp(prefix="decoupled-")
    try:
        check_room(ray, least, processes, resources)
        settings = _Settings(
            ray=ray,
            job=job,
            least=least,
            most=most,
            resources=resources,
            processes=processes,
            directory=directory,
            save_every=save_every,
            restarts=restarts,
            timeout=timeout,
        )
        with contextlib.closing(_Supervisor(settings, environment or {})) as supervisor:
            with progress_bar(progress, job.steps, ()) as bar:
                return supervisor.run(bar, record or (lambda row: None))
    finally:
        if checkpoint is None:
            shutil.rmtree(directory, ignore_errors=True)
        if started:
            ray.shutdown()


class _Settings(NamedTuple):
    """Arguments of a run."""

    ray: ModuleType
    job: Job
    least: int
    most: int
    resources: dict[str, float]
    processes: int
    directory: str
    save_every: int
    restarts: int
    timeout: float


class _Slot:
    """A learner index with its current actors.

    Attributes:
      actors: an actor for each process, empty if the learner is left out or has ended.
      calls: their training.
      pending: their open questions for node and process id.
      processes: node and process id of each; empty until all have started.
      active: time of the last sign of activity.
      failures: failures in a row.
    """

    def __init__(self) -> None:
        """Starts without actors."""
        self.actors: list = []
        self.calls: list = []
        self.pending: list = []
        self.processes: list[tuple[str, int]] = []
        self.active, self.failures = time.monotonic(), 0


class _Watch:
    """A syncer with its process, and the open questions for rows and process."""

    def __init__(self, actor: Any) -> None:
        """Stores the actor."""
        self.actor = actor
        self.process: tuple[str, int] | None = None
        self.questions: list = []
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
        self._learner = ray.remote(LearnerActor)
        self._options = actor_options(settings.resources) | {
            "runtime_env": runtime,
            "max_concurrency": settings.processes + 2,
        }
        self._slots = [_Slot() for _ in range(settings.most)]
        self._groups = placement_groups(
            ray, settings.most, settings.processes, settings.resources
        )

    def run(self, bar: Any, record: Callable) -> tuple[PyTree, History]:
        """Starts the learners and watches all processes until the job is done."""
        ray, watches = self._settings.ray, self._watches
        try:
            ray.get([watch.actor.remove_all.remote() for watch in watches])
        except ray.exceptions.RayActorError as error:
            line = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"run(): a syncer cannot start: {line}") from None
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
        calls = [call for slot in self._slots if slot.actors for call in slot.calls]
        ray.wait(calls, num_returns=len(calls), timeout=5) if calls else None
        models = ray.get([watch.actor.finish.remote() for watch in watches])
        for row in self._new_rows(ask=True):
            record(row)
        self._rows.sort(key=lambda row: row["seconds"])
        params = join(shared_params(self._settings.job), *models)
        return params, history_columns(self._rows, self._settings.most)

    def close(self) -> None:
        """Ends all actors."""
        actors = [actor for slot in self._slots for actor in slot.actors]
        for actor in actors + [watch.actor for watch in self._watches]:
            with contextlib.suppress(Exception):
                self._settings.ray.kill(actor)

    def _new_rows(self, ask: bool = False) -> list[dict]:
        """Returns rows of new merges; replaces syncers that do not answer."""
        ray, found = self._settings.ray, []
        for watch in self._watches:
            if not watch.questions or ask:
                # Ray may have restarted the process since the last question.
                progress = watch.actor.progress.remote(watch.merge)
                watch.questions = [progress, watch.actor.process.remote()]
                watch.asked = time.monotonic()
            wait = 10.0 if ask else _POLL_SECONDS
            _, missing = ray.wait(watch.questions, num_returns=2, timeout=wait)
            if not missing:
                (rows, watch.done), watch.process = ray.get(watch.questions)
                watch.questions = []
                found += rows
                watch.merge = max([watch.merge, *(row["merge"] for row in rows)])
            elif time.monotonic() - watch.asked > _SILENCE_SECONDS:
                self._wait_for_syncer(watch)
        for learner in {learner for row in found for learner in row["learners"]}:
            if learner < len(self._slots):
                self._slots[learner].active = time.monotonic()
                self._slots[learner].failures = 0
        self._rows += found
        if not found:
            time.sleep(_POLL_SECONDS)
        return found

    def _wait_for_syncer(self, watch: _Watch) -> None:
        """Replaces a syncer that does not answer for too long.

        The time does not count for learners, which cannot contribute.
        """
        now = time.monotonic()
        for slot in self._slots:
            slot.active = now
        if now - watch.asked > self._settings.timeout:
            self._replace_syncer(watch)

    def _replace_syncer(self, watch: _Watch) -> None:
        """Kills a syncer that does not answer; Ray restarts it."""
        if watch.process is not None:
            kill_process(self._settings.ray, *watch.process)
        watch.process, watch.asked = None, time.monotonic()

    def _start(self, index: int) -> None:
        """Starts the actors of a learner."""
        slot, count = self._slots[index], self._settings.processes
        syncers = [watch.actor for watch in self._watches]
        slot.actors = [
            self._learner.options(**self._options, **options).remote()
            for options in placements(self._groups[index], count)
        ]
        slot.pending, slot.processes = [a.process.remote() for a in slot.actors], []
        slot.calls = [
            actor.train.remote(
                [self._job],
                syncers,
                index,
                slot.actors[0] if rank else None,
                rank,
                count,
            )
            for rank, actor in enumerate(slot.actors)
        ]

    def _watch_learners(self) -> None:
        """Replaces learners that have failed or contribute nothing."""
        ray, settings = self._settings.ray, self._settings
        for index, slot in enumerate(self._slots):
            if not slot.actors:
                continue
            count = len(slot.actors)
            if not slot.processes:
                _, starting = ray.wait(slot.pending, num_returns=count, timeout=0)
                slot.active = slot.active if starting else time.monotonic()
                with contextlib.suppress(ray.exceptions.RayError):
                    slot.processes = [] if starting else ray.get(slot.pending)
            ended, training = ray.wait(slot.calls, num_returns=count, timeout=0)
            errors = list(filter(None, map(self._error, ended)))
            if errors:
                self._replace(index, errors[0])
            elif not training:
                slot.actors = []
            elif slot.processes and time.monotonic() - slot.active > settings.timeout:
                for process in slot.processes:
                    kill_process(ray, *process)
                self._replace(index, f"no contribution for {settings.timeout:g} s")

    def _error(self, call: Any) -> str | None:
        """Returns why the process of a learner has ended; None if the job is done."""
        ray = self._settings.ray
        try:
            ray.get(call)
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
        ray = settings.ray
        for actor in slot.actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
        for watch in self._watches:
            watch.actor.remove.remote(index)
        slot.actors, slot.failures = [], slot.failures + 1
        slot.active = time.monotonic()
        if slot.failures <= settings.restarts:
            self._start(index)
            return
        warnings.warn(
            f"run(): learner {index} is left out after {slot.failures} failures in a "
            f"row; the last one: {error}",
            stacklevel=2,
        )
        remaining = sum(bool(other.actors) for other in self._slots)
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
