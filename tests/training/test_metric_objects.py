"""Metric objects of a training step: one number per round over steps and workers."""

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

import localsgd_jax as lsgd

BATCHES = np.arange(24, dtype=np.float32).reshape(6, 2, 2)


@flax.struct.dataclass
class Maximum:
    """Metric with the methods of CLU."""

    value: jnp.ndarray

    def merge(self, other):
        return Maximum(jnp.maximum(self.value, other.value))

    def reduce(self):
        return Maximum(self.value.max(0))

    def compute(self):
        return self.value


def train(metrics_of, **options):
    """Trains with metrics of a batch; returns the history."""

    def step(state, batch):
        return {"params": state["params"] + batch.mean()}, metrics_of(batch)

    cluster = lsgd.simulate(lsgd.from_train_step(step, lsgd.average()), workers=2)
    state = cluster.init({"params": jnp.zeros(())})
    options = {"schedule": 2, "progress": False} | options
    return lsgd.train(cluster, state, BATCHES, **options)[1]


@pytest.mark.parametrize("max_steps", [1, 64])
def test_one_number_per_round(max_steps):
    history = train(
        lambda b: {"largest": Maximum((-b).max()), "loss": b.mean()},
        max_steps_per_dispatch=max_steps,
    )
    assert history["largest"].tolist() == [0, -8, -16]
    assert history["loss"].tolist() == [3.5, 11.5, 19.5]


def test_reserved_names_raise():
    with pytest.raises(ValueError, match="names must differ .* 'step'"):
        train(lambda b: {"step": Maximum(b.max())})


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_collections_of_clu():
    """Means over the examples of a round, also of batches of unequal size."""
    metrics = pytest.importorskip("clu.metrics")

    @flax.struct.dataclass
    class Metrics(metrics.Collection):
        """Means of values and of correct predictions over the examples of a mask."""

        mean: metrics.Average.from_output("numbers")
        accuracy: metrics.Accuracy

    def metrics_of(batch):
        return Metrics.single_from_model_output(
            numbers=batch,
            logits=jnp.stack([batch, 10 - batch], -1),
            labels=jnp.zeros(2, jnp.int32),
            mask=batch % 3 > 0,
        )

    history = train(metrics_of)
    for i, examples in enumerate(BATCHES.reshape(3, 8)):
        chosen = examples[examples % 3 > 0]
        np.testing.assert_allclose(history["mean"][i], chosen.mean(), rtol=1e-6)
        accuracy = (chosen >= 10 - chosen).mean()
        np.testing.assert_allclose(history["accuracy"][i], accuracy, rtol=1e-6)
