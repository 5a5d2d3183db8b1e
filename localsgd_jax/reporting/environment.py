"""Checks of an installation: versions, devices, threads, extras, two processes."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from localsgd_jax.distributed.environment import package_version
from localsgd_jax.distributed.launcher.ports import free_port

PACKAGES = ("localsgd-jax", "jax", "jaxlib", "optax", "numpy")
# Modules of the extras of `pyproject.toml`.
EXTRAS: Mapping[str, Sequence[str]] = {
    "cli": ("click", "matplotlib", "plotly", "pooch", "sklearn", "tqdm"),
    "report": ("plotly",),
    "checkpoint": ("orbax.checkpoint",),
    "data": ("grain",),
    "flax": ("flax",),
    "loggers": ("clu", "tensorboardX", "wandb"),
    "decoupled": ("orbax.checkpoint", "ray"),
}
OK, INFO, WARNING, FAILED = "ok", "info", "warning", "failed"
_TIMEOUT_SECONDS = 90.0
_PROGRAM = """
import jax
jax.config.update("jax_platforms", "cpu")
import localsgd_jax as lsgd
lsgd.initialize(timeout=60)
import jax.numpy as jnp, optax
cluster = lsgd.on_mesh(
    lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5)), lsgd.worker_mesh()
)
state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
print("mean", float(lsgd.consensus(cluster.sync(state))), flush=True)
"""
_RESULT = "mean 2.0"


class Check(NamedTuple):
    """Result of a check.

    Attributes:
      name: subject of the check.
      status: "ok", "info", "warning" or "failed".
      text: result, with a remedy for a warning or a failure.
    """

    name: str
    status: str
    text: str


def checks() -> Iterator[Check]:
    """Yields the results of all checks; the last one starts two processes.

    Yields:
      A result as soon as it is known.

    Example:
      >>> next(checks()).name
      'versions'
    """
    yield check_versions()
    yield check_devices()
    yield check_threads(
        num_cpu_devices(), available_cpus(), os.environ.get("NPROC", "")
    )
    yield from check_extras()
    yield check_two_processes()


def check_versions() -> Check:
    """Returns the versions of Python and of the packages in use."""
    found = [f"Python {sys.version.split()[0]}"]
    found += [f"{package} {package_version(package)}" for package in PACKAGES]
    return Check("versions", OK, ", ".join(found))


def check_devices() -> Check:
    """Returns the devices of JAX; fails if JAX finds none."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        return Check("devices", FAILED, str(error).splitlines()[0])
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    text = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    return Check("devices", OK, f"{devices[0].platform}: {text}")


def check_threads(num_devices: int, num_cpus: int, nproc: str) -> Check:
    """Returns whether collectives of emulated CPU devices can starve.

    Each device blocks a thread in a collective. XLA has as many threads as processors,
    or as the environment variable NPROC says. With fewer threads than devices a
    collective of JAX 0.10 ends the process after 40 seconds.

    Args:
      num_devices: number of CPU devices of this process.
      num_cpus: number of processors that this process may use.
      nproc: value of NPROC; empty if it is not set.

    Returns:
      The result.

    Example:
      >>> check_threads(num_devices=8, num_cpus=2, nproc="").status
      'warning'
    """
    threads = int(nproc) if nproc.isdecimal() and int(nproc) else num_cpus
    source = f"NPROC={nproc}" if threads != num_cpus or nproc else "processors"
    text = f"{num_cpus} processors, {num_devices} CPU devices"
    if num_devices <= max(threads, 1):
        return Check("threads", OK, f"{text}, {threads} threads ({source})")
    return Check(
        "threads",
        WARNING,
        f"{text} but {threads} threads ({source}): collectives can wait for a free "
        f"thread; set NPROC={2 * num_devices} before Python starts",
    )


def check_extras() -> list[Check]:
    """Returns for each extra whether its modules are installed."""
    found = []
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if not _is_installed(name)]
        if not missing:
            found.append(Check(f"extra {extra}", OK, "installed"))
            continue
        text = f'without {", ".join(missing)}: pip install "localsgd-jax[{extra}]"'
        found.append(Check(f"extra {extra}", INFO, text))
    return found


def check_two_processes(timeout: float = _TIMEOUT_SECONDS) -> Check:
    """Returns whether two processes on this machine can train with each other.

    Two processes connect over the loopback interface and average two workers on CPUs.

    Args:
      timeout: seconds until both are terminated.

    Returns:
      The result, with the last line of the first process that failed.
    """
    name, variables = (
        "two processes",
        {
            "LOCALSGD_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "LOCALSGD_NUM_PROCESSES": "2",
            "JAX_NUM_CPU_DEVICES": "1",
        },
    )
    with tempfile.TemporaryDirectory() as directory:
        started = [_start(directory, variables, process) for process in range(2)]
        try:
            outputs = [process.communicate(timeout=timeout) for process in started]
        except subprocess.TimeoutExpired:
            text = f"not connected within {timeout:g} s: is the loopback blocked?"
            return Check(name, FAILED, text)
        finally:
            for process in started:
                process.kill()
                process.communicate()
    for i, (process, (out, errors)) in enumerate(zip(started, outputs, strict=True)):
        # Gloo also writes to the standard output.
        if process.returncode or _RESULT not in out.splitlines():
            lines = [*out.splitlines(), *errors.splitlines()] or ["no output"]
            return Check(name, FAILED, f"process {i}: {lines[-1].strip()[:300]}")
    return Check(name, OK, "connected over 127.0.0.1 and averaged")


def num_cpu_devices() -> int:
    """Returns the number of CPU devices of this process, without making any."""
    return jax.local_device_count("cpu")


def available_cpus() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_installed(module: str) -> bool:
    """Returns whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Its package is missing.
        return False


def _start(
    directory: str, variables: Mapping[str, str], process: int
) -> subprocess.Popen:
    """Starts a process of the job of two."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        cwd=directory,
        env={**os.environ, **variables, "LOCALSGD_PROCESS_ID": str(process)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
