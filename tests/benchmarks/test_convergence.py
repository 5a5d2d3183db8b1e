"""The convergence measurement, for a few steps, and its shared transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.selection import keep

from benchmarks import control_variates, convergence, models
from benchmarks.convergence_studies import STUDIES, VARIANTS, transformer
from benchmarks.datasets import HelpTopics


@pytest.mark.full
@pytest.mark.parametrize(
    "method",
    [
        VARIANTS["DiLoCo, H = 32"],
        STUDIES["muon"].methods["Muon, K = 4, H = 32"],
        STUDIES["corrected"].methods["control variates, H = 32"],
    ],
    ids=["diloco", "muon", "control_variates"],
)
def test_text_task_trains(method):
    task = transformer(HelpTopics, 16, layers=1, context=8, in_parts=True, steps=160)
    row = convergence.train_and_score(task, method, seed=0)
    assert row["rounds"] == 5 and row["megabytes"] > 0
    assert row["loss"] < np.log(256)


@pytest.mark.full
def test_control_variates_are_ahead_of_local_sgd():
    rng = np.random.default_rng(0)
    shards = rng.normal(size=(8, 6, 4)), np.sign(rng.normal(size=(8, 6)))
    with jax.enable_x64(True):
        plain, corrected = (
            control_variates.run(rule, period=16, rounds=60, shards=shards)[-1]
            for rule in control_variates.RULES.values()
        )
    assert 0 <= corrected < 1e-6 < plain


@pytest.mark.parametrize("rotary", keep([True, False], [True]))
def test_decoder_is_causal(rotary):
    params = models.gpt(16, 1, 2, 32, 8).params
    block = jax.tree.map(lambda x: x[0], params["blocks"])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 16)), jnp.float32)
    decode = jax.jit(lambda x: models.decoder_block(x, block, 2, rotary))
    changed = x.at[0, 5].add(1.0)
    np.testing.assert_allclose(decode(x)[0, :5], decode(changed)[0, :5], atol=1e-6)
    assert np.abs(decode(x)[0, 5:] - decode(changed)[0, 5:]).max() > 1e-3
