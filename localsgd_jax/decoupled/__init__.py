"""Decoupled local SGD: learners that come and go, and syncers that merge updates.

`run` uses Ray, `simulate` a virtual clock; both take one `Job`.
"""

from localsgd_jax.decoupled.event_log import read_log
from localsgd_jax.decoupled.events import (
    Contribution,
    Join,
    Leave,
    Output,
    Reply,
    Request,
    Tick,
)
from localsgd_jax.decoupled.history import activity
from localsgd_jax.decoupled.job import Job
from localsgd_jax.decoupled.merging import (
    Counts,
    MergePolicy,
    by_examples,
    by_token_rate,
    by_tokens,
    immediate,
    quorum,
)
from localsgd_jax.decoupled.payload import floats, full_precision, integers, largest
from localsgd_jax.decoupled.ray_actors import JobMismatchError
from localsgd_jax.decoupled.repetition import Recomputed, recompute, replay
from localsgd_jax.decoupled.supervisor import run
from localsgd_jax.decoupled.syncer import Syncer, make_syncer
from localsgd_jax.decoupled.syncer_state import SyncerState
from localsgd_jax.decoupled.virtual_clock import Clock, Failure, simulate

__all__ = [
    "Clock",
    "Contribution",
    "Counts",
    "Failure",
    "Job",
    "JobMismatchError",
    "Join",
    "Leave",
    "MergePolicy",
    "Output",
    "Recomputed",
    "Reply",
    "Request",
    "Syncer",
    "SyncerState",
    "Tick",
    "activity",
    "by_examples",
    "by_token_rate",
    "by_tokens",
    "floats",
    "full_precision",
    "immediate",
    "integers",
    "largest",
    "make_syncer",
    "quorum",
    "read_log",
    "recompute",
    "replay",
    "run",
    "simulate",
]
