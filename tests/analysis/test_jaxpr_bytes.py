"""Bytes counted on a jaxpr, against the ring formulas computed by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from localsgd_jax.analysis.jaxpr_bytes import jaxpr_bytes_sent

AXES = {"group": 2, "worker": 4}
BOTH = ("group", "worker")
RING = [(k, (k + 1) % 4) for k in range(4)]


@pytest.mark.parametrize(
    "collective, expected",
    [
        (partial(jax.lax.psum, axis_name="worker"), 2 * 3 / 4 * 4096),
        (partial(jax.lax.psum, axis_name=BOTH), 2 * 7 / 8 * 4096),
        (partial(jax.lax.pmax, axis_name=BOTH), 2 * 7 / 8 * 4096),
        (partial(jax.lax.all_gather, axis_name=BOTH), 7 * 4096),
        (
            partial(jax.lax.psum_scatter, axis_name=BOTH, tiled=True),
            7 / 8 * 4096,
        ),
        (
            partial(
                jax.lax.all_to_all,
                axis_name="worker",
                split_axis=0,
                concat_axis=0,
                tiled=True,
            ),
            3 / 4 * 4096,
        ),
        (partial(jax.lax.ppermute, axis_name="worker", perm=RING), 4096),
    ],
    ids=[
        "psum",
        "psum over two axes",
        "pmax over two axes",
        "all_gather",
        "psum_scatter",
        "all_to_all",
        "ppermute",
    ],
)
def test_bytes_of_collectives(collective, expected):
    x = jnp.zeros(1024)
    assert jaxpr_bytes_sent(collective, AXES, x) == (expected, expected)


def test_loops_branches_and_pairs_of_operands():
    x = jnp.zeros(1024)
    mean = partial(jax.lax.psum, axis_name="worker")

    def loop(x):
        return jax.lax.scan(lambda c, _: (mean(c), None), x, length=3)[0]

    def branch(x):
        return jax.lax.cond(x[0] > 0, mean, lambda x: x, x)

    assert jaxpr_bytes_sent(loop, AXES, x) == (3 * 6144, 3 * 6144)
    assert jaxpr_bytes_sent(branch, AXES, x) == (0, 6144)
    assert jaxpr_bytes_sent(lambda x: mean((x, x)), AXES, x) == (12288, 12288)
