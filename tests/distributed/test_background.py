"""Daemon threads: results, errors and timeouts of their futures."""

import threading

import jax
import jax.numpy as jnp
import pytest

from localsgd_jax.distributed.background import submit_daemon


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
