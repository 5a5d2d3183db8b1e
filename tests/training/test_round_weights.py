"""Weights of workers by the round and by a metric, against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import WORKERS, assert_close, batches, loss_fn, mesh, network
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.fault_tolerance.report import RoundReport
from localsgd_jax.fault_tolerance.rounds import _round_weight
from localsgd_jax.training.round_weights import RoundWeights

PLACEMENTS = {
    "simulate": lambda made: lsgd.simulate(made, WORKERS),
    "lanes": lambda made: lsgd.on_mesh(made, mesh(worker=2), workers=WORKERS),
}


def token_algorithm(rule=None):
    """Returns local SGD with a step that reports tokens of the batch."""

    def loss_with_tokens(params, batch):
        tokens = jnp.sum(jnp.abs(batch[1]) > 0.5)
        return loss_fn(params, batch), {"tokens": tokens}

    rule = rule or lsgd.average()
    made = lsgd.local_sgd(loss_with_tokens, optax.sgd(0.05), rule, has_aux=True)

    def step(worker, batch):
        worker, metrics = made.step(worker, batch)
        return worker, {"loss": metrics["loss"], **metrics["aux"]}

    return made._replace(step=step)


def by_round(number):
    return (np.arange(WORKERS) + number) % 4.0


def loop(weight_of, rule=None, steps=11, period=4):
    """Trains in a plain loop; `weight_of(round, tokens)` are the weights."""
    cluster = lsgd.simulate(token_algorithm(rule), WORKERS)
    state, tokens = cluster.init(network()), 0
    for batch in batches(steps):
        state, metrics = cluster.step(state, batch)
        tokens = tokens + np.asarray(metrics["tokens"], np.float64)
        if int(state.step) % period == 0 or int(state.step) == steps:
            weight = weight_of(int(state.round) + 1, tokens)
            state, tokens = cluster.sync(state, weight), 0
    return state


def train(weights, placement="simulate", rule=None, **options):
    cluster = PLACEMENTS[placement](token_algorithm(rule))
    options = {"schedule": 4, "progress": False} | options
    state = cluster.init(network())
    return lsgd.train(cluster, state, batches(11), weights=weights, **options)[0]


SIZES = [in_full(64), in_full(2), 3]  # A round is part of a dispatch, or longer.


@pytest.mark.parametrize("placement", [in_full("simulate"), "lanes"])
@pytest.mark.parametrize("size", SIZES)
def test_weights_may_be_a_function_of_the_round(size, placement):
    state = train(by_round, placement, max_steps_per_dispatch=size)
    assert_close(state.workers, loop(lambda r, tokens: by_round(r)).workers)


@pytest.mark.parametrize("placement", [in_full("simulate"), "lanes"])
@pytest.mark.parametrize("size", SIZES)
def test_weights_may_be_a_metric(size, placement):
    state = train("tokens", placement, max_steps_per_dispatch=size)
    assert_close(state.workers, loop(lambda r, tokens: tokens).workers)


def test_formula_of_tokens_and_steps():
    weights = lsgd.weighted_by("tokens", lambda tokens, steps: tokens**2 / steps)
    expected = loop(lambda r, tokens: tokens**2)
    assert_close(train(weights).workers, expected.workers)
    assert repr(weights).startswith("weighted_by('tokens', formula=test_formula")


@pytest.mark.full
def test_metric_with_a_rule_that_chooses_by_the_round():
    rule = lsgd.fragment(lsgd.diloco(), 2)
    state = train("tokens", "lanes", rule)
    assert_close(state.workers, loop(lambda r, tokens: tokens, rule).workers)


@pytest.mark.parametrize(
    "size", [in_full(64), 3]
)  # A round is part of a dispatch, or longer.
def test_without_weights_a_count_of_tokens_is_the_weight(size):
    state = train(None, "lanes", max_steps_per_dispatch=size)
    assert_close(state.workers, loop(lambda r, tokens: tokens).workers)
    ones = train(np.ones(WORKERS), "lanes", max_steps_per_dispatch=size)
    expected = loop(lambda r, tokens: np.ones(WORKERS))
    assert_close(ones.workers, expected.workers)


def test_counts_by_name():
    values = jnp.ones((3, WORKERS))
    weights = RoundWeights(None, WORKERS)
    for name in ("tokens", "examples"):
        metrics = {"loss": values, name: 2 * values}
        for tree in (metrics, {"loss": values, "aux": {name: 2 * values}}):
            totals = weights.add(weights.add(None, tree), tree)
            np.testing.assert_array_equal(weights.weight(None, totals), 12.0)
    both = weights.add(None, {"examples": values, "tokens": 2 * values})
    np.testing.assert_array_equal(weights.weight(None, both), 6.0)
    assert weights.weight(None, weights.add(None, {"loss": values})) is None
    given = RoundWeights(np.ones(WORKERS), WORKERS)
    assert given.add(None, {"tokens": values}) is None


@pytest.mark.parametrize("weights", [None, "aux.examples"])
def test_unequal_batches_with_padding_and_masks(weights):
    """Local SGD with H = 1 equals a step on the union of all examples."""
    sizes, rng = np.array([1, 4, 2, 3]), np.random.default_rng(0)
    x = rng.normal(size=(4, 4, 3)).astype(np.float32)
    mask = (np.arange(4)[None] < sizes[:, None]).astype(np.float32)

    def masked_loss(w, batch):
        x, mask = batch
        examples = jnp.sum(mask)
        loss = jnp.sum(mask * jnp.sum((x - w[None]) ** 2, axis=1)) / examples
        return loss, {"examples": examples}

    made = lsgd.local_sgd(masked_loss, optax.sgd(0.1), lsgd.average(), has_aux=True)
    cluster = lsgd.simulate(made, 4)
    state, _ = lsgd.train(
        cluster,
        cluster.init(jnp.zeros(3)),
        [(x, mask)],
        schedule=1,
        weights=weights,
        progress=False,
    )
    union = np.concatenate([x[k, : sizes[k]] for k in range(4)]).astype(np.float64)
    np.testing.assert_allclose(state.workers.params[0], 0.2 * union.mean(0), rtol=1e-5)


def test_weights_of_a_fault_tolerant_round():
    """Rows of the batches without the metric "examples"; else its sum."""
    report = RoundReport(4, 0.5, 0, 0, {"loss": 1.0, "tokens": 8.0})
    by_tokens, by_examples = map(lsgd.weighted_by, ("tokens", "examples"))
    assert _round_weight(None, report, 12) == 32
    assert _round_weight(by_tokens, report, 12) == 32
    assert _round_weight(by_examples, report, 12) == 12
    counted = report._replace(metrics={"examples": 2.5})
    assert _round_weight(by_examples, counted, 12) == 10
    assert _round_weight(None, counted, 12) == 10
    assert _round_weight(None, report._replace(metrics={"loss": 1.0}), 12) == 12
    squared = lsgd.weighted_by("tokens", lambda total, steps: total**2 / steps)
    assert _round_weight(squared, report, 12) == 256
    assert _round_weight(by_tokens, report._replace(steps=0), 0) == 0
    with pytest.raises(ValueError, match="'tokens' must be a metric"):
        _round_weight(by_tokens, counted, 12)


def test_a_later_run_does_not_continue_the_sum_of_a_failed_one():
    """The programs of a run are kept; the sum of its incomplete round is not."""
    cluster = PLACEMENTS["simulate"](token_algorithm())

    def run(source, **options):
        state = cluster.init(network())
        options = {"schedule": 4, "weights": "tokens", "progress": False} | options
        return lsgd.train(cluster, state, source, max_steps_per_dispatch=2, **options)

    def failing():
        yield from batches(2, seed=9)
        raise OSError

    with pytest.raises(OSError):
        run(failing())
    assert_close(run(batches(11))[0].workers, loop(lambda r, tokens: tokens).workers)


def test_processes_compare_weights():
    texts = [
        RoundWeights(weights, WORKERS).fingerprint(1)
        for weights in (None, by_round, "tokens", np.ones(WORKERS))
    ]
    assert len(set(texts)) == 4 and not any("0x" in text for text in texts)


@pytest.mark.parametrize(
    "weights, error, message",
    [
        ("examples", ValueError, r"train\(weights\): 'examples' must be a metric"),
        (lambda r: np.ones(3), ValueError, "weight must have shape"),
        (lambda r: None, ValueError, "weights of round 1"),
        (
            lambda r: -np.ones(WORKERS),
            ValueError,
            r"must be 0 or in .*got -1.0 for worker 0",
        ),
        (np.ones(3), ValueError, "weight must have shape"),
    ],
)
def test_invalid_weights_raise(weights, error, message):
    with pytest.raises(error, match=message):
        train(weights)


def test_invalid_arguments_of_weighted_by_raise():
    with pytest.raises(TypeError, match=r"weighted_by\(metric\)"):
        lsgd.weighted_by(3)
    with pytest.raises(TypeError, match=r"weighted_by\(formula\)"):
        lsgd.weighted_by("tokens", 2)
    assert jax.tree.leaves(RoundWeights(None, 2).initial_totals()) == []


def count_algorithm(count):
    """Returns an algorithm with a step that reports `count(batch)` as tokens."""

    def step(state, batch):
        return {"params": state["params"] - batch}, {"tokens": count(batch)}

    return lsgd.from_train_step(step)


WRONG_COUNTS = [(np.nan, "nan"), (np.inf, "inf"), (-1.0, "-"), (1e38, ".*e")]


@pytest.mark.parametrize(
    "value, text", [WRONG_COUNTS[0], *(in_full(*case) for case in WRONG_COUNTS[1:])]
)
@pytest.mark.parametrize("steps", [2, in_full(1)])
def test_wrong_weights_by_a_metric_raise(value, text, steps):
    cluster = lsgd.simulate(count_algorithm(lambda batch: batch), workers=2)
    batch, rows = np.float32([1, value]), []
    with pytest.raises(
        ValueError, match=r"weighted_by\('tokens'\) in round 2: a weight"
    ):
        lsgd.train(
            cluster,
            cluster.init({"params": 0.0}),
            [np.ones(2, np.float32)] * 2 + [batch] * steps,
            schedule=2,
            on_round_end=rows.append,
            progress=False,
        )
    assert [row["step"] for row in rows] == ([2, 4] if steps == 2 else [2])
