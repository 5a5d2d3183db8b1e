"""Daemon threads and the exit of a process."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
from harness.paths import PYTHONPATH

from localsgd_jax.distributed.background import submit_daemon
from localsgd_jax.distributed.launcher.ports import free_port


def test_future_reraises():
    with pytest.raises(ZeroDivisionError):
        submit_daemon(lambda: 1 / 0).result(timeout=10)


def test_future_result_times_out():
    with pytest.raises(TimeoutError):
        submit_daemon(threading.Event().wait, 30).result(timeout=0.05)


def test_thread_uses_x64_setting_of_caller():
    with jax.enable_x64(True):
        future = submit_daemon(lambda: jnp.zeros(()).dtype)
        assert future.result(timeout=10) == jnp.float64


def exit_code(program):
    """Returns the exit code of a Python program, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def test_exit_code_is_kept_when_an_abandoned_call_aborts():
    """The call aborts during the exit, as one that returns from JAX then does."""
    program = (
        "import atexit, ctypes, sys, threading, time\n"
        "atexit.register(time.sleep, 1)\n"  # Runs last.
        "from localsgd_jax.distributed.background import submit_daemon\n"
        "exiting = threading.Event()\n"
        "def call():\n"
        "    exiting.wait()\n"
        "    time.sleep(0.3)\n"
        "    ctypes.CDLL(None).abort()\n"
        "submit_daemon(call)\n"
        "atexit.register(exiting.set)\n"
        "sys.exit(7)\n"
    )
    code, error = exit_code(program)
    assert code == 7, error


def test_exit_process_after_failed_initialization():
    """Without a connection, too, the process does not continue."""
    program = (
        "import localsgd_jax as lsgd\n"
        "from localsgd_jax.distributed import exit_process\n"
        "exit_process(4)\n"  # Returns in a program without other processes.
        "try:\n"
        f"    lsgd.initialize('127.0.0.1:{free_port()}', 2, 1, timeout=0.2)\n"
        "except RuntimeError:\n"
        "    exit_process(3)\n"
    )
    code, error = exit_code(program)
    assert code == 3, error
