"""Batches of a plain training loop, split over the workers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.core.pytrees import is_key
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check, check_int, check_type, describe


def split_batch(batch: PyTree, workers: int, *, drop_remainder: bool = False) -> PyTree:
    """Splits a batch into equal parts for K workers.

        ξₖ = ξ[k n / K], …, ξ[(k + 1) n / K − 1],   k = 0, …, K − 1

    Args:
      batch: pytree. Arrays with leaves `(n, ...)` are split: of NumPy, JAX, PyTorch,
        TensorFlow, and others with `__array__` or `__dlpack__`. A PRNG key, typed or
        raw, becomes a different key for each worker; a raw one is a `jax.Array`.
        Scalars are repeated.
      workers: K.
      drop_remainder: whether to drop the last n mod K examples; otherwise K must divide
        n.

    Returns:
      A pytree with leaves `(K, n / K, ...)`; `(K,)` for keys and scalars.

    Raises:
      TypeError: if an argument has the wrong type, or a leaf is no array.
      ValueError: if K does not divide n, no example is left, or n differs between
        arrays.

    Example:
      >>> import jax, numpy as np
      >>> batch = split_batch({"x": np.ones((8, 3)), "key": jax.random.key(0)}, 4)
      >>> batch["x"].shape, batch["key"].shape
      ((4, 2, 3), (4,))
    """
    workers = check_int("split_batch(workers)", "workers", workers, 1)
    check_type("split_batch(drop_remainder)", "drop_remainder", drop_remainder, bool)
    lengths: dict[int, str] = {}

    def split(path: tuple, leaf: Any) -> Any:
        x = _to_array(path, leaf)
        if isinstance(x, jax.Array) and _is_single_key(x):
            return jax.random.split(x, workers)
        if x.ndim == 0:
            return np.broadcast_to(x, (workers,))
        lengths.setdefault(len(x), _name(path))
        size, remainder = divmod(len(x), workers)
        if size == 0 or (remainder and not drop_remainder):
            raise ValueError(
                f"split_batch(batch): the leaf {_name(path)} must have a multiple of "
                f"the {workers} workers as examples, got shape {x.shape}; "
                "drop_remainder=True drops the last examples"
            )
        return x[: size * workers].reshape(workers, size, *x.shape[1:])

    parts = jax.tree.map_with_path(split, batch)
    named = " and ".join(f"{n} in {name}" for n, name in lengths.items())
    text = "all arrays must have the same number of examples"
    check(len(lengths) < 2, "split_batch(batch)", text, named)
    return parts


def _is_single_key(x: jax.Array) -> bool:
    """Returns whether an array is one PRNG key, typed or raw."""
    is_typed = is_key(x) and x.ndim == 0
    return is_typed or (x.shape == (2,) and x.dtype == np.uint32)


def _to_array(path: tuple, leaf: Any) -> Any:
    """Converts an array of any library; raises unless it holds numbers or keys."""
    array = leaf if isinstance(leaf, jax.Array | np.ndarray) else _convert(leaf)
    if array is None or not _is_numeric(array.dtype):
        raise TypeError(
            f"split_batch(batch): the leaf {_name(path)} must be an array or a number, "
            f"got {describe(leaf)}"
        )
    return array


def _is_numeric(dtype: Any) -> bool:
    """Returns whether JAX has arrays of a dtype: numbers, bools or keys."""
    kinds = jnp.number, jnp.bool_, jax.dtypes.extended
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


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
