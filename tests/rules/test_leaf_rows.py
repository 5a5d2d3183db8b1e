"""Rows of a vector of leaves, against a padded matrix of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localsgd_jax.rules.leaf_rows import read_row, write_row


@pytest.mark.parametrize(
    ("sizes", "rows", "length"),
    [((3, 4), 2, 4), ((7,), 3, 3), ((1, 0, 2, 1), 1, 8), ((2, 2), 5, 1)],
)
def test_row_of_each_worker(sizes, rows, length):
    vector = np.arange(1.0, sum(sizes) + 1, dtype=np.float32)
    matrix = np.zeros(rows * length, np.float32)
    matrix[: vector.size] = vector
    matrix = matrix.reshape(rows, length)

    # Also with lanes, as in `simulate`: of the index alone, and of all operands.
    def read(index, vector):
        return read_row(vector, sizes, index, length)

    indices, copies = jnp.arange(rows), jnp.stack([vector] * rows)
    np.testing.assert_array_equal(jax.vmap(read)(indices, copies), matrix)
    by_index = jax.vmap(read, (0, None))(indices, vector)
    np.testing.assert_array_equal(by_index, matrix)
    np.testing.assert_array_equal(read(rows - 1, jnp.asarray(vector)), matrix[-1])

    written = jax.vmap(lambda row, k: write_row(row, sizes, k))(matrix, indices)
    expected = np.zeros((rows, rows, length), np.float32)
    expected[range(rows), range(rows)] = matrix
    expected = expected.reshape(rows, -1)[:, : vector.size]
    np.testing.assert_array_equal(written, expected)


def test_update_of_a_row_is_no_scatter():
    vectors = jax.ShapeDtypeStruct((2, 5), jnp.float32)
    indices = jax.ShapeDtypeStruct((2,), jnp.int32)
    read = jax.vmap(lambda x, k: read_row(x, (2, 3), k, 3))
    text = jax.jit(read).lower(vectors, indices).as_text()
    assert "dynamic_update_slice" in text
    assert "scatter" not in text
