"""Events and replies of a syncer."""

from typing import Any, NamedTuple


class Join(NamedTuple):
    """A learner becomes a member.

    Attributes:
      time: seconds since the start of the job.
      learner: index of the learner.
      session: number that differs between memberships of one learner.
    """

    time: float
    learner: int
    session: int


class Leave(NamedTuple):
    """A learner is removed; the batches that it held are given to other learners.

    Attributes:
      time: seconds since the start of the job.
      learner: index of the learner.
      session: its membership; None for the current one.
    """

    time: float
    learner: int
    session: int | None = None


class Request(NamedTuple):
    """A learner without batches asks for more.

    Attributes:
      time: seconds since the start of the job.
      learner: index of the learner.
      session: its membership.
    """

    time: float
    learner: int
    session: int


class Contribution(NamedTuple):
    """A learner sends its update of a fragment.

    Attributes:
      time: seconds since the start of the job.
      learner: index of the learner.
      session: its membership.
      number: 1, 2, … in the membership; each number is counted once.
      version: number of merges in the model that the learner last received.
      payload: encoded update, a pytree of arrays.
      steps: local steps in the update.
      examples: examples in these steps.
      tokens: tokens in these steps.
      metrics: mean over the steps of each scalar metric, by name.
    """

    time: float
    learner: int
    session: int
    number: int
    version: int
    payload: Any
    steps: int
    examples: int
    tokens: int
    metrics: dict[str, float]


class Tick(NamedTuple):
    """The deadline of a merge has come.

    Attributes:
      time: seconds since the start of the job.
    """

    time: float


Event = Join | Leave | Request | Contribution | Tick


class Reply(NamedTuple):
    """Answer of a syncer to a learner.

    Attributes:
      learner: index of the learner.
      session: its membership.
      kind: "model": read the model and go on; "rejoin": the membership has ended or
        the update was not finite, so that the learner must join with a new session;
        "done": the job is complete.
      version: number of merges in the model.
      leases: indices of the first batches of the rounds that the learner may compute.
    """

    learner: int
    session: int
    kind: str
    version: int
    leases: tuple[int, ...] = ()


class Output(NamedTuple):
    """Consequences of an event.

    Attributes:
      replies: answers to learners.
      rows: rows of the history, one per merge.
    """

    replies: tuple[Reply, ...] = ()
    rows: tuple[dict, ...] = ()
