"""Bytes that a device sends in a ring collective."""

from collections.abc import Callable, Mapping, Sequence

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

# The part of it that crosses the s slices or hosts of the group. A hierarchical
# all-reduce, for example, reduces inside each slice, so that a device has 1/m of the
# operand for m devices per slice, and then all-reduces that part with s − 1 others:
# 2(s − 1)/s / m = 2(s − 1)/n. Both parts add up to the ring formula.
DCN_BYTES_FACTOR: Mapping[str, Callable[[int, int], float]] = {
    "all-reduce": lambda n, s: 2 * (s - 1) / n,
    "reduce-scatter": lambda n, s: (s - 1) / n,
    "all-gather": lambda n, s: s - 1,
    "all-to-all": lambda n, s: (s - 1) / s,
    "ragged-all-to-all": lambda n, s: (s - 1) / s,
    "collective-permute": lambda n, s: float(s > 1),
    "collective-broadcast": lambda n, s: (s - 1) / n,
}


def sent_bytes(
    name: str,
    operand_bytes: int,
    groups: Sequence[Sequence[int]],
    slices: Sequence[int],
) -> tuple[float, float]:
    """Returns the bytes that a device sends, and the part that crosses slices.

    Args:
      name: the collective, such as `all-reduce`.
      operand_bytes: size of the operand on one device.
      groups: device groups by position.
      slices: slice or host of each position; empty if they are not known.

    Returns:
      Both numbers, those of the group that sends most.

    Example:
      >>> sent_bytes("all-reduce", 80, [(0, 1, 2, 3)], slices=[0, 0, 1, 1])
      (120.0, 40.0)
    """
    size = max(map(len, groups), default=1)
    counts = [len({slices[i] for i in group}) for group in groups] if slices else []
    num_slices = max(counts, default=1)
    total = RING_BYTES_FACTOR[name](size) * operand_bytes
    return total, DCN_BYTES_FACTOR[name](size, num_slices) * operand_bytes
