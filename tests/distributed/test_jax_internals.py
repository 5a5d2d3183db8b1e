"""Private JAX names: one module uses them, and each of them works."""

import pathlib
import re

import jax
import pytest

import localsgd_jax as lsgd
from localsgd_jax.distributed import _jax_internals

PACKAGE = pathlib.Path(lsgd.__file__).parent
PRIVATE = re.compile(r"^\s*(from|import) jax(lib)?\._\w+|\bjax\._src\b", re.MULTILINE)
BARRIER_TIMEOUT = (
    "DEADLINE_EXCEEDED: Barrier timed out. Id: x::1. This usually happens because a "
    "task triggered the barrier too early or too slowly.\n# of tasks that reached the "
    "barrier: 1/3.\nThe first task at the barrier: 0. Some timed out task names:\n"
    "{names}\n\n\nRPC: /xla.coordination.CoordinationService/Barrier"
)


def test_one_module_imports_private_names():
    users = [p for p in PACKAGE.rglob("*.py") if PRIVATE.search(p.read_text())]
    assert users == [PACKAGE / "distributed" / "_jax_internals.py"]


def test_coordination_client_is_none_without_a_job():
    assert _jax_internals.coordination_client() is None


def test_process_without_a_job_is_no_coordinator():
    assert _jax_internals.is_coordinator() is False


def test_backends_are_initialized():
    jax.devices()
    assert _jax_internals.backends_are_initialized() is True


def test_no_cluster_is_detected():
    assert _jax_internals.detect_cluster(None, 1) == (None, None, None, None)


def test_config_values_of_compared_flags():
    from localsgd_jax.distributed.environment import COMPARED_JAX_FLAGS

    for name in COMPARED_JAX_FLAGS:
        assert _jax_internals.config_value(name) == jax.config.values[name]


@pytest.mark.parametrize(
    "names, missing",
    [
        ("1", [1]),
        ("12\n2", [2, 12]),
        # A full task name ends with the process index.
        ("/job:jax_worker/replica:0/task:2\n/job:jax_worker/replica:0/task:1", [1, 2]),
        ("", []),
    ],
)
def test_barrier_timeout_names_missing_processes(names, missing):
    error = RuntimeError(BARRIER_TIMEOUT.format(names=names))
    assert _jax_internals.is_deadline_exceeded(error)
    assert _jax_internals.processes_missing_at_barrier(error) == missing
