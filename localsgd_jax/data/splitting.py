"""Batches of a plain training loop, split over the workers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.core.pytrees import is_key
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_int, check_type


def split_batch(batch: PyTree, workers: int, *, drop_remainder: bool = False) -> PyTree:
    """Splits a batch into equal parts for K workers.

        ξₖ = ξ[k n / K], …, ξ[(k + 1) n / K − 1],   k = 0, …, K − 1

    Args:
      batch: pytree. Arrays with leaves `(n, ...)` are split: of NumPy, JAX, PyTorch,
        TensorFlow, and others with `__array__` or `__dlpack__`. A PRNG key, typed or
        raw, becomes a different key for each worker. Scalars are repeated.
      workers: K.
      drop_remainder: whether to drop the last n mod K examples; otherwise K must divide
        n.

    Returns:
      A pytree with leaves `(K, n / K, ...)`; `(K,)` for keys and scalars.

    Raises:
      TypeError: if an argument has the wrong type, or a leaf is no array.
      ValueError: if K does not divide n, or no example is left.

    Example:
      >>> import jax, numpy as np
      >>> batch = split_batch({"x": np.ones((8, 3)), "key": jax.random.key(0)}, 4)
      >>> batch["x"].shape, batch["key"].shape
      ((4, 2, 3), (4,))
    """
    workers = check_int("split_batch(workers)", "workers", workers, 1)
    check_type("split_batch(drop_remainder)", "drop_remainder", drop_remainder, bool)

    def split(path: tuple, leaf: Any) -> Any:
        x = _to_array(path, leaf)
        if isinstance(x, jax.Array) and is_key(x) and x.ndim == 0:
            return jax.random.split(x, workers)
        if x.shape == (2,) and x.dtype == np.uint32:
            return jax.random.split(jnp.asarray(x), workers)
        if x.ndim == 0:
            return np.broadcast_to(x, (workers,))
        size, remainder = divmod(len(x), workers)
        if size == 0 or (remainder and not drop_remainder):
            raise ValueError(
                f"split_batch(batch): the leaf {_name(path)} must have a multiple of "
                f"the {workers} workers as examples, got shape {x.shape}; "
                "drop_remainder=True drops the last examples"
            )
        return x[: size * workers].reshape(workers, size, *x.shape[1:])

    return jax.tree.map_with_path(split, batch)


def _to_array(path: tuple, leaf: Any) -> Any:
    """Converts an array of any library; raises unless it holds numbers or keys."""
    array = leaf if isinstance(leaf, jax.Array | np.ndarray) else _convert(leaf)
    if array is None or getattr(array.dtype, "kind", "f") in "OSU":
        raise TypeError(
            f"split_batch(batch): the leaf {_name(path)} must be an array or a number, "
            f"got {type(leaf).__name__}"
        )
    return array


def _convert(leaf: Any) -> Any:
    """Converts an array of another library, or a number; None if it is neither."""
    # PyTorch refuses to convert tensors that require gradients.
    leaf = leaf.detach() if hasattr(leaf, "detach") else leaf
    try:
        return np.asarray(leaf)
    except Exception:
        # NumPy has no bfloat16 of PyTorch, and cannot read arrays of other devices.
        return jax.dlpack.from_dlpack(leaf) if hasattr(leaf, "__dlpack__") else None


def _name(path: tuple) -> str:
    """Returns the name of a leaf for messages."""
    return jax.tree_util.keystr(path) or "batch"
