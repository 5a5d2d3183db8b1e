"""The straggler experiment: Algorithms 1 and 2 on a virtual clock and in real time."""

import numpy as np
import pytest
from click.testing import CliRunner
from harness.experiment_files import DIGITS, read_csv

from localsgd_jax.cli.reproduce import reproduce
from localsgd_jax.experiments import devices
from localsgd_jax.experiments.paper import straggler_simulation, stragglers
from localsgd_jax.experiments.paper.step_sizes import constant_step_sizes
from localsgd_jax.experiments.paper.straggler_simulation import (
    StragglerProblem,
    Workload,
)

WORKLOAD = Workload(workers=4, period=2, batch=3, steps=48)


@pytest.fixture(scope="module")
def problem(examples):
    sizes = constant_step_sizes(range(-8, -6))
    return StragglerProblem(DIGITS, examples, sizes, WORKLOAD)


def test_equal_workers_give_equal_trajectories(problem):
    costs = straggler_simulation.single_straggler_costs(WORKLOAD, 1)
    trace = straggler_simulation.event_trace(WORKLOAD, costs)
    synchronous = straggler_simulation.run_synchronous(problem, costs, seeds=2)
    asynchronous = straggler_simulation.run_asynchronous(problem, trace, seeds=2)
    points = synchronous.points
    assert points.shape == asynchronous.points.shape == (2, 6, 2, DIGITS.dimension)
    np.testing.assert_array_equal(synchronous.times, 2.0 * np.arange(4, 25, 4))
    np.testing.assert_array_equal(asynchronous.times, synchronous.times)
    np.testing.assert_allclose(asynchronous.points, points, 1e-5, 1e-6)
    assert np.abs(points[0] - points[1]).max() > 1e-3
    assert np.abs(points[:, :, 0] - points[:, :, 1]).max() > 1e-3


def test_round_lasts_as_long_as_its_slowest_worker(problem):
    costs = straggler_simulation.single_straggler_costs(WORKLOAD, 3)
    slow = straggler_simulation.run_synchronous(problem, costs, 1)
    np.testing.assert_array_equal(slow.times, 6.0 * np.arange(4, 25, 4))
    costs = straggler_simulation.random_costs(WORKLOAD)
    assert costs.shape == (48, 4) and abs(costs.mean() - 1) < 0.3
    random = straggler_simulation.run_synchronous(problem, costs, 1)
    rounds = [costs[i : i + 2].sum(axis=0).max() for i in range(0, 48, 2)]
    np.testing.assert_allclose(random.times, np.cumsum(rounds)[3::4])
    np.testing.assert_array_equal(random.points, slow.points)


@pytest.mark.parametrize("factor", [1, 4])
def test_asynchronous_workers_do_as_many_steps_in_total(factor):
    events = straggler_simulation.event_trace(
        WORKLOAD, straggler_simulation.single_straggler_costs(WORKLOAD, factor)
    )
    steps = np.bincount(events.worker[events.kind == 0])
    assert abs(steps.sum() - 4 * 48) <= 2
    np.testing.assert_allclose(steps[1:] / steps[0], factor, rtol=0.05)
    # No worker waits: all end at about the same time.
    last = [events.time[events.worker == k].max() for k in range(4)]
    np.testing.assert_allclose(last, last[0], rtol=0.05)


def test_hitting_time_is_that_of_the_first_point_below_the_target():
    points = np.array([[[3.0], [0.5]], [[0.4], [2.0]], [[0.1], [0.7]]])[None, ..., None]
    points = points.reshape(1, 3, 2, 1)
    trajectory = straggler_simulation.Trajectory(np.array([1.0, 2.0, 5.0]), points)
    found = stragglers.hitting_times(trajectory, lambda x: x[:, 0], 0.45)
    np.testing.assert_array_equal(found, [[2.0, np.inf]])


@pytest.mark.full
def test_straggler_blocks_only_synchronous_runs(problem):
    problem = problem._replace(sizes=constant_step_sizes(range(-8, -7)))
    mesh = devices.make_local_mesh(WORKLOAD.workers)
    runners = straggler_simulation.on_local_devices(problem, 2e-3, mesh)
    costs = straggler_simulation.single_straggler_costs(WORKLOAD, 8)
    synchronous = runners.synchronous(costs, 1)
    asynchronous = runners.asynchronous(costs, 1)
    virtual = straggler_simulation.run_synchronous(problem, costs, 2)
    np.testing.assert_allclose(synchronous.points[0], virtual.points[1], 1e-4, 1e-5)
    # Sleeping is a lower bound that holds on a busy machine, too.
    assert synchronous.times[-1] >= 24 * 2 * 8 * 2e-3
    assert asynchronous.points.shape == (1, 6, 1, DIGITS.dimension)
    assert np.isfinite(asynchronous.points).all()
    assert (np.diff(asynchronous.times) > 0).all()
    assert np.abs(asynchronous.points).max() > 0


CONFIG = stragglers.StragglerConfig(
    epsilon=0.05,
    workload=Workload(workers=4, period=2, batch=3, steps=400),
    slowness=(1, 4, "random"),
    real_slowness=(4,),
    seeds=2,
    exponents=(-8, -6),
    seconds_per_unit=1e-4,
)


@pytest.mark.full
def test_small_experiment(tmp_path, digits_file):
    text = stragglers.run(tmp_path, CONFIG, digits_file)
    path = tmp_path / "stragglers.csv"
    rows = {(r["clock"], r["slowness"], r["algorithm"]): r for r in read_csv(path)}
    assert len(rows) == len(stragglers.straggler_cases(CONFIG)) == 8
    for row in rows.values():
        assert row["status"] == "reached"
        assert float(row["min_time"]) <= float(row["time"]) <= float(row["max_time"])
    equal, slow, asynchronous = (
        float(rows["virtual", slowness, algorithm]["time"])
        for slowness, algorithm in (
            ("1", "synchronous"),
            ("4", "synchronous"),
            ("4", "asynchronous"),
        )
    )
    assert slow == 4 * equal and asynchronous < slow / 2
    assert rows["virtual", "4", "asynchronous"]["staleness"] == "2"
    assert "stragglers: expected: virtual clock, one worker 4 × slower: " in text
    assert "asynchronous 3.25 × faster if staleness has no cost" in text
    for suffix in ("png", "svg"):
        assert (tmp_path / f"stragglers.{suffix}").stat().st_size > 1000
    # After an interruption the earlier rows are kept.
    lines = path.read_text(encoding="utf-8").splitlines(True)
    path.write_text("".join(lines[:5]), encoding="utf-8")
    stragglers.run(tmp_path, CONFIG, digits_file)
    resumed = path.read_text(encoding="utf-8").splitlines(True)
    assert resumed[:7] == lines[:7] and len(resumed) == len(lines)


@pytest.mark.full
def test_unreached_target_is_reported(tmp_path, digits_file):
    config = CONFIG._replace(epsilon=1e-9, slowness=(4,), seeds=1)
    text = stragglers.run(tmp_path, config, digits_file)
    rows = read_csv(tmp_path / "stragglers.csv")
    assert [row["status"] for row in rows] == ["not reached"] * 4
    assert all(row["time"] == "" for row in rows)
    assert "observed: synchronous not reached, asynchronous not reached" in text

    arguments = ["stragglers", "--quick", "--data", digits_file, "--out", str(tmp_path)]
    result = CliRunner().invoke(reproduce, arguments)
    assert result.exit_code == 1
    assert "other settings: epsilon must be 1e-09, got 0.005" in result.output
