"""Raw PRNG keys, which are ordinary arrays and therefore equal on all workers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from localsgd_jax.core.types import PyTree

# Fields whose uint32 leaves are not PRNG keys.
_FIELDS_WITHOUT_KEYS = ("params", "batch_stats", "opt_state")


def forbid_raw_keys(
    call: str, state: PyTree, exempt: Sequence[str] = _FIELDS_WITHOUT_KEYS
) -> None:
    """Raises a TypeError if a train state has a raw PRNG key.

    All workers would draw the same random numbers from it, while a typed key becomes a
    different key for each worker.

    Args:
      call: start of the message, such as "from_linen(train_state)".
      state: train state of one worker.
      exempt: fields that are not searched.

    Example:
      >>> import jax
      >>> forbid_raw_keys("from_train_step", {"key": jax.random.key(0)})
    """
    for path, leaf in jax.tree.leaves_with_path(state):
        field = jax.tree_util.keystr(path[:1], simple=True)
        if field not in exempt and _is_raw_key(leaf):
            raise TypeError(
                f"{call}: the field {field!r} has a raw PRNG key at "
                f"{jax.tree_util.keystr(path)}, which would be equal on all workers; "
                "create it with jax.random.key or jax.random.wrap_key_data"
            )


def _is_raw_key(leaf: Any) -> bool:
    """Returns whether a leaf has the shape and dtype of `jax.random.PRNGKey`."""
    return getattr(leaf, "shape", None) == (2,) and leaf.dtype == jnp.uint32
