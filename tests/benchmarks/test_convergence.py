"""The convergence measurement, for a few steps, and its shared transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.selection import keep

from benchmarks import convergence, models


@pytest.mark.full
def test_text_task_trains():
    task = convergence.text(width=16, layers=1, context=8)._replace(steps=160)
    method = convergence.METHODS["DiLoCo, H = 32"]
    row = convergence.train_and_score(task, method, seed=0)
    assert row["rounds"] == 5 and row["megabytes"] > 0
    assert row["loss"] < np.log(256)


@pytest.mark.parametrize("rotary", keep([True, False], [True]))
def test_decoder_is_causal(rotary):
    params = models.gpt(16, 1, 2, 32, 8).params
    block = jax.tree.map(lambda x: x[0], params["blocks"])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 16)), jnp.float32)
    decode = jax.jit(lambda x: models.decoder_block(x, block, 2, rotary))
    changed = x.at[0, 5].add(1.0)
    np.testing.assert_allclose(decode(x)[0, :5], decode(changed)[0, :5], atol=1e-6)
    assert np.abs(decode(x)[0, 5:] - decode(changed)[0, 5:]).max() > 1e-3
