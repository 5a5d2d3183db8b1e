"""Pieces of a split collective, and the ops between them."""

import pytest

from localsgd_jax.analysis import CollectiveOp, Loop
from localsgd_jax.analysis.async_ops import merge_chains

PIECE = CollectiveOp("all-gather", ("f32",), 8, 8.0, ((0, 1),), ("worker",))
OUTSIDE = PIECE._replace(async_chain_id="2/0")
INSIDE = OUTSIDE._replace(control_flow=(Loop("body", 4),))


@pytest.mark.parametrize(
    "pieces, overlapped",
    [
        ([OUTSIDE], None),
        ([OUTSIDE, OUTSIDE], ()),
        ([OUTSIDE, INSIDE, OUTSIDE], ("while",)),
        ([OUTSIDE, OUTSIDE, OUTSIDE], ("fusion",)),
        ([OUTSIDE, INSIDE, OUTSIDE, OUTSIDE], ("while", "fusion")),
    ],
)
def test_middle_pieces_are_overlapped(pieces, overlapped):
    other = INSIDE._replace(async_chain_id="3/0")
    (first, last) = merge_chains([*pieces, other])
    assert first == OUTSIDE._replace(overlapped_ops=overlapped) and last == other
