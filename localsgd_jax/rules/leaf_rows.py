"""Rows of a vector of concatenated leaves, read and written leaf by leaf.

A vector of N numbers is split into rows of m; a row may start and end inside of a leaf.
Each worker uses one row, and XLA:CPU then needs no copy of the vector: only slices of
the concatenated leaves are read, and slices are written.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp


def read_row(
    vector: jax.Array, sizes: Sequence[int], index: jax.Array, length: int
) -> jax.Array:
    """Returns one row of a vector of leaves, zero-padded at the end.

    Args:
      vector: `(N,)`, concatenated leaves.
      sizes: number of elements of each leaf.
      index: index of the row, an int32 scalar.
      length: m.

    Returns:
      `(m,)`.

    Example:
      >>> read_row(jnp.arange(1.0, 6.0), (2, 3), jnp.int32(1), 3)
      Array([4., 5., 0.], dtype=float32)
    """
    row = jnp.zeros(length, vector.dtype)
    for start, stop in _parts(sizes, length):
        number, first = divmod(start, length)
        added = jnp.where(index == number, vector[start:stop], 0)
        old = row[first : first + stop - start]
        row = _write(row, old + added, jnp.int32(first))
    return row


def write_row(row: jax.Array, sizes: Sequence[int], index: jax.Array) -> jax.Array:
    """Returns a vector of leaves that is zero outside of one row.

    Args:
      row: `(m,)`.
      sizes: number of elements of each leaf.
      index: index of the row, an int32 scalar.

    Returns:
      `(N,)`; the padding of `read_row` is removed.

    Example:
      >>> write_row(jnp.array([4.0, 5.0, 6.0]), (2, 3), jnp.int32(1))
      Array([0., 0., 0., 4., 5.], dtype=float32)
    """
    length = row.size
    parts = [jnp.zeros(0, row.dtype)]
    for start, stop in _parts(sizes, length):
        number, first = divmod(start, length)
        own = row[first : first + stop - start]
        parts.append(jnp.where(index == number, own, 0))
    return jnp.concatenate(parts)


def _parts(sizes: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Yields start and stop of the parts of a vector inside of one leaf and one row."""
    start = stop = 0
    for size in sizes:
        stop += size
        while start < stop:
            end = min(stop, (start // length + 1) * length)
            yield start, end
            start = end


@jax.custom_batching.custom_vmap
def _write(rows: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Replaces a part of the last axis.

    The batching rule of JAX for an update of a slice makes a scatter, which XLA:CPU
    does not fuse. Lanes are therefore an axis of both operands.
    """
    starts = (*[0] * (rows.ndim - 1), start)
    return jax.lax.dynamic_update_slice(rows, part, starts)


@_write.def_vmap
def _(
    size: int, is_mapped: list, rows: jax.Array, part: jax.Array, start: jax.Array
) -> tuple[jax.Array, bool]:
    operands = zip((rows, part), is_mapped[:2], strict=True)
    copies = [x if mapped else jnp.stack([x] * size) for x, mapped in operands]
    return _write(*copies, start), True
