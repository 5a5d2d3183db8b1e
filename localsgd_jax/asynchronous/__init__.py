"""Asynchronous Local SGD: workers exchange with an aggregate and never wait.

`order` and `simulate` play it deterministically on a virtual clock; `on_threads` runs
it on the devices of a host.
"""

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    Arrival,
    add,
    constant,
    outer,
    polynomial,
)
from localsgd_jax.asynchronous.events import Events, order, random_speeds, staleness
from localsgd_jax.asynchronous.nesterov import DelayedNesterov, delayed_nesterov
from localsgd_jax.asynchronous.recording import Recorded, recorded
from localsgd_jax.asynchronous.simulation import simulate
from localsgd_jax.asynchronous.state import Asynchronous, AsyncState
from localsgd_jax.asynchronous.threads import on_threads, throughput

__all__ = [
    "Aggregation",
    "Arrival",
    "AsyncState",
    "Asynchronous",
    "DelayedNesterov",
    "Events",
    "Recorded",
    "add",
    "constant",
    "delayed_nesterov",
    "on_threads",
    "order",
    "outer",
    "polynomial",
    "random_speeds",
    "recorded",
    "simulate",
    "staleness",
    "throughput",
]
