"""Bytes that a device sends in a ring collective."""

from collections.abc import Callable, Mapping

# Bytes that each device of a group of n sends, per byte of its operand, by the ring
# algorithms. Reduce-scatter and all-gather are each one half of an all-reduce.
RING_BYTES_FACTOR: Mapping[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: (n - 1) / n,
}
