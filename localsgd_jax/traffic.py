"""What the devices of a mesh send in a round, read out of the programs that run."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from localsgd_jax.base import State
from localsgd_jax.ledger import Branch, Entry, along, ledger, sent


class Span(NamedTuple):
    """The least and the most bytes that a device sends in a round of a program."""

    least: float
    most: float

    def at(self, part: float) -> float:
        """Returns what lies between them, 0 for the least and 1 for the most."""
        return self.least + part * (self.most - self.least)


class Traffic:
    """Reads each program once, the one that was compiled to run."""

    def __init__(self, state: State) -> None:
        """Finds the mesh axes between the workers of a state."""
        sharding = jax.tree.leaves(state.workers)[0].sharding
        self.mesh, self.axes = None, ()
        if isinstance(sharding, NamedSharding) and sharding.spec:
            names = sharding.spec[0] or ()
            names = (names,) if isinstance(names, str) else tuple(names)
            self.axes = tuple(x for x in names if sharding.mesh.shape[x] > 1)
            self.mesh = sharding.mesh
        self.known: dict[tuple, Span | None] = {}

    def of(self, program: Callable, *args, rounds: int | None, **static) -> Span | None:
        """Returns what a device sends in a round of a program.

        Args:
          program: a jitted function; what it is compiled to for the arguments is what
            a call runs, and is compiled once.
          *args: its arguments, or their shapes with shardings.
          rounds: how many it has; None for one that is gated, of which the round is
            what its conditional holds.
          **static: further arguments.

        Returns:
          The bytes; None if the workers share one device, or if a collective stands in
          a loop whose length the program does not say.
        """
        if not self.axes:
            return None
        leaves = jax.tree.leaves(args)
        key = program, rounds, *static.values(), *((x.shape, x.dtype) for x in leaves)
        if key not in self.known:
            compiled = program.lower(*args, **static).compile()
            entries = along(ledger(compiled, mesh=self.mesh), self.axes)
            low, high = sent(entries if rounds else _gated(entries))
            span = Span(low / (rounds or 1), high / (rounds or 1))
            self.known[key] = span if math.isfinite(high) else None
        return self.known[key]


def _gated(entries: Sequence[Entry]) -> list[Entry]:
    """Returns the entries as they stand within the conditional of a gated step."""

    def inner(entry: Entry) -> Entry:
        kinds = [isinstance(place, Branch) for place in entry.path]
        return entry._replace(path=entry.path[kinds.index(True) + 1 :])

    return [inner(entry) for entry in entries]
