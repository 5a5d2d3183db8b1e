"""The experiment `async`: Algorithms 1 and 2 on a virtual clock and on the real one."""

import csv

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.datasets import dump_svmlight_file

from localsgd_jax.experiments import datasets, devices
from localsgd_jax.reproduce import clocks, grid, stragglers
from localsgd_jax.reproduce.command import reproduce

DATASET = datasets.digits()
RACE = clocks.Race(workers=4, period=2, batch=3, steps=48)
SIZES = stragglers._constant(range(-8, -6))


@pytest.fixture(scope="module")
def problem():
    return clocks.Problem(DATASET, grid.load(DATASET))


def test_without_stragglers_both_are_at_the_same_place_at_the_same_time(problem):
    costs = clocks.slow_one(RACE, 1)
    waits = clocks.synchronous(problem, SIZES, RACE, costs, seeds=2)
    goes = clocks.free(problem, SIZES, RACE, clocks.events(RACE, costs), seeds=2)
    assert waits.points.shape == goes.points.shape == (2, 6, 2, DATASET.dimension)
    np.testing.assert_array_equal(waits.times, 2.0 * np.arange(4, 25, 4))
    np.testing.assert_array_equal(goes.times, waits.times)
    np.testing.assert_allclose(goes.points, waits.points, 1e-5, 1e-6)
    assert np.abs(waits.points[0] - waits.points[1]).max() > 1e-3
    assert np.abs(waits.points[:, :, 0] - waits.points[:, :, 1]).max() > 1e-3


def test_a_round_lasts_as_long_as_its_slowest_worker(problem):
    slow = clocks.synchronous(problem, SIZES, RACE, clocks.slow_one(RACE, 3), 1)
    np.testing.assert_array_equal(slow.times, 6.0 * np.arange(4, 25, 4))
    costs = clocks.random_costs(RACE)
    assert costs.shape == (48, 4) and abs(costs.mean() - 1) < 0.3
    random = clocks.synchronous(problem, SIZES, RACE, costs, 1)
    rounds = [costs[i : i + 2].sum(axis=0).max() for i in range(0, 48, 2)]
    np.testing.assert_allclose(random.times, np.cumsum(rounds)[3::4])
    np.testing.assert_array_equal(random.points, slow.points)


@pytest.mark.parametrize("factor", [1, 4])
def test_free_workers_take_as_many_steps_in_all(factor):
    events = clocks.events(RACE, clocks.slow_one(RACE, factor))
    steps = np.bincount(events.worker[events.kind == 0])
    assert abs(steps.sum() - 4 * 48) <= 2
    np.testing.assert_allclose(steps[1:] / steps[0], factor, rtol=0.05)
    # All end at about the same time: nobody waits.
    last = [events.time[events.worker == k].max() for k in range(4)]
    np.testing.assert_allclose(last, last[0], rtol=0.05)


def test_the_first_point_below_the_target_counts():
    points = np.array([[[3.0], [0.5]], [[0.4], [2.0]], [[0.1], [0.7]]])[None, ..., None]
    points = points.reshape(1, 3, 2, 1)
    path = clocks.Path(np.array([1.0, 2.0, 5.0]), points)
    found = stragglers.arrivals(path, lambda x: x[:, 0], 0.45)
    np.testing.assert_array_equal(found, [[2.0, np.inf]])


def test_on_the_real_clock_a_slow_worker_holds_up_only_those_who_wait(problem):
    sizes = stragglers._constant(range(-8, -7))
    mesh = devices.worker_mesh(RACE.workers)
    hosts = clocks.hosts(problem, sizes, RACE, 2e-3, mesh)
    costs = clocks.slow_one(RACE, 8)
    waits, goes = hosts.synchronous(costs, 1), hosts.free(costs, 1)
    virtual = clocks.synchronous(problem, sizes, RACE, costs, 2)
    np.testing.assert_allclose(waits.points[0], virtual.points[1], 1e-4, 1e-5)
    # Sleeping is a lower bound that no busy machine breaks.
    assert waits.times[-1] >= 24 * 2 * 8 * 2e-3
    assert goes.points.shape == (1, 6, 1, DATASET.dimension)
    assert np.isfinite(goes.points).all() and (np.diff(goes.times) > 0).all()
    assert np.abs(goes.points).max() > 0


PLAN = stragglers.Plan(
    epsilon=0.05,
    race=clocks.Race(workers=4, period=2, batch=3, steps=400),
    slowness=(1, 4, "random"),
    real=(4,),
    seeds=2,
    exponents=(-8, -6),
    unit=1e-4,
)


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits"
    dump_svmlight_file(DATASET.features[:400], DATASET.labels[:400], str(path))
    return str(path)


def read(directory):
    with open(directory / "async.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_experiment_in_miniature(tmp_path, digits_file):
    text = stragglers.run(tmp_path, PLAN, digits_file)
    rows = {(r["clock"], r["slowness"], r["algorithm"]): r for r in read(tmp_path)}
    assert len(rows) == len(stragglers.jobs(PLAN)) == 8
    for row in rows.values():
        assert row["status"] == "reached"
        assert float(row["least"]) <= float(row["time"]) <= float(row["most"])
    equal, slow, free = (
        float(rows["virtual", slowness, algorithm]["time"])
        for slowness, algorithm in (
            ("1", "synchronous"),
            ("4", "synchronous"),
            ("4", "asynchronous"),
        )
    )
    assert slow == 4 * equal and free < slow / 2, (equal, slow, free)
    assert rows["virtual", "4", "asynchronous"]["staleness"] == "2"
    assert "async: expected: virtual clock, one worker 4 × slower: " in text
    assert "asynchronous 3.25 × sooner if stale progress counts in full" in text
    for suffix in ("png", "svg"):
        assert (tmp_path / f"async.{suffix}").stat().st_size > 1000
    # An interruption: the rows that were there stay as they are.
    lines = (tmp_path / "async.csv").read_text(encoding="utf-8").splitlines(True)
    (tmp_path / "async.csv").write_text("".join(lines[:5]), encoding="utf-8")
    stragglers.run(tmp_path, PLAN, digits_file)
    again = (tmp_path / "async.csv").read_text(encoding="utf-8").splitlines(True)
    assert again[:7] == lines[:7] and len(again) == len(lines)


def test_a_target_never_reached_is_reported_as_such(tmp_path, digits_file):
    plan = PLAN._replace(epsilon=1e-9, slowness=(4,), seeds=1)
    text = stragglers.run(tmp_path, plan, digits_file)
    rows = read(tmp_path)
    assert [row["status"] for row in rows] == ["not reached"] * 4
    assert all(row["time"] == "" for row in rows)
    assert "seen: synchronous not reached, asynchronous not reached" in text

    # The command finds a directory of other settings.
    arguments = ["async", "--quick", "--data", digits_file, "--out", str(tmp_path)]
    result = CliRunner().invoke(reproduce, arguments)
    assert result.exit_code == 1
    assert "other settings: epsilon = 1e-09 there, 0.005 here" in result.output
