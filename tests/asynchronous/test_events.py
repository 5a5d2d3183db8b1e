"""Event traces: order, staleness, buffer slots and random speeds."""

import functools

import numpy as np
import pytest
from harness.asynchronous_cases import TRACES
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax import asynchronous
from localsgd_jax.asynchronous import EventKind


def test_event_trace_matches_hand_computation():
    # Worker 0 steps at .5, 1, 1.5, 2, worker 1 at 1, 2, 3; the delay is 1.
    events = asynchronous.simulate_events(2, [4, 3], 2, speed=[2, 1], delay=1)
    expected = [  # time, kind, worker, step, slot, staleness in updates, in steps
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
        (2.0, 2, 0, 2, 0, 0, 4),  # two steps in the update, two while in flight
        (2.0, 3, 0, 4, -1, 0, 0),
        (2.0, 3, 1, 2, -1, 0, 0),
        (3.0, 0, 1, 3, -1, 0, 0),
        (3.0, 1, 1, 3, 0, 0, 0),
        (3.0, 2, 0, 4, 1, 1, 2),  # stale by its own first update, not by worker 1's
        (3.0, 2, 1, 2, 2, 1, 3),
        (3.0, 3, 1, 3, -1, 0, 0),
        (4.0, 2, 1, 3, 0, 2, 1),
    ]
    assert list(zip(*events, strict=True)) == expected
    np.testing.assert_array_equal(asynchronous.max_staleness(events), [4, 3])


def test_event_kinds_are_ordered_as_simultaneous_events():
    assert list(EventKind) == [0, 1, 2, 3]
    assert [kind.name for kind in EventKind] == ["STEP", "PUSH", "APPLY", "PULL"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(schedule=4), [4, 4]),
        (dict(schedule=4, delay=2), [6, 6]),
        (dict(schedule=4, delay=2, speed=[1, 0.5]), [6, 5]),
        (dict(schedule=[2, 3], delay=[0, 1]), [2, 4]),
        (dict(schedule=lsgd.never(), delay=100), [12, 12]),
    ],
    ids=str,
)
def test_max_staleness(arguments, expected):
    events = asynchronous.simulate_events(2, 12, **arguments)
    np.testing.assert_array_equal(asynchronous.max_staleness(events), expected)


@pytest.mark.parametrize("name", TRACES)
def test_buffer_slots_are_reused(name):
    events = asynchronous.simulate_events(4, **TRACES[name])
    in_flight, most = {}, 0
    for kind, worker, step, slot in zip(*events[1:5], strict=True):
        if kind == EventKind.PUSH:
            assert slot not in in_flight
            in_flight[slot] = worker, step
            most = max(most, len(in_flight))
        elif kind == EventKind.APPLY:
            assert in_flight.pop(slot) == (worker, step)
    assert not in_flight and events.buffer_slot.max() + 1 == most


def test_random_speeds_have_given_mean_and_deviation():
    draw = functools.partial(asynchronous.random_speeds, 2, 20_000, 0.5)
    speeds = draw(seed=1, speed=[1, 0.25])
    times = 1 / speeds
    np.testing.assert_allclose(times.mean(axis=0), [1, 4], rtol=0.02)
    np.testing.assert_allclose(times.std(axis=0), [0.5, 2], rtol=0.02)
    np.testing.assert_array_equal(speeds, draw(seed=1, speed=[1, 0.25]))
    assert (draw(seed=1) != draw(seed=2)).all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: asynchronous.simulate_events(0, 4, 2),
            ValueError,
            r"simulate_events\(workers\): \w+ must be at least 1, got 0",
        ),
        in_full(
            lambda: asynchronous.simulate_events(2.0, 4, 2),
            TypeError,
            r"simulate_events\(workers\): \w+ must be an int, got 2.0",
        ),
        in_full(
            lambda: asynchronous.simulate_events(2, 0, 2),
            ValueError,
            r"simulate_events\(steps\): the number of steps must be at least 1, got 0",
        ),
        (
            lambda: asynchronous.simulate_events(2, [4, 4, 4], 2),
            ValueError,
            r"simulate_events\(steps\): one number or 2 are needed.*got 3",
        ),
        in_full(
            lambda: asynchronous.simulate_events(2, 4, 0),
            ValueError,
            r"simulate_events\(schedule\): a period must be at least 1, got 0",
        ),
        (
            lambda: asynchronous.simulate_events(2, 4, "2"),
            TypeError,
            r"simulate_events\(schedule\): a period or a schedule is needed, got '2'",
        ),
        in_full(
            lambda: asynchronous.simulate_events(2, 4, [2, 2, 2]),
            ValueError,
            r"simulate_events\(schedule\): one schedule or 2 are needed.*got 3",
        ),
        (
            lambda: asynchronous.simulate_events(2, 4, 2, speed=[1, 0]),
            ValueError,
            r"simulate_events\(speed\): it must be finite and positive, got 0.0",
        ),
        in_full(
            lambda: asynchronous.simulate_events(2, 4, 2, speed=[1, np.inf]),
            ValueError,
            r"simulate_events\(speed\): it must be finite and positive, got inf",
        ),
        (
            lambda: asynchronous.simulate_events(2, 4, 2, speed=np.ones(3)),
            ValueError,
            r"simulate_events\(speed\): it must be a number, 2 numbers or an array of "
            r"shape \(4, 2\).*"
            r"got shape \(3,\)",
        ),
        in_full(
            lambda: asynchronous.simulate_events(2, 4, 2, delay=-1),
            ValueError,
            r"simulate_events\(delay\): it must be finite and at least 0, got -1.0",
        ),
        (
            lambda: asynchronous.random_speeds(2, 4, 0.0),
            ValueError,
            r"random_speeds\(std\): \w+ must be positive, got 0.0",
        ),
        in_full(
            lambda: asynchronous.random_speeds(2, 0, 0.5),
            ValueError,
            r"random_speeds\(steps\): \w+ must be at least 1, got 0",
        ),
        in_full(
            lambda: asynchronous.random_speeds(2, 4, 0.5, speed=-1),
            ValueError,
            r"random_speeds\(speed\): it must be finite and positive, got -1.0",
        ),
    ],
)
def test_invalid_event_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
