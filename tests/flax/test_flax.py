"""Adapters for linen train states and NNX models."""

import itertools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from harness.cases import PLACEMENTS, assert_close, assert_same, mesh
from harness.selection import keep

import localsgd_jax as lsgd
from localsgd_jax.flax import from_linen, from_nnx, update_nnx

K = 8


class BatchNormState(TrainState):
    batch_stats: Any
    key: jax.Array


class LinenCnn(nn.Module):
    """A CNN with optional BatchNorm and dropout for two classes."""

    has_batch_norm: bool = True
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        if self.has_batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x).mean((1, 2))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(2)(x)


class NnxCnn(nnx.Module):
    """The same CNN in NNX."""

    def __init__(self, rate=0.0, *, rngs):
        self.Conv_0 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.BatchNorm_0 = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.Dense_0 = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.BatchNorm_0(self.Conv_0(x))).mean((1, 2))
        return self.Dense_0(self.dropout(x))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen_step(state, batch):
    """A train step as in the Flax examples."""
    images, labels = batch

    def loss_fn(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
            mutable="batch_stats",
        )
        return cross_entropy(logits, labels), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **updates), {"loss": loss}


def nnx_step(model, optimizer, batch):
    images, labels = batch
    loss, grads = nnx.value_and_grad(
        lambda model: cross_entropy(model(images), labels)
    )(model)
    optimizer.update(model, grads)
    return {"loss": loss}


def linen_state(model, tx):
    variables = model.init(jax.random.key(0), jnp.ones((1, 6, 6, 1)), train=False)
    return BatchNormState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        key=jax.random.key(1),
        tx=tx,
    )


def model_and_optimizer(tx, rate=0.0, wrt=nnx.Param):
    model = NnxCnn(rate, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=wrt)


def examples(count=256, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count)
    pixels = rng.normal(size=(count, 6, 6, 1)) + labels[:, None, None, None]
    return pixels.astype(np.float32), labels.astype(np.int32)


def make_batches(steps, batch=4, workers=K):
    stream = lsgd.shuffled_batches(examples(), workers=workers, batch=batch)
    return list(itertools.islice(stream, steps))


def train(cluster, start, batches, every=2):
    state, losses = cluster.init(start), []
    for batch in batches:
        state, metrics = cluster.step(state, batch)
        losses.append(metrics["loss"])
        state = cluster.sync(state) if int(state.step) % every == 0 else state
    return state, np.stack(losses)


@pytest.mark.full
def test_linen_and_nnx_match():
    tx = optax.adam(0.01)
    start = linen_state(LinenCnn(), tx)
    model, optimizer = model_and_optimizer(tx)
    nnx.update(model, {**start.params})
    linen, first = from_linen(linen_step, start, lsgd.average())
    other, second = from_nnx(nnx_step, model, optimizer, rule=lsgd.average())
    batches = make_batches(6)
    left, losses = train(lsgd.simulate(linen, K), first, batches)
    right, nnx_losses = train(lsgd.simulate(other, K), second, batches)
    np.testing.assert_allclose(nnx_losses, losses, rtol=1e-5, atol=1e-6)
    left, right = lsgd.consensus(left, None), lsgd.consensus(right, None)
    assert_close(right.params, dict(left.params), rtol=1e-4, atol=1e-5)
    assert_close(right.batch_stats, dict(left.batch_stats), rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("placement", keep(["mesh", "lanes", "lanes_map"], ["lanes"]))
@pytest.mark.parametrize("kind", keep(["linen", "nnx"], ["nnx"]))
def test_dropout_masks_differ_between_workers_not_placements(kind, placement):
    """Losses under dropout with rate one half, of equal images on all workers."""
    made, start = {
        "linen": lambda: from_linen(
            linen_step, linen_state(LinenCnn(rate=0.5), optax.sgd(0.0)), lsgd.average()
        ),
        "nnx": lambda: from_nnx(
            nnx_step,
            *model_and_optimizer(optax.sgd(0.0), rate=0.5),
            rule=lsgd.average(),
        ),
    }[kind]()
    same = jax.tree.map(lambda x: np.stack([x[:16]] * K), examples())
    _, expected = train(PLACEMENTS["simulate"](made), start, [same] * 3)
    _, losses = train(PLACEMENTS[placement](made), start, [same] * 3)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # Equal masks would give equal losses; all 24 losses differ.
    assert len(np.unique(expected.round(6))) == 3 * K


@pytest.mark.full
def test_sync_every_step_with_sgd_matches_large_batch():
    """Without BatchNorm K workers with batch size 4 equal one with batch size 4 K."""
    start = linen_state(LinenCnn(has_batch_norm=False), optax.sgd(0.1))
    made, _ = from_linen(linen_step, start, lsgd.average())
    batches = make_batches(50)
    cluster = lsgd.on_mesh(made, mesh(worker=K))
    state, _ = train(cluster, start, batches, every=1)
    step = jax.jit(linen_step)
    for pixels, labels in batches:
        start, _ = step(start, (pixels.reshape(-1, 6, 6, 1), labels.reshape(-1)))
    assert_close(lsgd.consensus(state), start.params, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", keep(["linen", "nnx"], ["nnx"]))
def test_default_rules_per_field(kind):
    """Parameters and statistics are synchronised; moments and counts are not."""
    tx = optax.adam(0.01)
    made, start = (
        from_linen(linen_step, linen_state(LinenCnn(), tx))
        if kind == "linen"
        else from_nnx(nnx_step, *model_and_optimizer(tx))
    )
    cluster = lsgd.simulate(made, K)
    state, _ = train(cluster, start, make_batches(3), every=9)
    after = cluster.sync(state).workers
    before = state.workers
    norm = jax.tree.map(np.float64, before.batch_stats["BatchNorm_0"])
    merged = after.batch_stats["BatchNorm_0"]
    union = norm["var"].mean(0) + norm["mean"].var(0)
    np.testing.assert_allclose(merged["var"], np.stack([union] * K), rtol=1e-5)
    kernel = np.asarray(before.params["Dense_0"]["kernel"]).mean(0)
    np.testing.assert_allclose(
        after.params["Dense_0"]["kernel"], np.stack([kernel] * K), rtol=1e-5, atol=1e-7
    )
    assert_same(after.opt_state, before.opt_state)


def test_given_rules_override_defaults():
    start = linen_state(LinenCnn(), optax.adam(0.01))
    rules = {
        "params": lsgd.average(),
        "batch_stats": lsgd.identity(),
        "opt_state": lsgd.floating_only(lsgd.average()),
    }
    cluster = lsgd.simulate(from_linen(linen_step, start, rules)[0], K)
    state, _ = train(cluster, start, make_batches(3), every=9)
    after = cluster.sync(state).workers
    assert_same(after.batch_stats, state.workers.batch_stats)
    moment = after.opt_state[0].mu["Dense_0"]["kernel"]
    np.testing.assert_array_equal(moment, np.broadcast_to(moment[0], moment.shape))
    assert after.opt_state[0].count.tolist() == [3] * K


def test_consensus_returns_a_usable_train_state():
    start = linen_state(LinenCnn(), optax.adam(0.01))
    made, _ = from_linen(linen_step, start, lsgd.average())
    state, _ = train(lsgd.simulate(made, K), start, make_batches(4))
    merged = lsgd.consensus(state, None)
    assert type(merged) is BatchNormState and int(merged.step) == 4
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, start)
    again, metrics = jax.jit(linen_step)(merged, examples(8))
    assert int(again.step) == 5 and np.isfinite(metrics["loss"])


def test_update_nnx_writes_consensus_into_model_and_optimizer():
    model, optimizer = model_and_optimizer(optax.adam(0.01))
    made, start = from_nnx(nnx_step, model, optimizer, rule=lsgd.average())
    state, _ = train(lsgd.simulate(made, K), start, make_batches(4))
    merged = lsgd.consensus(state, None)
    update_nnx(merged, model, optimizer)
    kernel = merged.params["Dense_0"]["kernel"]
    np.testing.assert_array_equal(model.Dense_0.kernel[...], kernel)
    assert int(optimizer.step[...]) == 4
    assert_same(from_nnx(nnx_step, model, optimizer, rule=lsgd.average())[1], merged)
    update_nnx(start, model)
    assert int(optimizer.step[...]) == 4
    metrics = nnx.jit(nnx_step)(model, optimizer, examples(8))
    assert np.isfinite(metrics["loss"])


@pytest.mark.full
def test_nnx_jit_does_not_change_the_result():
    results = []
    for step in (nnx_step, nnx.jit(nnx_step)):
        made, start = from_nnx(
            step, *model_and_optimizer(optax.sgd(0.1), 0.2), rule=lsgd.average()
        )
        results.append(train(lsgd.simulate(made, K), start, make_batches(3)))
    assert_close(*results)


def test_params_are_the_variables_selected_by_optimizer():
    wrt = nnx.All(nnx.Param, nnx.PathContains("Dense_0"))

    def train_step(model, optimizer, batch):
        pixels, labels = batch
        select = nnx.DiffState(0, optimizer.wrt)
        loss, grads = nnx.value_and_grad(
            lambda model: cross_entropy(model(pixels), labels), argnums=select
        )(model)
        optimizer.update(model, grads)
        return {"loss": loss}

    parts = model_and_optimizer(optax.sgd(0.1), wrt=wrt)
    made, start = from_nnx(train_step, *parts, rule=lsgd.average())
    assert list(start.params) == ["Dense_0"] and "Conv_0" in start.other
    state, _ = train(lsgd.simulate(made, K), start, make_batches(2))
    conv = state.workers.other["Conv_0"]["kernel"]
    np.testing.assert_array_equal(conv[3], start.other["Conv_0"]["kernel"])


def test_evaluation_receives_eval_fields():
    model = LinenCnn()
    start = linen_state(model, optax.adam(0.01))
    made, _ = from_linen(linen_step, start, lsgd.average())
    pixels, labels = examples(64, seed=1)

    def evaluate(variables):
        assert set(variables) == {"params", "batch_stats"}
        logits = model.apply(variables, pixels, train=False)
        return {"accuracy": (logits.argmax(-1) == labels).mean()}

    cluster = lsgd.simulate(made, K)
    _, history = lsgd.train(
        cluster,
        cluster.init(start),
        make_batches(60),
        schedule=4,
        evaluate=evaluate,
        eval_fields=("params", "batch_stats"),
        evaluate_every=15,
        progress=False,
    )
    assert history["accuracy"][-1] > 0.9


def test_raw_key_raises():
    start = linen_state(LinenCnn(), optax.sgd(0.1))
    raw = start.replace(key=jax.random.key_data(jax.random.key(0)))
    with pytest.raises(TypeError, match=r"field 'key' has a raw PRNG key at \.key"):
        from_linen(linen_step, raw, lsgd.average())


def test_rule_for_missing_field_raises():
    start = linen_state(LinenCnn(), optax.sgd(0.1))
    made, _ = from_linen(linen_step, start, {"parameters": lsgd.average()})
    with pytest.raises(ValueError, match="'parameters': the train state has no such"):
        lsgd.simulate(made, 2).init(start)


def test_missing_flax_raises_with_install_command(monkeypatch):
    parts = model_and_optimizer(optax.sgd(0.1))
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"from_nnx\(\) needs flax: pip install flax"):
        from_nnx(nnx_step, *parts, rule=lsgd.average())


def test_import_does_not_need_flax():
    code = (
        "import sys, localsgd_jax, localsgd_jax.flax; "
        "assert not {'flax', 'orbax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
