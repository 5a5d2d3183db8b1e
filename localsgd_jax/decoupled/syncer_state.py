"""State of the syncer of a fragment."""

import math
from typing import NamedTuple

from localsgd_jax.core.types import PyTree
from localsgd_jax.decoupled.fragments import Fragment
from localsgd_jax.decoupled.leases import Leases
from localsgd_jax.decoupled.merging import Counts


class Member(NamedTuple):
    """A learner in the view of a syncer.

    Attributes:
      session: its membership.
      number: number of its last contribution.
      read_time: time of the last reply.
      interval: running mean of the time from a reply to the contribution; NaN if
        unknown.
      deviation: running mean of its absolute deviation.
      leases: rounds that the learner holds, oldest first.
      waiting: whether it has asked for leases.
    """

    session: int
    number: int
    read_time: float
    interval: float = math.nan
    deviation: float = 0.0
    leases: tuple[int, ...] = ()
    waiting: bool = False


class Pending(NamedTuple):
    """A contribution that has arrived and is not merged.

    Attributes:
      learner: index of the learner.
      session: its membership.
      time: time of arrival.
      counts: work in the contribution.
      staleness: merges since the learner read the model.
      weight: weight in the mean.
      metrics: its metrics.
    """

    learner: int
    session: int
    time: float
    counts: Counts
    staleness: int
    weight: float
    metrics: dict[str, float]


class Totals(NamedTuple):
    """Counters of a syncer since the start of the job.

    Attributes:
      steps: local steps in merged contributions.
      examples: examples in them.
      tokens: tokens in them.
      not_finite: contributions left out because of NaN or infinite entries.
      duplicates: contributions received more than once.
      rejected: contributions of learners that were no members.
      bytes_received: bytes of all payloads.
      bytes_sent: bytes of all models.
    """

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    not_finite: int = 0
    duplicates: int = 0
    rejected: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0


class SyncerState(NamedTuple):
    """State of the syncer of a fragment.

    Attributes:
      params: leaves of the fragment, float32 or wider.
      aggregation_state: state of the aggregation.
      total: weighted sum of the pending updates.
      version: number of merges.
      members: learners by index.
      pending: contributions in `total`, in the order of arrival.
      deadline: time of the next merge; infinite if it needs more contributions.
      leases: rounds of the job; those of fragment 0 are used.
      totals: counters.
    """

    params: Fragment
    aggregation_state: PyTree
    total: Fragment
    version: int
    members: dict[int, Member]
    pending: tuple[Pending, ...]
    deadline: float
    leases: Leases
    totals: Totals


def is_done(state: SyncerState) -> bool:
    """Returns whether every round has been contributed and merged."""
    leases = state.leases
    held = any(member.leases for member in state.members.values())
    free = leases.returned or leases.next < leases.end
    return not (held or free or state.pending)
