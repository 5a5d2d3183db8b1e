"""Cumulative number of bytes that workers and devices send."""

from collections.abc import Callable

import jax

from localsgd_jax.analysis.device_bytes import ByteRange
from localsgd_jax.core.types import State


class ByteCounter:
    """Sum of the bytes sent in the rounds of a run."""

    def __init__(self, bytes_sent: Callable, state: State) -> None:
        """Starts at zero.

        Args:
          bytes_sent: of a cluster; `bytes_sent(state, round=None) -> (least, most)`.
          state: state of the cluster; only its shapes are kept.
        """
        self._bytes_sent = bytes_sent
        self._shapes = jax.eval_shape(lambda state: state, state)
        self._min_bytes, self._max_bytes = bytes_sent(self._shapes, None)
        self._bytes, self._device_bytes = 0, 0.0

    def add_round(
        self, round_number: int, device_bytes: ByteRange | None = None
    ) -> dict[str, float]:
        """Adds a round and returns the sums.

        If rounds differ, the bytes of this one are counted on the jaxpr of the rule.
        The compiled program only has a range for all rounds; the position of this round
        in it is that of the counted bytes in their range.

        Args:
          round_number: number of the round, 1 for the first.
          device_bytes: bytes of a device in a round of the compiled program, if known.

        Returns:
          "bytes" of a worker and, if they are known, "device_bytes" of a device.
        """
        low, high = self._min_bytes, self._max_bytes
        sent = high if low == high else self._bytes_sent(self._shapes, round_number)[1]
        self._bytes += sent
        if device_bytes is None:
            return {"bytes": self._bytes}
        fraction = (sent - low) / max(high - low, 1)
        self._device_bytes += device_bytes.interpolate(fraction)
        return {"bytes": self._bytes, "device_bytes": round(self._device_bytes)}
