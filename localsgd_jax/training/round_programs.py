"""Choice of a program for each round, by its position in the cycle of the rule."""

import hashlib
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding

from localsgd_jax.core.types import State
from localsgd_jax.execution.cyclic_round import Cycle, RoundClass

_MAX_PROGRAMS = 16


class RoundPrograms:
    """Classes of rounds with a compiled program, at most 16.

    Rounds whose synchronisations are lowered to the same text share a program. On a
    single device the choices of the rule stay conditionals, since nothing is sent.

    Attributes:
      are_alike: whether one program serves all rounds.
    """

    def __init__(self, sync: Any, state: State) -> None:
        """Traces the synchronisation of the first round.

        Args:
          sync: jitted function of a state and the static `round_class`.
          state: state of the cluster; only shapes and shardings are kept.
        """
        self._sync = sync
        self._shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            state,
        )
        self._class_of_text: dict[str, RoundClass] = {}
        self._cycle = Cycle(self._find_equal)
        self.are_alike = not _sends(state) or self._has_period_1()

    def choose(self, round_number: int) -> RoundClass | None:
        """Returns the class of the program that runs a round.

        Args:
          round_number: 1 for the first round.

        Returns:
          The class; None for the program of all rounds, with a traced round number.
        """
        return None if self.are_alike else self._cycle(round_number)

    def _has_period_1(self) -> bool:
        """Returns whether the rule ignores the round, or cannot be traced."""

        def trace(round_class: RoundClass) -> None:
            jax.eval_shape(partial(self._sync, round_class=round_class), self._shapes)

        cycle = Cycle(trace)
        cycle(1)
        return cycle.period in (None, 1)

    def _find_equal(self, round_class: RoundClass) -> RoundClass | None:
        """Returns the first class with an equal synchronisation."""
        text = self._sync.lower(self._shapes, round_class=round_class).as_text()
        digest = hashlib.sha256(text.encode()).hexdigest()
        if len(self._class_of_text) < _MAX_PROGRAMS:
            self._class_of_text.setdefault(digest, round_class)
        return self._class_of_text.get(digest)


def _sends(state: State) -> bool:
    """Returns whether the workers of a state are on several devices."""
    return any(
        isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1
        for x in jax.tree.leaves(state.workers)
    )
