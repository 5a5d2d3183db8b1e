"""Asynchronous Local SGD: its order, the simulation, the threads, the aggregation."""

import functools
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twin
from cases import assert_close, assert_same, mesh

import localsgd_jax as lsgd
from localsgd_jax import asynchronous

DIMENSION, BATCH = 5, 3


def quadratic_loss(x, batch):
    rows, targets = batch
    return 0.5 * jnp.mean((rows @ x - targets) ** 2)


def logistic_loss(x, batch, decay=0.01):
    rows, labels = batch
    return jnp.mean(jnp.logaddexp(0, -labels * (rows @ x))) + decay / 2 * x @ x


def linear_loss(x, batch):
    """Its gradient is the batch, wherever x is."""
    return jnp.sum(x * batch)


def eta(t):
    return 0.4 / (1 + 0.1 * t)


def sgd(loss_fn, optimizer=None):
    return lsgd.local_sgd(loss_fn, optimizer or optax.sgd(eta), rule=lsgd.average())


def data(steps, workers, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(steps, workers, BATCH, DIMENSION)),
        np.sign(rng.normal(size=(steps, workers, BATCH))),
    )


# --- Algorithm 2 in plain NumPy float64, from its pseudocode, instant by instant.


def algorithm_2(gradient, x0, batches, counts, due, clocks, delays):
    """Returns z, the workers' x, and what each read last.

    clocks[k][t]: when worker k ends its step t + 1; delays[t][k]: of a write then.
    """
    workers = len(counts)
    z = np.array(x0, np.float64)
    x, r = [np.array([z] * workers) for _ in range(2)]
    taken, flight = [0] * workers, []
    while flight or any(taken[k] < counts[k] for k in range(workers)):
        coming = [clocks[k][taken[k]] for k in range(workers) if taken[k] < counts[k]]
        now = min(coming + [arrival for arrival, _ in flight])
        readers = []
        for k in range(workers):
            t = taken[k]
            if t == counts[k] or clocks[k][t] != now:
                continue
            own = tuple(part[t][k] for part in batches)
            x[k] = x[k] - eta(t) * gradient(x[k], *own)
            taken[k] += 1
            if taken[k] in due[k] or taken[k] == counts[k]:
                flight.append((now + delays[t][k], x[k] - r[k]))
                readers.append(k)
        for _, progress in [write for write in flight if write[0] <= now]:
            z = z + progress / workers
        flight = [write for write in flight if write[0] > now]
        for k in readers:
            x[k] = r[k] = z
    return z, x, r


def jitter(seed, steps=12, workers=4):
    return np.random.default_rng(seed).uniform(0.3, 3, (steps, workers))


ORDERS = {
    "equal": dict(steps=12, every=3),
    "one slow": dict(steps=12, every=3, speed=[1, 1, 1, 0.25]),
    "all late": dict(steps=12, every=3, delay=2.0),
    "later than a round": dict(steps=12, every=2, delay=5.0),
    "late and slow": dict(steps=12, every=4, speed=[3, 1, 2, 1], delay=[0, 4, 1, 2]),
    "own schedules": dict(
        steps=12, every=[1, lsgd.at([2, 7]), lsgd.growing(8), lsgd.never()], delay=0.5
    ),
    "own steps": dict(steps=[12, 3, 7, 1], every=2, speed=[12, 3, 7, 1]),
    "random speeds": dict(steps=12, every=3, speed=jitter(0), delay=1.0),
    "random": dict(steps=12, every=[2, 3, 4, 5], speed=jitter(1), delay=jitter(2)),
    "random, very late": dict(steps=12, every=1, speed=jitter(3), delay=9 * jitter(4)),
}
PROBLEMS = {
    "quadratic": (quadratic_loss, twin.quadratic_gradient),
    "logistic": (logistic_loss, twin.logistic_gradient),
}


@pytest.mark.parametrize(
    "problem, name",
    [("logistic", name) for name in ORDERS] + [("quadratic", "random")],
)
def test_follows_the_pseudocode(problem, name):
    given, workers, start = ORDERS[name], 4, np.linspace(-1, 1, DIMENSION)
    loss_fn, gradient = PROBLEMS[problem]
    batches = data(12, workers)
    counts = np.broadcast_to(given["steps"], workers)
    speeds = np.asarray(given.get("speed", 1.0))
    if speeds.ndim == 2:
        clocks = np.cumsum(1 / speeds, axis=0).T
    else:
        clocks = np.arange(1, 13) / np.broadcast_to(speeds, workers)[:, None]
    every = given["every"] if isinstance(given["every"], list) else [given["every"]] * 4
    due = [
        {t for t in range(1, 13) if (t % h == 0 if isinstance(h, int) else h(t))}
        for h in every
    ]
    delays = np.broadcast_to(given.get("delay", 0.0), (12, workers))
    z, x, r = algorithm_2(gradient, start, batches, counts, due, clocks, delays)
    with jax.enable_x64(True):
        events = asynchronous.order(workers, **given)
        place = asynchronous.simulate(sgd(loss_fn), events)
        state, metrics = place.run(place.init(start), batches)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
        close(state.aggregate, z)
        close(state.workers.params, x)
        close(state.read, r)
    assert metrics["loss"].shape == (sum(counts),)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    "schedule", [lsgd.every(1), lsgd.every(4), lsgd.at([2, 3, 7, 12])], ids=repr
)
def test_equal_speeds_without_delay_are_algorithm_1(workers, schedule):
    start, batches = np.linspace(-1, 1, DIMENSION), data(12, workers)
    each, due = list(zip(*batches, strict=True)), set(schedule.steps(12))
    expected = twin.local_sgd(twin.logistic_gradient, start, each, eta, due)
    with jax.enable_x64(True):
        events = asynchronous.order(workers, 12, schedule, speed=3)
        place = asynchronous.simulate(sgd(logistic_loss), events)
        state, metrics = place.run(place.init(start), batches)
        for x in (*state.workers.params, *state.read, state.aggregate):
            np.testing.assert_allclose(x, expected[-1][0], rtol=1e-12, atol=1e-12)
        losses = [
            logistic_loss(x, (a, b))
            for xs, rows, labels in zip(expected, *batches, strict=False)
            for x, a, b in zip(xs, rows, labels, strict=True)
        ]
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-12)


def test_equal_speeds_without_delay_are_the_synchronous_rule_for_any_optimizer():
    algorithm = sgd(quadratic_loss, optax.adam(0.05))
    batches = jax.tree.map(jnp.float32, data(12, 4))
    place = asynchronous.simulate(algorithm, asynchronous.order(4, 12, 4))
    state, metrics = place.run(place.init(jnp.ones(DIMENSION)), batches)
    cluster = lsgd.simulate(algorithm, 4)
    step = lsgd.gated(cluster, lsgd.every(4))
    expected, losses = jax.lax.scan(step, cluster.init(jnp.ones(DIMENSION)), batches)
    assert_close(state.workers, expected.workers)
    assert_close(metrics["loss"].reshape(12, 4), losses["loss"])


def test_one_worker_is_plain_optax():
    optimizer = optax.adam(0.05)
    batches = jax.tree.map(jnp.float32, data(10, 1))
    events = asynchronous.order(1, 10, 3, speed=0.7)
    place = asynchronous.simulate(sgd(quadratic_loss, optimizer), events)
    state, _ = place.run(place.init(jnp.ones(DIMENSION)), batches)
    params, opt_state = jnp.ones(DIMENSION), optimizer.init(jnp.ones(DIMENSION))
    for t in range(10):
        batch = jax.tree.map(lambda x, t=t: x[t, 0], batches)
        grad = jax.grad(quadratic_loss)(params, batch)
        updates, opt_state = optimizer.update(grad, opt_state)
        params = optax.apply_updates(params, updates)
    assert_close(state.aggregate, params)


# --- What is under way is neither lost nor added twice.


def whole_batches(steps, workers):
    """Whole numbers, of which float32 adds up quarters without rounding."""
    rng = np.random.default_rng(5)
    return rng.integers(-8, 9, (steps, workers, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "name", ["later than a round", "late and slow", "own steps", "random, very late"]
)
def test_all_progress_arrives_once(name):
    events = asynchronous.order(4, **ORDERS[name])
    place = asynchronous.simulate(sgd(linear_loss, optax.sgd(1.0)), events)
    batches = whole_batches(12, 4)
    state, _ = place.run(place.init(jnp.ones(3)), batches)
    steps = np.broadcast_to(ORDERS[name]["steps"], 4)
    done = sum(batches[:count, k].sum(axis=0) for k, count in enumerate(steps))
    np.testing.assert_array_equal(state.aggregate, 1 - done / 4)


@pytest.mark.parametrize("every", [1, 4, lsgd.never(), [1, 2, 3, 5]], ids=str)
def test_all_progress_of_threads_arrives_once(every):
    place = threads(linear_loss, 1.0)
    batches = whole_batches(13, 4)
    state, history = place.run(place.init(jnp.ones(3)), batches, every=every)
    assert history["steps"].sum() == 52
    np.testing.assert_array_equal(state.aggregate, 1 - batches.sum(axis=(0, 1)) / 4)


def test_small_shares_survive_few_bits():
    # In bfloat16, 1 + 2⁻¹⁰ is 1, so that eight workers would never move.
    params = {"w": jnp.ones(3, jnp.bfloat16)}

    def loss_fn(params, batch):
        return jnp.sum(params["w"].astype(jnp.float32) * batch)

    algorithm = sgd(loss_fn, optax.sgd(2.0**-7))
    batches = np.full((1, 8, 3), -1, np.float32)
    events = asynchronous.order(8, 1, 1, speed=range(1, 9))
    for place, more in (
        (asynchronous.simulate(algorithm, events), {}),
        (asynchronous.on_threads(algorithm, jax.devices()[:8]), {"every": 1}),
    ):
        state, _ = place.run(place.init(params), batches, **more)
        np.testing.assert_array_equal(state.aggregate["w"], 1 + np.float32(2.0**-7))
        assert state.aggregate["w"].dtype == jnp.float32
        assert state.workers.params["w"].dtype == jnp.bfloat16


# --- The order of events.


def test_order_by_hand():
    # Worker 0 steps at .5, 1, 1.5, 2, worker 1 at 1, 2, 3; writes take 1.
    events = asynchronous.order(2, [4, 3], 2, speed=[2, 1], delay=1)
    expected = [  # time, kind, worker, step, slot, missed, age
        (0.5, 0, 0, 1, -1, 0, 0),
        (1.0, 0, 0, 2, -1, 0, 0),
        (1.0, 0, 1, 1, -1, 0, 0),
        (1.0, 1, 0, 2, 0, 0, 0),
        (1.0, 3, 0, 2, -1, 0, 0),
        (1.5, 0, 0, 3, -1, 0, 0),
        (2.0, 0, 0, 4, -1, 0, 0),
        (2.0, 0, 1, 2, -1, 0, 0),
        (2.0, 1, 0, 4, 1, 0, 0),
        (2.0, 1, 1, 2, 2, 0, 0),
        (2.0, 2, 0, 2, 0, 0, 4),  # two steps in it, two while it was under way
        (2.0, 3, 0, 4, -1, 0, 0),
        (2.0, 3, 1, 2, -1, 0, 0),
        (3.0, 0, 1, 3, -1, 0, 0),
        (3.0, 1, 1, 3, 0, 0, 0),
        (3.0, 2, 0, 4, 1, 1, 2),  # has missed its own first write, not worker 1's
        (3.0, 2, 1, 2, 2, 1, 3),
        (3.0, 3, 1, 3, -1, 0, 0),
        (4.0, 2, 1, 3, 0, 2, 1),
    ]
    assert list(zip(*events, strict=True)) == expected
    np.testing.assert_array_equal(asynchronous.staleness(events), [4, 3])


@pytest.mark.parametrize(
    "given, expected",
    [
        (dict(every=4), [4, 4]),
        (dict(every=4, delay=2), [6, 6]),
        (dict(every=4, delay=2, speed=[1, 0.5]), [6, 5]),
        (dict(every=[2, 3], delay=[0, 1]), [2, 4]),
        (dict(every=lsgd.never(), delay=100), [12, 12]),
    ],
    ids=str,
)
def test_staleness(given, expected):
    events = asynchronous.order(2, 12, **given)
    np.testing.assert_array_equal(asynchronous.staleness(events), expected)


@pytest.mark.parametrize("name", ORDERS)
def test_slots_hold_one_write_at_a_time_and_are_used_again(name):
    events = asynchronous.order(4, **ORDERS[name])
    held, most = {}, 0
    for kind, worker, step, slot in zip(*events[1:5], strict=True):
        if kind == 1:
            assert slot not in held
            held[slot] = worker, step
            most = max(most, len(held))
        elif kind == 2:
            assert held.pop(slot) == (worker, step)
    assert not held and events.slot.max() + 1 == most


def test_random_speeds():
    draw = functools.partial(asynchronous.random_speeds, 2, 20_000, 0.5)
    speeds = draw(seed=1, speed=[1, 0.25])
    times = 1 / speeds
    np.testing.assert_allclose(times.mean(axis=0), [1, 4], rtol=0.02)
    np.testing.assert_allclose(times.std(axis=0), [0.5, 2], rtol=0.02)
    np.testing.assert_array_equal(speeds, draw(seed=1, speed=[1, 0.25]))
    assert (draw(seed=1) != draw(seed=2)).all()


def test_equal_orders_give_equal_bits_and_others_do_not():
    batches = jax.tree.map(jnp.float32, data(12, 4))

    def run(seed):
        speeds = asynchronous.random_speeds(4, 12, 0.5, seed=seed)
        events = asynchronous.order(4, 12, 3, speed=speeds, delay=0.5)
        place = asynchronous.simulate(sgd(logistic_loss), events)
        return place.run(place.init(jnp.ones(DIMENSION)), batches)

    assert_same(run(0), run(0))
    assert (run(0)[0].aggregate != run(1)[0].aggregate).any()


def test_a_run_is_one_program_with_one_loop():
    traced = []

    def loss_fn(x, batch):
        traced.append(1)
        return quadratic_loss(x, batch)

    events = asynchronous.order(4, 12, 3, speed=[1, 1, 1, 0.25])
    place = asynchronous.simulate(sgd(loss_fn), events)
    state = place.init(jnp.ones(DIMENSION))
    batches = jax.tree.map(jnp.float32, data(12, 4))
    jaxpr = str(jax.make_jaxpr(place.run)(state, batches))
    assert jaxpr.count("scan[") == 1 and jaxpr.count("cond[") == 1
    state, _ = place.run(state, batches)
    before = len(traced)
    place.run(state, batches)
    assert len(traced) == before


# --- Aggregations.


@functools.cache
def aggregate_of(aggregation):
    """What four workers reach on the quadratic."""
    events = asynchronous.order(4, 12, 3, speed=[1, 1, 1, 0.25], delay=2.0)
    place = asynchronous.simulate(sgd(quadratic_loss), events, aggregation)
    batches = jax.tree.map(jnp.float32, data(12, 4))
    return place.run(place.init(jnp.ones(DIMENSION)), batches)[0].aggregate


@pytest.mark.parametrize(
    "weighting", [None, asynchronous.polynomial(0)], ids=["constant", "polynomial"]
)
def test_outer_sgd_of_rate_one_adds(weighting):
    outer = asynchronous.outer(optax.sgd(1.0), weighting)
    assert_close(aggregate_of(outer), aggregate_of(None))


def test_weighting_by_hand():
    # Worker 1 ends its step when worker 0 has written 3 times: at 1, 2 and 3, not 4.
    events = asynchronous.order(2, [4, 1], 1, speed=[1, 0.25])
    writes = events.kind == 2
    assert events.worker[writes].tolist() == [0, 0, 0, 0, 1]
    assert events.missed[writes].tolist() == [0, 0, 0, 0, 3]
    batches = np.zeros((4, 2), np.float32)
    batches[0] = -1, -16
    for weighting, expected in (
        (asynchronous.constant(0.25), 0.25 * (1 + 16) / 2),
        (asynchronous.polynomial(0.5), (1 + 16 / 2) / 2),  # (1 + 3)^−½ = ½
        (asynchronous.polynomial(1.0), (1 + 16 / 4) / 2),
    ):
        outer = asynchronous.outer(optax.sgd(1.0), weighting)
        algorithm = sgd(linear_loss, optax.sgd(1.0))
        place = asynchronous.simulate(algorithm, events, outer)
        state, _ = place.run(place.init(jnp.zeros(())), batches)
        assert float(state.aggregate) == pytest.approx(expected, rel=1e-6)


def nesterov_twin(progress, missed, rate, beta, n, c, power):
    """Algorithm 3 of Liu et al. (2024) in NumPy float64."""
    z, m, buffer, path = 1.0, 0.0, 0.0, []
    for t, (p, s) in enumerate(zip(progress, missed, strict=True)):
        g = -p / (1 + s) ** power
        buffer += g
        if (t + 1) % n == 0:
            m = beta * m + buffer / n
            z -= rate * ((1 - c * n + c) * beta * m + g / n)
            buffer = 0.0
        else:
            z -= rate * (c * beta * m + g / n)
        path.append(z)
    return path


@pytest.mark.parametrize("buffer, c", [(None, 0.0), (None, 0.2), (3, 0.1), (1, 0.5)])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_delayed_nesterov_follows_the_pseudocode(buffer, c, power):
    rng = np.random.default_rng(0)
    progress, missed = rng.normal(size=13), rng.integers(0, 6, 13)
    expected = nesterov_twin(progress, missed, 0.7, 0.9, buffer or 4, c, power)
    with jax.enable_x64(True):
        aggregation = asynchronous.delayed_nesterov(
            0.7,
            0.9,
            buffer=buffer,
            activation=c,
            weighting=asynchronous.polynomial(power),
        )
        z = jnp.float64(1)
        memory = aggregation.init(z)
        for p, s, value in zip(progress, missed, expected, strict=True):
            arrival = asynchronous.Arrival(4, jnp.int32(s))
            z, memory = aggregation.apply(z, jnp.float64(p), memory, arrival)
            np.testing.assert_allclose(z, value, rtol=1e-12)
    assert int(memory.count) == 13


def test_delayed_nesterov_with_a_buffer_of_one_is_nesterov():
    events = asynchronous.order(1, 12, 3)
    batches = jax.tree.map(jnp.float32, data(12, 1))
    ends = []
    for aggregation in (
        asynchronous.delayed_nesterov(0.7, 0.9, buffer=1, activation=1.0),
        asynchronous.outer(optax.sgd(0.7, momentum=0.9, nesterov=True)),
    ):
        place = asynchronous.simulate(sgd(quadratic_loss), events, aggregation)
        ends.append(place.run(place.init(jnp.ones(DIMENSION)), batches)[0].aggregate)
    assert_close(*ends)


@pytest.mark.parametrize(
    "aggregation",
    [
        asynchronous.outer(optax.adam(0.1), asynchronous.polynomial()),
        asynchronous.delayed_nesterov(0.7, weighting=asynchronous.polynomial()),
    ],
    ids=["outer", "delayed_nesterov"],
)
def test_threads_take_the_same_aggregations(aggregation):
    # One thread is deterministic: the simulation of one worker gives its numbers.
    batches = jax.tree.map(np.float32, data(12, 1))
    algorithm = sgd(quadratic_loss)
    places = (
        asynchronous.simulate(algorithm, asynchronous.order(1, 12, 3), aggregation),
        asynchronous.on_threads(algorithm, jax.devices()[:1], aggregation),
    )
    start = places[0].init(jnp.ones(DIMENSION))
    expected, losses = places[0].run(start, batches)
    state, history = places[1].run(start, host_batches(12, 1), every=3)
    assert_close(state, expected)
    np.testing.assert_allclose(
        history["loss"], losses["loss"].reshape(4, 3).mean(axis=1), rtol=1e-5
    )


# --- States of all kinds.


def noisy_step(state, batch):
    key, now = jax.random.split(state["key"])
    noise = jax.random.normal(now, state["w"].shape)
    w = state["w"] - 0.1 * (state["w"] - batch) + 0.1 * noise
    return {"w": w, "key": key, "seen": state["seen"] + 1}, {"noise": noise[0]}


def test_a_training_step_of_ones_own():
    algorithm = lsgd.from_train_step(noisy_step, {"w": lsgd.average()})
    start = {"w": jnp.zeros(2), "key": jax.random.key(0), "seen": jnp.int32(0)}
    batches = np.ones((6, 3, 2), np.float32)
    events = asynchronous.order(3, [6, 6, 2], 2, speed=[3, 3, 1])
    place = asynchronous.simulate(algorithm, events, field="w")
    state, metrics = place.run(place.init(start), batches)
    assert state.workers["seen"].tolist() == [6, 6, 2]
    assert len(set(metrics["noise"].tolist())) == 14  # each worker has its own key
    place = asynchronous.on_threads(algorithm, jax.devices()[:3], field="w")
    state, history = place.run(place.init(start), batches, every=2)
    assert int(state.workers["seen"].sum()) == 18
    assert set(history) == {"worker", "steps", "noise", "missed", "seconds"}


def test_a_run_goes_on_where_another_ended():
    algorithm = sgd(quadratic_loss, optax.adam(0.05))
    batches = jax.tree.map(np.float32, data(12, 4))
    whole, half = (
        asynchronous.simulate(algorithm, asynchronous.order(4, steps, 3))
        for steps in (12, 6)
    )
    start = whole.init(jnp.ones(DIMENSION))
    expected, _ = whole.run(start, batches)
    state = start
    for part in (slice(0, 6), slice(6, 12)):
        state, _ = half.run(state, jax.tree.map(lambda x, p=part: x[p], batches))
    assert_close(state, expected)


# --- Threads.


@functools.cache
def threads(loss_fn=quadratic_loss, rate=eta, workers=4):
    """Threads that are compiled once for all tests."""
    algorithm = sgd(loss_fn, optax.sgd(rate))
    return asynchronous.on_threads(algorithm, jax.devices()[:workers])


def host_batches(steps, workers=4):
    return list(zip(*jax.tree.map(np.float32, data(steps, workers)), strict=True))


def test_nobody_waits_for_a_worker_that_sleeps():
    """Worker 0 stays in its first round until the others have done 30."""
    others, first_round = threading.Semaphore(0), [True]

    def pause(worker, seconds):
        if worker:
            others.release()
        elif first_round:
            first_round.clear()
            for _ in range(30):
                assert others.acquire(timeout=120)
        return 0.0

    place = threads()
    start = place.init(jnp.ones(DIMENSION))
    _, history = place.run(start, host_batches(40), every=2, pause=pause)
    first = int(np.argmax(history["worker"] == 0))
    assert first >= 27  # three may have paused and not yet exchanged
    assert history["missed"][first] == first
    assert history["steps"].sum() == 160


def test_a_worker_four_times_slower_does_less():
    def pause(worker, seconds):
        assert seconds > 0
        return 3 * max(seconds, 0.02) if worker == 0 else 0.0

    place = threads()
    state = place.init(jnp.ones(DIMENSION))
    state, _ = place.run(state, host_batches(8), every=4)
    state, history = place.run(state, host_batches(160), every=4, pause=pause)
    steps = np.bincount(history["worker"], history["steps"], 4)
    assert steps.sum() == 640 and 1.5 * steps[0] < min(steps[1:])
    assert (np.diff(history["seconds"]) >= 0).all()
    assert np.isfinite(asynchronous.throughput(history)).all()


def test_history_of_threads():
    place = threads()
    state = place.init(jnp.ones(DIMENSION))
    state, history = place.run(
        state, iter(host_batches(50)), every=[10, 5, 10, 10], steps=11, chunk=4
    )
    assert set(history) == {"worker", "steps", "loss", "missed", "seconds"}
    assert history["steps"].sum() == 44
    # Only the last round of a worker may be cut short, by the end of the work.
    for k, period in enumerate([10, 5, 10, 10]):
        own = history["steps"][history["worker"] == k]
        assert (own[:-1] == period).all() and (own <= period).all()
    # Between its own exchanges a worker misses exactly those of the others.
    for k in range(4):
        turns = np.flatnonzero(history["worker"] == k)
        gaps = np.diff(np.concatenate([[-1], turns])) - 1
        np.testing.assert_array_equal(history["missed"][turns], gaps)
    assert place.workers == 4 and state.workers.params.shape == (4, DIMENSION)


def test_workers_end_with_what_they_last_read():
    place = threads()
    state, history = place.run(
        place.init(jnp.ones(DIMENSION)), host_batches(12), every=3
    )
    assert_same(state.workers.params, state.read)
    assert_same(state.read[history["worker"][-1]], state.aggregate)


def test_threads_compute_in_the_precision_of_the_caller():
    with jax.enable_x64(True):
        place = threads()
        batches = list(zip(*data(8, 4), strict=True))
        state, _ = place.run(place.init(np.ones(DIMENSION)), batches, every=2)
        assert state.aggregate.dtype == state.workers.params.dtype == jnp.float64


def test_several_workers_on_one_device_and_no_work():
    place = asynchronous.on_threads(sgd(linear_loss), jax.devices()[:1] * 3)
    start = place.init(jnp.ones(3))
    rows = jnp.arange(9.0).reshape(3, 3)
    start = start._replace(workers=start.workers._replace(params=rows), read=rows)
    state, history = place.run(start, [], every=2)
    assert_same(state, start)
    assert history == {}
    _, history = place.run(start, whole_batches(6, 3), every=2)
    assert history["steps"].sum() == 18


class BrokenError(Exception):
    """Raised on purpose."""


def broken_pause(worker, seconds):
    if worker == 2:
        raise BrokenError
    return 1e4


def broken_batches():
    yield from host_batches(4)
    raise BrokenError


@pytest.fixture
def interruptible():
    """A process started in the background may have been told to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting_pause(worker, seconds):
    if worker == 2:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    return 1e4


@pytest.mark.parametrize(
    "error, batches, pause",
    [
        (BrokenError, lambda: host_batches(40), broken_pause),
        (BrokenError, broken_batches, None),
        (KeyboardInterrupt, lambda: host_batches(40), interrupting_pause),
        (FloatingPointError, lambda: [np.nan * x for x in whole_batches(9, 4)], None),
        (FloatingPointError, lambda: 9 * [np.full((4, 3), 1e38, "f4")], None),
        (ValueError, lambda: [np.ones((4, 3)), np.ones((5, 3))], None),
    ],
)
def test_an_error_in_one_thread_ends_all(error, batches, pause, interruptible):
    """Those who sleep wake up: the test would last for hours otherwise."""
    batches = list(batches()) if batches is not broken_batches else batches()
    quadratic = pause or error is BrokenError
    place = threads() if quadratic else threads(linear_loss, 1.0)
    start = place.init(jnp.ones(DIMENSION if quadratic else 3))
    before = threading.active_count()
    with pytest.raises(error):
        place.run(start, batches, every=2, pause=pause)
    assert threading.active_count() == before


# --- Against the synchronous run.


@functools.cache
def breast_cancer():
    """Standardised examples, labels, and f* of logistic regression, λ = 0.01."""
    from sklearn.datasets import load_breast_cancer

    rows, classes = load_breast_cancer(return_X_y=True)
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    labels = 2.0 * classes - 1
    x = np.zeros(rows.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(labels * (rows @ x)))
        hessian = (rows.T * (p * (1 - p))) @ rows / len(rows) + 0.01 * np.eye(len(x))
        x -= np.linalg.solve(hessian, twin.logistic_gradient(x, rows, labels))
    assert np.linalg.norm(twin.logistic_gradient(x, rows, labels)) < 1e-12
    return rows, labels, objective(x, rows, labels)


def objective(x, rows, labels):
    return np.mean(np.logaddexp(0, -labels * (rows @ x))) + 0.005 * x @ x


def compare(seeds, steps, timed=1, period=8, workers=4, slower=4.0):
    """Runs both with worker 0 `slower` times slower, at equal gradient evaluations.

    The synchronous run waits for it: the host sleeps after each round, in the first
    `timed` runs; the numbers do not depend on it.

    Returns:
      For each seed f − f* of both, (seeds, 2), and local steps per second of both,
      (timed, 2).
    """
    rows, labels, best = breast_cancer()
    algorithm = sgd(logistic_loss, optax.sgd(0.02))
    cluster = lsgd.on_mesh(algorithm, mesh(worker=workers))
    one_round = jax.jit(lsgd.fused(cluster))
    place = threads(logistic_loss, 0.02, workers)

    def synchronous(batches, wait):
        state = cluster.init(jnp.zeros(rows.shape[1]))
        began = time.perf_counter()
        for i in range(0, len(batches), period):
            start = time.perf_counter()
            stacked = jax.tree.map(lambda *x: np.stack(x), *batches[i : i + period])
            state, metrics = one_round(state, cluster.put(stacked, time=True))
            jax.block_until_ready((state, metrics))
            if wait:
                time.sleep((slower - 1) * (time.perf_counter() - start))
        return lsgd.consensus(state), time.perf_counter() - began

    def free(batches):
        state = place.init(jnp.zeros(rows.shape[1]))
        state, history = place.run(
            state,
            batches,
            every=period,
            pause=lambda k, seconds: 0.0 if k else (slower - 1) * seconds,
        )
        assert history["steps"].sum() == workers * len(batches)
        return state.aggregate, history["seconds"][-1]

    examples = rows.astype(np.float32), labels.astype(np.float32)
    gaps, speeds = [], []
    for i, seed in enumerate((0, *seeds)):
        dealt = lsgd.deal(examples, workers, 16, seed=seed)
        batches = [next(dealt) for _ in range(steps if i else 4 * period)]
        (x, waiting), (z, seconds) = synchronous(batches, i <= timed), free(batches)
        gaps.append([objective(np.float64(end), rows, labels) - best for end in (x, z)])
        speeds.append(workers * steps / np.array([waiting, seconds]))
    # The first run was for the compiler.
    return np.array(gaps[1:]), np.array(speeds[1 : timed + 1])


def test_against_a_synchronous_run_that_waits(record_property):
    gaps, speeds = compare(range(5), steps=600)
    ratios = gaps[:, 1] / gaps[:, 0]
    record_property("local steps per second", speeds.mean(axis=0).tolist())
    record_property("f − f*, asynchronous / synchronous", ratios.tolist())
    # Far from the minimum late progress acts like momentum: on a busy host, where a
    # worker may come very late, a single seed may get nearer than 5 %.
    assert (ratios < 1.05).all() and abs(np.median(ratios) - 1) < 0.05, ratios
    assert (gaps < 0.03).all()  # 0.59 at the start


# --- What the aggregate was on the way.


def test_without_stragglers_the_records_are_the_rounds_of_algorithm_1():
    batches = whole_batches(12, 4)
    cluster = lsgd.simulate(sgd(linear_loss), 4)
    state, rounds = cluster.init(jnp.zeros(3)), []
    one_round = jax.jit(lsgd.fused(cluster))
    for i in range(0, 12, 3):
        state, _ = one_round(state, jnp.stack(batches[i : i + 3]))
        rounds.append(lsgd.consensus(state))
    events = asynchronous.order(4, 12, 3)
    for aggregation in (None, asynchronous.outer(optax.sgd(1.0))):
        watched = asynchronous.recorded(aggregation, count=3, every=4)
        place = asynchronous.simulate(sgd(linear_loss), events, watched)
        state, _ = place.run(place.init(jnp.zeros(3)), jnp.stack(batches))
        assert state.memory.writes == 16
        # The fourth has no row and overwrites none.
        np.testing.assert_allclose(state.memory.points, rounds[:3], 1e-6, 1e-6)
        np.testing.assert_allclose(state.aggregate, rounds[3], 1e-6, 1e-6)


def test_a_record_of_threads_continues_over_runs():
    watched = asynchronous.recorded(count=8, every=2)
    place = asynchronous.on_threads(sgd(linear_loss), jax.devices()[:1], watched)
    state, seen = place.init(jnp.zeros(3)), []
    for _ in range(3):
        state, _ = place.run(state, [np.ones((1, 3), np.float32)] * 4, every=2)
        seen.append(state.aggregate)
    np.testing.assert_array_equal(state.memory.points[:3], seen)
    np.testing.assert_array_equal(state.memory.points[3:], 0)
    assert np.abs(np.diff(seen, axis=0)).min() > 0


# --- Bad input.

EVENTS = asynchronous.order(2, 4, 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: asynchronous.order(0, 4, 2),
            ValueError,
            r"order\(workers\): it must be at least 1, got 0",
        ),
        (
            lambda: asynchronous.order(2.0, 4, 2),
            TypeError,
            r"order\(workers\): it must be an int, got 2.0",
        ),
        (
            lambda: asynchronous.order(2, 0, 2),
            ValueError,
            r"order\(steps\): it must be at least 1, got 0",
        ),
        (
            lambda: asynchronous.order(2, [4, 4, 4], 2),
            ValueError,
            r"order\(steps\): one number or 2 are needed.*got 3",
        ),
        (
            lambda: asynchronous.order(2, 4, 0),
            ValueError,
            r"every\(h\): h must be at least 1, got 0",
        ),
        (
            lambda: asynchronous.order(2, 4, "2"),
            TypeError,
            r"order\(every\): a period or a schedule is needed, got '2'",
        ),
        (
            lambda: asynchronous.order(2, 4, [2, 2, 2]),
            ValueError,
            r"order\(every\): one schedule or 2 are needed.*got 3",
        ),
        (
            lambda: asynchronous.order(2, 4, 2, speed=[1, 0]),
            ValueError,
            r"order\(speed\): it must be finite and positive, got 0.0",
        ),
        (
            lambda: asynchronous.order(2, 4, 2, speed=[1, np.inf]),
            ValueError,
            r"order\(speed\): it must be finite and positive, got inf",
        ),
        (
            lambda: asynchronous.order(2, 4, 2, speed=np.ones(3)),
            ValueError,
            r"order\(speed\): a number, 2 numbers or \(4, 2\) ones.*got shape \(3,\)",
        ),
        (
            lambda: asynchronous.order(2, 4, 2, delay=-1),
            ValueError,
            r"order\(delay\): it must be finite and at least 0, got -1.0",
        ),
        (
            lambda: asynchronous.random_speeds(2, 4, 0.0),
            ValueError,
            r"random_speeds\(spread\): it must be positive and finite, got 0.0",
        ),
        (
            lambda: asynchronous.random_speeds(2, 0, 0.5),
            ValueError,
            r"random_speeds\(steps\): it must be at least 1, got 0",
        ),
        (
            lambda: asynchronous.random_speeds(2, 4, 0.5, speed=-1),
            ValueError,
            r"random_speeds\(speed\): it must be finite and positive, got -1.0",
        ),
        (
            lambda: asynchronous.constant(0),
            ValueError,
            r"constant\(value\): it must be positive, got 0",
        ),
        (
            lambda: asynchronous.polynomial(-0.5),
            ValueError,
            r"polynomial\(power\): it must be at least 0, got -0.5",
        ),
        (
            lambda: asynchronous.recorded(count=0),
            ValueError,
            r"recorded\(count\): it must be at least 1, got 0",
        ),
        (
            lambda: asynchronous.recorded(count=2, every=0.5),
            TypeError,
            r"recorded\(every\): it must be an int, got 0.5",
        ),
        (
            lambda: asynchronous.recorded(0.7, count=2),
            TypeError,
            r"recorded\(aggregation\): an Aggregation is needed.*got 0.7",
        ),
        (
            lambda: asynchronous.outer(0.7),
            TypeError,
            r"outer\(optimizer\): an optax optimizer is needed.*got 0.7",
        ),
        (
            lambda: asynchronous.outer(optax.sgd(0.7), 0.5),
            TypeError,
            r"outer\(weighting\): a function of the staleness.*got 0.5",
        ),
        (
            lambda: asynchronous.delayed_nesterov(0),
            ValueError,
            r"delayed_nesterov\(learning_rate\): it must be positive, got 0",
        ),
        (
            lambda: asynchronous.delayed_nesterov(0.7, 1.0),
            ValueError,
            r"delayed_nesterov\(momentum\): it must be in \[0, 1\), got 1.0",
        ),
        (
            lambda: asynchronous.delayed_nesterov(0.7, buffer=0),
            ValueError,
            r"delayed_nesterov\(buffer\): it must be at least 1, got 0",
        ),
        (
            lambda: asynchronous.delayed_nesterov(0.7, buffer=2.0),
            TypeError,
            r"delayed_nesterov\(buffer\): it must be an int, got 2.0",
        ),
        (
            lambda: asynchronous.delayed_nesterov(0.7, buffer=4, activation=0.3),
            ValueError,
            r"delayed_nesterov\(activation\).*\[0, 1/N\] with N = 4, got 0.3",
        ),
        (
            lambda: asynchronous.delayed_nesterov(0.7, activation=1.5),
            ValueError,
            r"delayed_nesterov\(activation\): it must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: aggregate_of(asynchronous.delayed_nesterov(0.7, activation=0.3)),
            ValueError,
            r"delayed_nesterov\(activation\).*\[0, 1/N\] with N = 4, got 0.3",
        ),
        (
            lambda: asynchronous.simulate(sgd(linear_loss), 4),
            TypeError,
            r"simulate\(events\): they come from order\(\), got 4",
        ),
        (
            lambda: asynchronous.simulate(sgd(linear_loss), EVENTS, asynchronous.add),
            TypeError,
            r"simulate\(aggregation\): an Aggregation is needed.*got <function add",
        ),
        (
            lambda: asynchronous.simulate(sgd(linear_loss), EVENTS).init({"n": 1}),
            TypeError,
            "'n'",
        ),
        (
            lambda: asynchronous.simulate(
                lsgd.local_sgd(linear_loss, optax.sgd(0.1), rule=lsgd.keep()), EVENTS
            ).init({"n": jnp.int32(1)}),
            TypeError,
            r"init\(params\): every leaf of 'params' must be floating.*at \['n'\]",
        ),
        (
            lambda: asynchronous.simulate(
                sgd(linear_loss), EVENTS, field="weights"
            ).init(jnp.ones(3)),
            ValueError,
            r"'weights': the train state has no such field.*'params'",
        ),
        (
            lambda: simulate_on(np.ones((4, 3, 3), "f4")),
            ValueError,
            r"run\(state, batches\).*the 4 steps and 2 workers.*got shape \(4, 3, 3\)",
        ),
        (
            lambda: simulate_on(np.ones((5, 2, 3), "f4")),
            ValueError,
            r"run\(state, batches\).*the 4 steps and 2 workers.*got shape \(5, 2, 3\)",
        ),
        (
            lambda: asynchronous.on_threads(sgd(linear_loss), []),
            ValueError,
            r"on_threads\(devices\): at least one is needed, got none",
        ),
        (
            lambda: asynchronous.on_threads(sgd(linear_loss), None, 3),
            TypeError,
            r"on_threads\(aggregation\): an Aggregation is needed.*got 3",
        ),
        (
            lambda: thread_on(whole_batches(4, 3), every=2),
            ValueError,
            r"run\(batches\): the leading axis.*the 2 workers, got shape \(3, 3\)",
        ),
        (
            lambda: thread_on(whole_batches(4, 2), every=2.5),
            TypeError,
            r"run\(every\): a period or a schedule is needed, got 2.5",
        ),
        (
            lambda: thread_on(whole_batches(4, 2), every=2, steps=0),
            ValueError,
            r"run\(steps\): it must be at least 1, got 0",
        ),
        (
            lambda: thread_on(whole_batches(4, 2), every=2, chunk=0),
            ValueError,
            r"run\(chunk\): it must be at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def simulate_on(batches):
    place = asynchronous.simulate(sgd(linear_loss), EVENTS)
    return place.run(place.init(jnp.ones(3)), batches)


def thread_on(batches, **given):
    place = threads(linear_loss, 1.0, workers=2)
    return place.run(place.init(jnp.ones(3)), batches, **given)
