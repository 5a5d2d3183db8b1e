"""A run on more than one process: how they find each other, and whose data is whose."""

import atexit
import concurrent.futures
import importlib.metadata
import math
import numbers
import os
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np

# JAX has no public names for its detection of clusters, for the client of its
# coordination service, and for whether it has started.
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax._src.xla_bridge import backends_are_initialized

from localsgd_jax import agreement, checks, rollcall
from localsgd_jax.agreement import JobError
from localsgd_jax.apart import Apart, in_background
from localsgd_jax.base import Cluster
from localsgd_jax.processes import own_rows

LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "[::1]"}
PACKAGES = ("localsgd-jax", "jax", "jaxlib", "optax", "numpy")
SETTINGS = (
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
)
# Process 0 holds the service without which the others cannot say what went wrong.
LAST_WORDS = 2.0
LONGEST = 1e6


class Place(NamedTuple):
    """Where a process stands in its job.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: number of this one.
      devices: local numbers of the accelerators that it uses; None for all.
    """

    coordinator: str
    processes: int
    process: int
    devices: list[int] | None = None


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    bind: str | None = None,
    config: Mapping[str, object] | None = None,
    timeout: float = 300,
    heartbeat: int = 100,
    recoverable: bool = False,
) -> int:
    """Joins the processes of a job, if there are several; to be called first.

    Without addresses they come from `localsgd launch`, from the variables
    LOCALSGD_COORDINATOR, LOCALSGD_PROCESSES and LOCALSGD_PROCESS, or from where JAX
    finds them: SLURM, Open MPI, Kubernetes, TPU pods. A process that is alone goes on
    as if nothing had been called, so a program may always begin with it.

    All processes meet at the coordinator's port before JAX connects, and compare the
    versions in use, the settings of JAX that change programs, and `config`. A process
    that is missing, too many, of another job or different makes all of them raise.
    From then on an exception that nobody catches ends its process at once, without
    the wait for the others in which JAX would kill it with SIGABRT; and SIGTERM does
    what it does elsewhere, since JAX's preemption service is turned off.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: number of this one, from 0.
      bind: HOST:PORT at which process 0 listens; if None the loopback interface for
        a coordinator on this machine, and else all interfaces.
      config: what must be the same everywhere, such as the options of the program.
      timeout: seconds to wait for a process that is late, here, later and at the end.
      heartbeat: seconds after which a process that is not heard of counts as dead.
      recoverable: whether the others survive the death of a process other than 0,
        which then waits for them at its end.

    Returns:
      How many processes there are.

    Raises:
      JobError: if the processes do not come together; it names the difference.
      TypeError: if a number is none, or `config` holds what JSON cannot.
      ValueError: if only some of the three are given, or a number is out of range.
      RuntimeError: if JAX has started already.

    Example:
      >>> import localsgd_jax as lsgd
      >>> lsgd.initialize()
      1
    """
    checks.integer("initialize(heartbeat)", "heartbeat", heartbeat, 1)
    _check_timeout(timeout)
    plain = agreement.plain("initialize(config)", config or {})
    place = _place(coordinator, processes, process, timeout)
    if place is None or place.processes == 1:
        return 1
    if jax.distributed.is_initialized():
        return jax.process_count()
    if backends_are_initialized():
        raise RuntimeError(
            "initialize(): it must come before all that makes JAX look for its "
            "devices: before arrays, meshes, and rules such as diloco()"
        )
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_enable_recoverability", recoverable)
    agreement.TIMEOUT = timeout
    door = bind or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or _door(place)
    facts = _facts(place, plain)
    if place.process == 0:
        rollcall.hold(door, facts, place.processes, timeout)
    else:
        rollcall.attend(place.coordinator, facts, place.process, timeout)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(timeout),
            heartbeat_timeout_seconds=heartbeat,
            coordinator_bind_address=door,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise JobError(
            f"initialize(): JAX cannot serve on {door} or reach {place.coordinator}: "
            f"{reason}"
        ) from error
    _leave_on_errors()
    if recoverable:
        over = threading.Event()
        # From Python 3.12 on, a program that ends starts no threads any more.
        others = in_background(_await_others, over, list(range(place.processes)))
        atexit.register(_leave_last, over, others, timeout)
    return place.processes


def own_workers(cluster: Cluster | Apart) -> np.ndarray:
    """Returns the workers whose data this process feeds.

    Batches may have rows for all K workers, of which each process takes its own, or
    only for these, in this order.

    Args:
      cluster: where the workers live, or what `apart` has made of them; its `here`
        counts from 0 in every process.

    Returns:
      Their numbers, ascending; all K where there is one process.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1),
      ...                            rule=lsgd.average())
      >>> own_workers(lsgd.simulate(algorithm, workers=3))
      array([0, 1, 2])
    """
    if isinstance(cluster, Apart):
        return np.flatnonzero(np.array(cluster.owners) == jax.process_index())
    row = cluster.put(jax.ShapeDtypeStruct((cluster.workers,), np.float32))
    return own_rows(row.sharding, cluster.workers)


def leave(code: int) -> None:
    """Ends a process that has failed, if it is one of several.

    `sys.exit` would wait for the others at the door, until JAX kills them all.

    Args:
      code: for whoever started the process.
    """
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(LAST_WORDS)
    os._exit(code)


def _place(
    coordinator: str | None, processes: int | None, process: int | None, timeout: float
) -> Place | None:
    """Finds out where this process stands; None if it is alone."""
    if coordinator is not None and processes is not None and process is not None:
        return _checked("initialize()", coordinator, processes, process)
    given = (coordinator, processes, process)
    if given != (None, None, None):
        raise ValueError(
            "initialize(coordinator, processes, process): all three or none are "
            f"needed, got {given}"
        )
    names = [f"LOCALSGD_{x}" for x in ("COORDINATOR", "PROCESSES", "PROCESS")]
    if any(name in os.environ for name in names):
        try:
            return _checked(", ".join(names), os.environ[names[0]], *_whole(names[1:]))
        except KeyError as error:
            raise ValueError(
                f"initialize(): all of {', '.join(names)} are needed, and {error} is "
                "not set"
            ) from None
    address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        None,
        None,
        None,
        None,
        math.ceil(timeout),
    )
    if address is None or count is None or number is None:
        return None
    return Place(address, count, number, devices and list(devices))


def _whole(names: list[str]) -> list[int]:
    """Reads whole numbers from the environment."""
    for name in names:
        if not os.environ[name].isdecimal():
            raise ValueError(
                f"initialize(): {name} must be a whole number, got {os.environ[name]!r}"
            )
    return [int(os.environ[name]) for name in names]


def _checked(call: str, coordinator: str, processes: int, process: int) -> Place:
    """Refuses numbers that no job has."""
    rollcall.split(coordinator)
    checks.integer(call, "the number of processes", processes, 1)
    checks.integer(call, "the number of this process", process, 0)
    if process >= processes:
        raise ValueError(
            f"{call}: processes count from 0 to {processes - 1}, got {process}"
        )
    return Place(coordinator, processes, process)


def _check_timeout(timeout: float) -> None:
    """Refuses what is no time to wait."""
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
        raise TypeError(f"initialize(timeout): it must be a number, got {timeout!r}")
    if not 0 < timeout <= LONGEST:
        raise ValueError(
            f"initialize(timeout): it must be positive and at most {LONGEST:g} s, got "
            f"{timeout!r}"
        )


def _door(place: Place) -> str:
    """Returns where process 0 listens: to this machine alone if all are here."""
    host, port = rollcall.split(place.coordinator)
    return f"{LOOPBACK.get(host, '[::]')}:{port}"


def _facts(place: Place, config: Mapping) -> dict:
    """Returns what must be the same in all processes."""
    slurm = [os.environ.get(f"SLURM_{x}", "") for x in ("JOB_ID", "STEP_ID")]
    return {
        "job": os.environ.get("LOCALSGD_JOB") or ".".join(slurm).strip("."),
        "processes": place.processes,
        "version": {package: version(package) for package in PACKAGES},
        "setting": {name: str(jax.config.values[name]) for name in SETTINGS},
        "config": config,
    }


def version(package: str) -> str:
    """Returns the installed version of a package, or says that it is not installed.

    Args:
      package: name of the distribution.

    Returns:
      The version.

    Example:
      >>> version("no-such-package")
      'not installed'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _await_others(over: threading.Event, everyone: list[int]) -> None:
    """Waits until the others have come to their ends, once this process is over."""
    over.wait()
    global_state.client.get_live_nodes(everyone)


def _leave_last(over: threading.Event, others: Future, patience: float) -> None:
    """Ends process 0 after the others, whom JAX kills when its service ends."""
    if global_state.client is None:  # The program has left by itself.
        return
    if jax.process_index() == 0:
        over.set()
        concurrent.futures.wait([others], patience)
    jax.distributed.shutdown()


def _leave_on_errors() -> None:
    """Makes an exception that nobody catches end the process at once."""
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        before(kind, error, trace)
        leave(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook
