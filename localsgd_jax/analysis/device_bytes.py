"""Bytes that each device of a mesh sends per round, from the compiled programs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from localsgd_jax.analysis.collective_op import Branch, CollectiveOp, filter_by_axis
from localsgd_jax.analysis.ops import collective_ops
from localsgd_jax.analysis.total_bytes import total_bytes_sent
from localsgd_jax.core.types import State


class ByteRange(NamedTuple):
    """Range of the bytes that a device sends in a round of a program.

    Attributes:
      min_bytes: smallest number over the branches of the program.
      max_bytes: largest number.
    """

    min_bytes: float
    max_bytes: float

    def interpolate(self, fraction: float) -> float:
        """Returns a number in the range: `min_bytes` for 0, `max_bytes` for 1."""
        return self.min_bytes + fraction * (self.max_bytes - self.min_bytes)


class DeviceBytes:
    """Bytes per round of jitted programs, each of which is analysed once."""

    def __init__(self, state: State) -> None:
        """Finds the mesh axes between the workers of a state.

        Args:
          state: state of a cluster; only the sharding of the workers is read.
        """
        sharding = jax.tree.leaves(state.workers)[0].sharding
        self._mesh, self._axes = None, ()
        if isinstance(sharding, NamedSharding) and sharding.spec:
            names = sharding.spec[0] or ()
            names = (names,) if isinstance(names, str) else tuple(names)
            self._axes = tuple(x for x in names if sharding.mesh.shape[x] > 1)
            self._mesh = sharding.mesh
        self._ranges: dict[tuple, ByteRange | None] = {}

    def bytes_per_round(
        self, program: Any, *args, rounds: int | None, **static
    ) -> ByteRange | None:
        """Returns the bytes that a device sends in a round of a program.

        The program is compiled for the arguments; a later call of it with the same
        shapes reuses that executable.

        Args:
          program: a function from `jax.jit`.
          *args: its arguments, or their shapes with shardings.
          rounds: number of rounds of the program; None for gated steps, whose round is
            the content of the conditional.
          **static: its static arguments.

        Returns:
          The range; None if all workers share a device, or if a collective is in a loop
          with an unknown trip count.
        """
        if not self._axes:
            return None
        leaves = jax.tree.leaves(args)
        key = program, rounds, *static.values(), *((x.shape, x.dtype) for x in leaves)
        if key not in self._ranges:
            self._ranges[key] = self._analyse(program, args, rounds, static)
        return self._ranges[key]

    def _analyse(
        self, program: Any, args: tuple, rounds: int | None, static: dict
    ) -> ByteRange | None:
        """Compiles a program and sums up its collectives between workers.

        Ops that are not understood do not count: this is an estimate, which a host
        callback in the loss must not end, and no proof.
        """
        compiled = program.lower(*args, **static).compile()
        ops = filter_by_axis(collective_ops(compiled, mesh=self._mesh), self._axes)
        ops = [op for op in ops if not op.problem]
        low, high = total_bytes_sent(ops if rounds else _inside_conditional(ops))
        if not math.isfinite(high):
            return None
        return ByteRange(low / (rounds or 1), high / (rounds or 1))


def _inside_conditional(ops: Sequence[CollectiveOp]) -> list[CollectiveOp]:
    """Returns the ops with the control flow inside the conditional of a gated step."""

    def strip_outer(op: CollectiveOp) -> CollectiveOp:
        is_branch = [isinstance(item, Branch) for item in op.control_flow]
        return op._replace(control_flow=op.control_flow[is_branch.index(True) + 1 :])

    return [strip_outer(op) for op in ops]
