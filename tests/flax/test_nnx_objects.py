"""NNX steps on any objects: shared variables, metrics, PRNG streams, raw keys."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from harness.cases import assert_close, mesh

import localsgd_jax as lsgd
from localsgd_jax.flax import from_nnx, update_nnx

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(12, 4, 8, 3)).astype(np.float32)  # steps, K, B, features
TARGETS = INPUTS @ np.array([[1.0], [-2.0], [0.5]], np.float32)
BATCHES = list(zip(INPUTS, TARGETS, strict=True))


class WithDropout(nnx.Module):
    """A linear model with dropout on its inputs."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        return self.linear(x if rngs is None else self.dropout(x, rngs=rngs))


def squared_error(model, batch):
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


def idle_step(model, metric, batch):
    return jnp.zeros(())


def run(cluster, start, every=3):
    state, losses = cluster.init(start), []
    for i, batch in enumerate(BATCHES, 1):
        state, loss = cluster.step(state, batch)
        losses.append(np.mean(loss))
        state = cluster.sync(state) if i % every == 0 else state
    return state, losses


def model_with_optimizer():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    return model, nnx.ModelAndOptimizer(model, optax.adam(0.1), wrt=nnx.Param)


@pytest.mark.parametrize("alone", [False, True], ids=["both", "optimizer_only"])
def test_an_optimizer_with_its_model_trains_it(alone):
    """The same numbers as an `nnx.Optimizer` of the model."""

    def with_optimizer(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(squared_error)(model, batch)
        optimizer.update(model, grads)
        return loss

    def with_both(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(squared_error)(model, batch)
        optimizer.update(grads)
        return loss

    def with_model_of_optimizer(optimizer, batch):
        return with_both(optimizer.model, optimizer, batch)

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    plain = (model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param))
    made, start = from_nnx(with_optimizer, *plain, rule=lsgd.average())
    expected, _ = run(lsgd.simulate(made, 4), start)

    objects = model_with_optimizer()[1:] if alone else model_with_optimizer()
    step = with_model_of_optimizer if alone else with_both
    made, start = from_nnx(step, *objects, rule=lsgd.average())
    state, losses = run(lsgd.simulate(made, 4), start)
    update_nnx(lsgd.consensus(state, None), *objects)
    assert losses[-1] < 0.5 * losses[0]
    trained = objects[-1].model if alone else objects[0]
    kernel = lsgd.consensus(expected)["kernel"]
    np.testing.assert_allclose(trained.kernel[...], kernel, rtol=1e-5)
    # One object holds all, so that its variables are shared and not copied.
    assert objects[-1].model.kernel is trained.kernel


def step_with_metrics(model, optimizer, metrics, batch, rngs):
    def loss_fn(model, rngs):
        error = (model(batch[0], rngs) - batch[1]) ** 2
        return jnp.mean(error), error

    (loss, error), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, rngs)
    optimizer.update(model, grads)
    metrics.update(loss=loss, error=error)
    return loss


def objects_with_metrics():
    model = WithDropout(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    metrics = nnx.MultiMetric(
        loss=nnx.metrics.Average("loss"), spread=nnx.metrics.Welford("error")
    )
    return model, optimizer, metrics, nnx.Rngs(1)


@pytest.mark.parametrize("placement", ["simulate", "mesh"])
def test_metrics_of_all_workers_are_merged(placement):
    objects = objects_with_metrics()
    made, start = from_nnx(
        step_with_metrics, *objects, rule=lsgd.average(), batch_argnum=3
    )
    cluster = (
        lsgd.simulate(made, 4)
        if placement == "simulate"
        else lsgd.on_mesh(made, mesh(worker=2), 4)
    )
    state, losses = run(cluster, start)
    assert len(set(np.asarray(state.workers.metrics.values[2]["loss"]["total"]))) == 4
    update_nnx(lsgd.consensus(state, None), *objects)
    computed = objects[2].compute()
    np.testing.assert_allclose(computed["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(computed["spread"].mean, np.mean(losses), rtol=1e-5)
    assert int(objects[2].loss.count[...]) == 4 * len(BATCHES)
    assert int(objects[3].default.count[...]) == len(BATCHES)


def test_merged_moments_are_those_of_all_examples():
    """Workers with different numbers of examples, against all of them at once."""
    values = [RNG.normal(size=n).astype(np.float32) + n for n in (3, 1, 6)]
    metrics = [nnx.metrics.Welford("x") for _ in values]
    joint = nnx.metrics.Welford("x")
    for metric, x in zip(metrics, values, strict=True):
        metric.update(x=jnp.asarray(x))
    joint.update(x=jnp.concatenate(values))
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    starts = [from_nnx(idle_step, model, m, rule=lsgd.average())[1] for m in metrics]
    made, start = from_nnx(idle_step, model, joint, rule=lsgd.average())
    state = lsgd.simulate(made, 3).init(start)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    merged = lsgd.consensus(state._replace(workers=stacked), None)
    assert_close(merged.metrics.values, start.metrics.values, rtol=1e-5)


def test_an_unknown_metric_of_several_workers_raises():
    class Largest(nnx.Metric):
        def __init__(self):
            self.value = nnx.metrics.MetricState(jnp.zeros(()))

    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    made, start = from_nnx(idle_step, model, Largest(), rule=lsgd.average())
    state = lsgd.simulate(made, 2).init(start)
    assert lsgd.consensus(state, "params")["kernel"].shape == (1, 1)
    with pytest.raises(TypeError, match=r"consensus\(state\): metrics .* got Largest"):
        lsgd.consensus(state, None)


@flax.struct.dataclass
class Total:
    """A metric with the interface of `clu.metrics.Metric`."""

    total: jax.Array
    count: jax.Array

    def reduce(self):
        return Total(self.total.sum(0), self.count.sum(0))

    def compute(self):
        return self.total / self.count


def test_metrics_and_loss_scales_of_a_train_state_are_merged():
    def train_step(state, batch):
        scale = state["scale"].replace(scale=batch)
        total = Total(state["total"].total + batch, state["total"].count + 1)
        return {**state, "scale": scale, "total": total}

    algorithm = lsgd.from_train_step(train_step, lsgd.average())
    cluster = lsgd.simulate(algorithm, 3)
    start = {
        "params": jnp.zeros(2),
        "scale": DynamicScale(),
        "total": Total(jnp.zeros(()), jnp.int32(0)),
    }
    state = cluster.init(start)
    state, _ = cluster.step(state, jnp.array([65536.0, 8192.0, 65536.0]))
    merged = lsgd.consensus(state, None)
    assert float(merged["scale"].scale) == 8192
    assert float(merged["total"].total) == 65536 + 8192 + 65536
    assert int(merged["total"].count) == 3


def test_fields_are_returned_in_the_order_of_their_names():
    algorithm = lsgd.local_sgd(
        lambda w, b: (w - b) ** 2, optax.sgd(0.1), lsgd.average()
    )
    state = lsgd.simulate(algorithm, 2).init(jnp.ones(()))
    assert list(lsgd.consensus(state, ("params", "opt_state"))) == [
        "params",
        "opt_state",
    ]


def test_a_raw_key_in_a_variable_raises():
    class Sampler(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
            self.key = nnx.Variable(jax.random.PRNGKey(0))

    with pytest.raises(TypeError, match=r"from_nnx\(\*objects\): .* raw PRNG key"):
        from_nnx(lambda model, batch: 0.0, Sampler(), rule=lsgd.average())


@pytest.mark.parametrize(
    "step, options, message",
    [
        (lambda model, batch, rngs: 0.0, {}, "must take 1 objects and a batch"),
        (3, {}, "must be callable, got 3"),
        (lambda model, batch: 0.0, {"batch_argnum": 2}, "must be at most 1, got 2"),
    ],
)
def test_bad_arguments_raise_at_once(step, options, message):
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    with pytest.raises((TypeError, ValueError), match=message):
        from_nnx(step, model, rule=lsgd.average(), **options)


def test_a_positional_rule_raises():
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"a rule is passed as rule=average\(\)"):
        from_nnx(lambda model, batch: 0.0, model, lsgd.average(), rule=lsgd.average())
