"""State of a syncer with its event log, history and unanswered learners."""

import math
from collections.abc import Callable

import numpy as np

from localsgd_jax.decoupled.events import Event, Reply
from localsgd_jax.decoupled.syncer import Syncer
from localsgd_jax.decoupled.syncer_state import SyncerState


class SyncerHost:
    """Applies events to a syncer one after another.

    Attributes:
      syncer: its pure functions.
      state: its state.
      rows: rows of the history since this object was made.
      last_time: time of the last event.
    """

    def __init__(
        self,
        syncer: Syncer,
        state: SyncerState | None = None,
        write: Callable[[Event], None] | None = None,
    ) -> None:
        """Starts from a state.

        Args:
          syncer: its pure functions.
          state: None for the start of the job.
          write: called with each event before it is applied.
        """
        self.syncer = syncer
        self.state = syncer.init() if state is None else state
        self.rows: list[dict] = []
        self._write = write or (lambda event: None)
        self.last_time = -math.inf

    def apply(self, event: Event) -> tuple[Reply, ...]:
        """Applies an event; returns the replies to learners.

        Args:
          event: its time is raised to that of the event before, if it is earlier.
        """
        self.last_time = max(self.last_time, event.time)
        event = event._replace(time=self.last_time)
        self._write(event)
        return self.replay(event)

    def replay(self, event: Event) -> tuple[Reply, ...]:
        """Applies an event that was written before."""
        self.last_time = max(self.last_time, event.time)
        self.state, output = self.syncer.step(self.state, event)
        self.rows.extend(output.rows)
        return output.replies

    def model(self) -> dict[str, np.ndarray]:
        """Returns the leaves of the fragment by path."""
        return self.syncer.model(self.state)
