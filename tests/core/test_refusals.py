"""Input that would give wrong numbers without an error raises."""

import itertools
import random

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import mesh

import localsgd_jax as lsgd
from localsgd_jax.core.validation import check_weights
from localsgd_jax.fault_tolerance.rounds import _mean_metrics
from localsgd_jax.training.columns import check_column_names

BATCHES = [np.arange(4, dtype="f4")] * 4
WITHOUT_CONSENSUS = {
    "gossip": lsgd.gossip(),
    "identity": lsgd.identity(),
    "when": lsgd.when(lsgd.every(2), lsgd.average()),
    "interpolate": lsgd.interpolate(lsgd.average(), 0.5),
    "elastic_average": lsgd.elastic_average(),
    "overlap": lsgd.overlap(lsgd.average()),
}


def run(rule=None, schedule=2, **options):
    made = lsgd.local_sgd(
        lambda w, b: (w - b) ** 2, optax.sgd(0.1), rule or lsgd.average()
    )
    cluster = lsgd.simulate(made, 4)
    state = cluster.init(jnp.zeros(()))
    return lsgd.train(
        cluster, state, BATCHES, schedule=schedule, progress=False, **options
    )


@pytest.mark.parametrize("inner", WITHOUT_CONSENSUS)
@pytest.mark.parametrize(
    "outside", ["ema", "drop_outliers", "outer", "with_diagnostics"]
)
def test_rules_without_consensus_raise(outside, inner):
    make = {
        "ema": lsgd.ema,
        "drop_outliers": lsgd.drop_outliers,
        "with_diagnostics": lsgd.with_diagnostics,
        "outer": lambda rule: lsgd.outer(optax.sgd(1.0), rule),
    }[outside]
    made = lsgd.local_sgd(
        lambda w, b: (w - b) ** 2, optax.sgd(0.1), make(WITHOUT_CONSENSUS[inner])
    )
    for cluster in (lsgd.simulate(made, 4), lsgd.on_mesh(made, mesh(worker=4))):
        state = cluster.init(jnp.zeros(()))
        with pytest.raises(ValueError, match="must make all workers equal"):
            cluster.sync(state, np.ones(4))


def test_rules_over_one_of_two_axes_raise():
    rule = lsgd.ema(lsgd.average("worker"))
    made = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1), rule)
    cluster = lsgd.simulate(made, (2, 2), axis=("pod", "worker"))
    with pytest.raises(ValueError, match=r"ema\(rule\): the rule must make all"):
        cluster.sync(cluster.init(jnp.zeros(())))


@pytest.mark.parametrize(
    "weights, error, message",
    [
        ([1e300] * 4, ValueError, "must be 0 or in .*got 1e.300 for worker 0"),
        ([1e38] * 4, ValueError, "must be 0 or in .*got 1e.38 for worker 0"),
        ([0, 3e38, 0, 0], ValueError, "must be 0 or in .*got 3e.38 for worker 1"),
        ([1, 1, 1e-300, 1], ValueError, "must be 0 or in .*got 1e-300 for worker 2"),
        ([1e-40] * 4, ValueError, "must be 0 or in .*got 1e-40"),
        ([1j] * 4, TypeError, "weights must be real"),
        (["a"] * 4, TypeError, "weights must be numbers"),
        ([np.nan] * 4, ValueError, "must be 0 or in .*got nan for worker 0"),
        ([-1, 1, 1, 1], ValueError, "must be 0 or in .*got -1 for worker 0"),
    ],
)
def test_weights_out_of_range_raise(weights, error, message):
    with pytest.raises(error, match=message):
        check_weights(np.array(weights), 4)


def test_weights_in_range():
    for weights in ([0, 1, 0, 2], [True, False, True, True], [1e20] * 4, [1e-20] * 4):
        assert check_weights(np.array(weights), 4).dtype == jnp.float32


@pytest.mark.parametrize("scale", [1e-20, 1e19])
@pytest.mark.parametrize("size", [1e-10, 1e10])
def test_means_with_extreme_weights_are_exact(scale, size):
    algorithm = lsgd.from_train_step(lambda state, batch: {"params": batch})
    cluster = lsgd.simulate(algorithm, 4)
    rows = jnp.arange(1, 5, dtype=jnp.float32) * size
    state, _ = cluster.step(cluster.init({"params": 0.0}), rows)
    weights = np.arange(1, 5, dtype=np.float64)
    mean = cluster.sync(state, scale * weights).workers["params"]
    np.testing.assert_allclose(mean, np.full(4, 3 * size), rtol=1e-6)


COLUMNS = ("step", "round", "bytes", "seconds", "device_bytes")


@pytest.mark.parametrize("name", COLUMNS)
def test_metrics_named_like_columns_raise_before_a_step_has_run(name):
    def step(state, batch):
        return state, {name: batch}

    made = lsgd.from_train_step(step, lsgd.average())
    cluster = lsgd.simulate(made, 4)
    rows = []
    with pytest.raises(ValueError, match=rf"train\(\): metrics: .*got '{name}'"):
        lsgd.train(
            cluster,
            cluster.init({"params": jnp.zeros(())}),
            BATCHES,
            schedule=2,
            progress=False,
            on_round_end=rows.append,
        )
    assert not rows


@pytest.mark.parametrize("name", [*COLUMNS, "loss"])
def test_evaluations_named_like_columns_get_a_prefix(name):
    _, plain = run()
    _, history = run(evaluate=lambda params: {name: -1.0, "other": -2.0})
    assert list(history[f"evaluate.{name}"]) == [-1.0] * len(plain["step"])
    assert list(history["other"]) == [-2.0] * len(plain["step"])
    if name in ("step", "round", "bytes", "loss"):
        np.testing.assert_array_equal(history[name], plain[name])


def test_metrics_named_like_those_of_rules_raise():
    def step(state, batch):
        return state, {"cosine": batch}

    made = lsgd.from_train_step(step, lsgd.with_diagnostics(lsgd.average()))
    cluster = lsgd.simulate(made, 4)
    state = cluster.init({"params": jnp.zeros(())})
    with pytest.raises(ValueError, match=r"train\(\): metrics: .*got 'cosine'"):
        lsgd.train(cluster, state, BATCHES, schedule=2, progress=False)


def test_columns_of_fault_tolerant_training_are_reserved():
    state = lsgd.State(jnp.int32(0), jnp.int32(0), {}, {}, {})
    for name in ("steps", "straggler", "bytes"):
        with pytest.raises(ValueError, match=rf"metrics: .*got '{name}'"):
            _mean_metrics({name: jnp.ones((2, 4))}, state)
    check_column_names("train()", ["loss", "accuracy"])


def test_two_metrics_of_one_name_raise():
    def step(state, batch):
        return state, {"a": {"b": batch}, "a.b": batch}

    cluster = lsgd.simulate(lsgd.from_train_step(step, lsgd.average()), 4)
    state = cluster.init({"params": jnp.zeros(())})
    with pytest.raises(ValueError, match=r"every name must occur once, got 'a.b'"):
        lsgd.train(cluster, state, BATCHES, schedule=2, progress=False)


CALLS = itertools.count()
PREDICATES = [
    (lambda t: None, TypeError, "must return a bool .*, got None"),
    (lambda t: t % 2, TypeError, "must return a bool"),
    (lambda t: random.random() < 0.5, ValueError, "must return the same"),
    (lambda t: next(CALLS) % 4 == 0, ValueError, "must return the same"),
]


@pytest.mark.parametrize("predicate, error, message", PREDICATES)
def test_predicates_without_a_bool_or_with_chance_raise(predicate, error, message):
    with pytest.raises(error, match=r"train\(schedule\): it " + message):
        run(schedule=predicate)
    with pytest.raises(error, match=r"when\(schedule\): it " + message):
        run(lsgd.when(predicate, lsgd.average()))
    made = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1), lsgd.average())
    with pytest.raises(error, match=r"gated\(schedule\): it " + message):
        lsgd.gated(lsgd.simulate(made, 4), predicate)


def test_empty_dict_of_rules_raises():
    with pytest.raises(ValueError, match=r"at least one field must have a rule"):
        lsgd.local_sgd(lambda w, b: w, optax.sgd(0.1), {})


def test_update_that_ignores_the_batch_raises():
    statistics = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"update\): .* \['mean'\] must depend on the"):
        lsgd.recompute_batch_stats(lambda s, b: s, statistics, [jnp.ones(3)])
