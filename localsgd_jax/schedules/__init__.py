"""Synchronisation schedules: predicates on the number of local steps."""

from localsgd_jax.schedules.adaptive import AdaptiveSchedule, adacomm, drift_triggered
from localsgd_jax.schedules.growing import geometric, qsr
from localsgd_jax.schedules.periodic import at_steps, every, never, post_local
from localsgd_jax.schedules.schedule import Schedule
from localsgd_jax.schedules.streaming import evenly_spaced, with_lag, with_lead

__all__ = [
    "AdaptiveSchedule",
    "Schedule",
    "adacomm",
    "at_steps",
    "drift_triggered",
    "evenly_spaced",
    "every",
    "geometric",
    "never",
    "post_local",
    "qsr",
    "with_lag",
    "with_lead",
]
