"""Cumulative number of bytes that workers and devices send."""

import math
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from localsgd_jax.analysis.device_bytes import ByteRange
from localsgd_jax.core.types import State
from localsgd_jax.execution.cyclic_round import Cycle, RoundClass

Args = ParamSpec("Args")
Result = TypeVar("Result")


class BestEffort:
    """Calls of functions that may fail without an end of training.

    A function may also fail because the program of the user does. So a failure is
    reported by `warn`, which is called after the program has run.
    """

    def __init__(self) -> None:
        """Starts without a failure."""
        self._error, self._has_warned = None, False

    def __call__(
        self, function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result | None:
        """Calls a function.

        Args:
          function: counts bytes.
          *args: its arguments.
          **kwargs: its keyword arguments.

        Returns:
          Its result; None after an exception.
        """
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self._error = error
            return None

    def warn(self) -> None:
        """Warns once if a call has failed."""
        if self._error is not None and not self._has_warned:
            self._has_warned = True
            text = f"{type(self._error).__name__}: {self._error}"
            text = f"train(): bytes cannot be counted: {text}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)


class ByteCounter:
    """Sum of the bytes sent in the rounds and evaluations of a run.

    A sum is NaN from the first number on that could not be counted.
    """

    def __init__(self, bytes_sent: Callable, state: State) -> None:
        """Starts at zero.

        Args:
          bytes_sent: of a cluster; `bytes_sent(state, round=None) -> (least, most)`.
          state: state of the cluster; only its shapes are kept.
        """
        self._bytes_sent, self._best_effort = bytes_sent, BestEffort()
        self._shapes = jax.eval_shape(lambda state: state, state)
        self._range = self._best_effort(bytes_sent, self._shapes, None)
        self._cycle = Cycle(self._range_of_class)
        self._bytes, self._device_bytes = 0, None

    def add_round(
        self, round_number: int, device_bytes: ByteRange | None = None
    ) -> dict[str, float]:
        """Adds a round and returns the sums.

        If rounds differ, the bytes of this one are counted on the jaxpr of the rule,
        once for each position in its cycle. If the compiled program only has a range
        for all rounds, the position of this round in it is that of the counted bytes
        in their range.

        Args:
          round_number: number of the round, 1 for the first.
          device_bytes: bytes of a device in a round of the compiled program, if known.

        Returns:
          "bytes" of a worker and, if they are known, "device_bytes" of a device.
        """
        low, high = self._range or (math.nan, math.nan)
        self._best_effort.warn()
        sent = high if low == high else self._bytes_of(round_number)
        if device_bytes is None:
            return self._add(sent)
        fraction = 1 if math.isnan(sent) else (sent - low) / max(high - low, 1)
        return self._add(sent, device_bytes.interpolate(fraction))

    def add_evaluation(
        self, sent: float, device_sent: float | None
    ) -> dict[str, float]:
        """Adds an evaluation and returns the sums.

        Args:
          sent: bytes that a worker sent.
          device_sent: bytes that a device sent, None if they are not known.

        Returns:
          As `add_round`.
        """
        is_counted = self._device_bytes is not None
        return self._add(sent, device_sent if is_counted else None)

    def _add(self, sent: float, device_sent: float | None = None) -> dict[str, float]:
        """Adds bytes and returns the sums."""
        self._bytes += sent
        if device_sent is not None:
            self._device_bytes = (self._device_bytes or 0.0) + device_sent
        elif self._device_bytes is not None:
            self._device_bytes = math.nan
        if self._device_bytes is None:
            return {"bytes": self._bytes}
        device_bytes = self._device_bytes
        device_bytes = device_bytes if math.isnan(device_bytes) else round(device_bytes)
        return {"bytes": self._bytes, "device_bytes": device_bytes}

    def _bytes_of(self, round_number: int) -> float:
        """Returns the bytes that a worker sends in a round; NaN if not known."""
        low, high = (self._range and self._cycle(round_number)) or (0, math.nan)
        if low == high:
            return high
        # The class of the round leaves a conditional, or the rule has no cycle.
        exact = self._best_effort(self._bytes_sent, self._shapes, round_number)
        return exact[1] if exact else math.nan

    def _range_of_class(self, round_class: RoundClass) -> tuple[int, int]:
        """Returns the least and the most bytes of the rounds of a class."""
        ranges = []

        # The value is traced, so that no choice can depend on it.
        def count(value: jax.Array) -> jax.Array:
            number = round_class.number(value)
            ranges.append(self._bytes_sent(self._shapes, number))
            return value

        jax.eval_shape(count, jax.ShapeDtypeStruct((), jnp.int32))
        return ranges[0]
