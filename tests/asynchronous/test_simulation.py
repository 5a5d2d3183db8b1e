"""Simulation on the virtual clock against Algorithm 2 and synchronous Local SGD."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import reference_sgd
from harness.asynchronous_cases import (
    DIMENSION,
    TRACES,
    float32_batches,
    gaussian_batches,
    integer_batches,
    linear_loss,
    make_algorithm,
)
from harness.cases import assert_close, assert_same
from harness.reference_sgd import logistic_loss, quadratic_loss, step_size
from harness.selection import in_full, keep

import localsgd_jax as lsgd
from localsgd_jax import asynchronous


def algorithm_2(gradient, x0, batches, counts, due, clocks, delays):
    """Algorithm 2 in NumPy float64, written from its pseudocode, in order of time.

    Args:
      clocks: clocks[k][t] is the time at which worker k completes its step t + 1.
      delays: delays[t][k] is the delay of an update pushed at that time.

    Returns:
      z, the workers' x, and the value that each worker last pulled.
    """
    workers = len(counts)
    z = np.array(x0, np.float64)
    x, r = [np.array([z] * workers) for _ in range(2)]
    done, in_flight = [0] * workers, []
    while in_flight or any(done[k] < counts[k] for k in range(workers)):
        steps = [clocks[k][done[k]] for k in range(workers) if done[k] < counts[k]]
        now = min(steps + [applied for applied, _ in in_flight])
        pulling = []
        for k in range(workers):
            t = done[k]
            if t == counts[k] or clocks[k][t] != now:
                continue
            batch = tuple(part[t][k] for part in batches)
            x[k] = x[k] - step_size(t) * gradient(x[k], *batch)
            done[k] += 1
            if done[k] in due[k] or done[k] == counts[k]:
                in_flight.append((now + delays[t][k], x[k] - r[k]))
                pulling.append(k)
        for _, update in [entry for entry in in_flight if entry[0] <= now]:
            z = z + update / workers
        in_flight = [entry for entry in in_flight if entry[0] > now]
        for k in pulling:
            x[k] = r[k] = z
    return z, x, r


PROBLEMS = {
    "quadratic": (quadratic_loss, reference_sgd.quadratic_gradient),
    "logistic": (logistic_loss, reference_sgd.logistic_gradient),
}
FAST_TRACES = ("schedules per worker", "steps per worker", "random")


@pytest.mark.parametrize(
    "problem, name",
    [
        ("logistic", name) if name in FAST_TRACES else in_full("logistic", name)
        for name in TRACES
    ]
    + [("quadratic", "random, long delay"), in_full("quadratic", "random")],
)
def test_simulation_matches_algorithm_2(problem, name):
    arguments, workers, start = TRACES[name], 4, np.linspace(-1, 1, DIMENSION)
    loss_fn, gradient = PROBLEMS[problem]
    batches = gaussian_batches(12, workers)
    counts = np.broadcast_to(arguments["steps"], workers)
    speeds = np.asarray(arguments.get("speed", 1.0))
    if speeds.ndim == 2:
        clocks = np.cumsum(1 / speeds, axis=0).T
    else:
        clocks = np.arange(1, 13) / np.broadcast_to(speeds, workers)[:, None]
    schedule = arguments["schedule"]
    schedules = schedule if isinstance(schedule, list) else [schedule] * 4
    due = [
        {t for t in range(1, 13) if (t % h == 0 if isinstance(h, int) else h(t))}
        for h in schedules
    ]
    delays = np.broadcast_to(arguments.get("delay", 0.0), (12, workers))
    z, x, r = algorithm_2(gradient, start, batches, counts, due, clocks, delays)
    with jax.enable_x64(True):
        events = asynchronous.simulate_events(workers, **arguments)
        cluster = asynchronous.simulate(make_algorithm(loss_fn), events)
        state, metrics = cluster.run(cluster.init(start), batches)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
        close(state.aggregate, z)
        close(state.workers.params, x)
        close(state.last_read, r)
    assert metrics["loss"].shape == (sum(counts),)


@pytest.mark.parametrize("workers", keep([1, 4], [4]))
@pytest.mark.parametrize(
    "schedule",
    [
        in_full(lsgd.every(1), id="every(1)"),
        in_full(lsgd.every(4), id="every(4)"),
        pytest.param(lsgd.at_steps([2, 3, 7, 12]), id="at_steps"),
    ],
)
def test_equal_speeds_without_delay_match_algorithm_1(workers, schedule):
    start, batches = np.linspace(-1, 1, DIMENSION), gaussian_batches(12, workers)
    each, due = list(zip(*batches, strict=True)), set(schedule.steps(12))
    expected = reference_sgd.reference_local_sgd(
        reference_sgd.logistic_gradient, start, each, step_size, due
    )
    with jax.enable_x64(True):
        events = asynchronous.simulate_events(workers, 12, schedule, speed=3)
        cluster = asynchronous.simulate(make_algorithm(logistic_loss), events)
        state, metrics = cluster.run(cluster.init(start), batches)
        for x in (*state.workers.params, *state.last_read, state.aggregate):
            np.testing.assert_allclose(x, expected[-1][0], rtol=1e-12, atol=1e-12)
        losses = [
            logistic_loss(x, (a, b))
            for xs, rows, labels in zip(expected, *batches, strict=False)
            for x, a, b in zip(xs, rows, labels, strict=True)
        ]
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-12)


def test_equal_speeds_without_delay_match_synchronous_adam():
    algorithm = make_algorithm(quadratic_loss, optax.adam(0.05))
    batches = float32_batches(12, 4)
    events = asynchronous.simulate_events(4, 12, 4)
    asynchronously = asynchronous.simulate(algorithm, events)
    state = asynchronously.init(jnp.ones(DIMENSION))
    state, metrics = asynchronously.run(state, batches)
    cluster = lsgd.simulate(algorithm, 4)
    step = lsgd.gated(cluster, lsgd.every(4))
    expected, losses = jax.lax.scan(step, cluster.init(jnp.ones(DIMENSION)), batches)
    assert_close(state.workers, expected.workers)
    assert_close(metrics["loss"].reshape(12, 4), losses["loss"])


def test_single_worker_matches_optax():
    optimizer = optax.adam(0.05)
    batches = jax.tree.map(jnp.asarray, float32_batches(10, 1))
    events = asynchronous.simulate_events(1, 10, 3, speed=0.7)
    cluster = asynchronous.simulate(make_algorithm(quadratic_loss, optimizer), events)
    state, _ = cluster.run(cluster.init(jnp.ones(DIMENSION)), batches)
    params, opt_state = jnp.ones(DIMENSION), optimizer.init(jnp.ones(DIMENSION))

    @jax.jit
    def step(params, opt_state, batch):
        grad = jax.grad(quadratic_loss)(params, batch)
        updates, opt_state = optimizer.update(grad, opt_state)
        return optax.apply_updates(params, updates), opt_state

    for t in range(10):
        batch = jax.tree.map(lambda x, t=t: x[t, 0], batches)
        params, opt_state = step(params, opt_state, batch)
    assert_close(state.aggregate, params)


@pytest.mark.parametrize(
    "name",
    keep(
        [
            "delay above period",
            "delayed and slow",
            "steps per worker",
            "random, long delay",
        ],
        ["steps per worker", "random, long delay"],
    ),
)
def test_every_update_is_applied_once(name):
    events = asynchronous.simulate_events(4, **TRACES[name])
    algorithm = make_algorithm(linear_loss, optax.sgd(1.0))
    cluster = asynchronous.simulate(algorithm, events)
    batches = integer_batches(12, 4)
    state, _ = cluster.run(cluster.init(jnp.ones(3)), batches)
    steps = np.broadcast_to(TRACES[name]["steps"], 4)
    total = sum(batches[:count, k].sum(axis=0) for k, count in enumerate(steps))
    np.testing.assert_array_equal(state.aggregate, 1 - total / 4)


def test_aggregate_of_bfloat16_params_is_float32():
    # In bfloat16 1 + 2⁻¹⁰ equals 1, so eight such updates would all be lost.
    params = {"w": jnp.ones(3, jnp.bfloat16)}

    def loss_fn(params, batch):
        return jnp.sum(params["w"].astype(jnp.float32) * batch)

    algorithm = make_algorithm(loss_fn, optax.sgd(2.0**-7))
    batches = np.full((1, 8, 3), -1, np.float32)
    events = asynchronous.simulate_events(8, 1, 1, speed=range(1, 9))
    for cluster, options in (
        (asynchronous.simulate(algorithm, events), {}),
        (asynchronous.on_threads(algorithm, jax.devices()[:8]), {"schedule": 1}),
    ):
        state, _ = cluster.run(cluster.init(params), batches, **options)
        np.testing.assert_array_equal(state.aggregate["w"], 1 + np.float32(2.0**-7))
        assert state.aggregate["w"].dtype == jnp.float32
        assert state.workers.params["w"].dtype == jnp.bfloat16


def test_simulation_is_deterministic():
    batches = float32_batches(12, 4)

    def run(seed):
        speeds = asynchronous.random_speeds(4, 12, 0.5, seed=seed)
        events = asynchronous.simulate_events(4, 12, 3, speed=speeds, delay=0.5)
        cluster = asynchronous.simulate(make_algorithm(logistic_loss), events)
        return cluster.run(cluster.init(jnp.ones(DIMENSION)), batches)

    first = run(0)
    assert_same(first, run(0))
    assert (first[0].aggregate != run(1)[0].aggregate).any()


def test_run_is_one_program_with_one_loop():
    traces = []

    def loss_fn(x, batch):
        traces.append(1)
        return quadratic_loss(x, batch)

    events = asynchronous.simulate_events(4, 12, 3, speed=[1, 1, 1, 0.25])
    cluster = asynchronous.simulate(make_algorithm(loss_fn), events)
    state = cluster.init(jnp.ones(DIMENSION))
    batches = float32_batches(12, 4)
    jaxpr = str(jax.make_jaxpr(cluster.run)(state, batches))
    assert jaxpr.count("scan[") == 1 and jaxpr.count("cond[") == 1
    state, _ = cluster.run(state, batches)
    before = len(traces)
    cluster.run(state, batches)
    assert len(traces) == before


def test_consecutive_runs_continue():
    algorithm = make_algorithm(quadratic_loss, optax.adam(0.05))
    batches = float32_batches(12, 4)
    full, half = (
        asynchronous.simulate(algorithm, asynchronous.simulate_events(4, steps, 3))
        for steps in (12, 6)
    )
    start = full.init(jnp.ones(DIMENSION))
    expected, _ = full.run(start, batches)
    state = start
    for part in (slice(0, 6), slice(6, 12)):
        state, _ = half.run(state, jax.tree.map(lambda x, p=part: x[p], batches))
    assert_close(state, expected)


def stochastic_step(state, batch):
    key, now = jax.random.split(state["key"])
    noise = jax.random.normal(now, state["w"].shape)
    w = state["w"] - 0.1 * (state["w"] - batch) + 0.1 * noise
    return {"w": w, "key": key, "seen": state["seen"] + 1}, {"noise": noise[0]}


def test_custom_train_step():
    algorithm = lsgd.from_train_step(stochastic_step, {"w": lsgd.average()})
    start = {"w": jnp.zeros(2), "key": jax.random.key(0), "seen": jnp.int32(0)}
    batches = np.ones((6, 3, 2), np.float32)
    events = asynchronous.simulate_events(3, [6, 6, 2], 2, speed=[3, 3, 1])
    cluster = asynchronous.simulate(algorithm, events, field="w")
    state, metrics = cluster.run(cluster.init(start), batches)
    assert state.workers["seen"].tolist() == [6, 6, 2]
    assert len(set(metrics["noise"].tolist())) == 14  # one key per worker
    cluster = asynchronous.on_threads(algorithm, jax.devices()[:3], field="w")
    state, history = cluster.run(cluster.init(start), batches, schedule=2)
    assert int(state.workers["seen"].sum()) == 18
    assert set(history) == {"worker", "steps", "noise", "staleness", "seconds"}


EVENTS = asynchronous.simulate_events(2, 4, 2)


def run_on(batches):
    cluster = asynchronous.simulate(make_algorithm(linear_loss), EVENTS)
    return cluster.run(cluster.init(jnp.ones(3)), batches)


def init_with(params, **options):
    rule = lsgd.identity() if "n" in params else lsgd.average()
    algorithm = lsgd.local_sgd(linear_loss, optax.sgd(0.1), rule=rule)
    return asynchronous.simulate(algorithm, EVENTS, **options).init(params)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: asynchronous.simulate(make_algorithm(linear_loss), 4),
            TypeError,
            r"simulate\(events\): events must be an EventTrace, got 4",
        ),
        (
            lambda: asynchronous.simulate(
                make_algorithm(linear_loss), EVENTS, asynchronous.mean_update
            ),
            TypeError,
            r"simulate\(aggregation\): an Aggregation is needed.*"
            "got <function mean_update",
        ),
        in_full(
            lambda: asynchronous.simulate(make_algorithm(linear_loss), EVENTS).init(
                {"n": 1}
            ),
            TypeError,
            "'n'",
        ),
        (
            lambda: init_with({"n": jnp.int32(1)}),
            TypeError,
            r"init\(params\): every leaf of 'params' must be floating.*at \['n'\]",
        ),
        (
            lambda: init_with({"w": jnp.ones(3)}, field="weights"),
            ValueError,
            r"'weights': the train state has no such field.*'params'",
        ),
        (
            lambda: run_on(np.ones((4, 3, 3), "f4")),
            ValueError,
            r"run\(state, batches\).*the 4 steps and 2 workers.*got shape \(4, 3, 3\)",
        ),
        in_full(
            lambda: run_on(np.ones((5, 2, 3), "f4")),
            ValueError,
            r"run\(state, batches\).*the 4 steps and 2 workers.*got shape \(5, 2, 3\)",
        ),
    ],
)
def test_invalid_simulation_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
