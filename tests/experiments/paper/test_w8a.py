"""The w8a experiment, with few cells on handwritten digits."""

import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from click.testing import CliRunner
from harness.experiment_files import assert_figures, read_csv

import localsgd_jax as lsgd
from localsgd_jax.cli.reproduce import reproduce
from localsgd_jax.experiments import datasets, logistic
from localsgd_jax.experiments.paper import (
    racing,
    step_size_grid,
    step_size_search,
    w8a,
    w8a_report,
)
from localsgd_jax.experiments.paper.step_size_search import Cell, SearchOptions
from localsgd_jax.experiments.paper.step_sizes import learning_rate, step_sizes

CONFIG = w8a.W8aConfig(
    (
        w8a.CellGrid(0.05, (2,), (1,), (1, 3)),
        w8a.CellGrid(0.05, (2,), (2,), (3,)),
        w8a.CellGrid(0.05, (2,), (1,), (5,)),
    ),
    SearchOptions(seeds=2, min_exponent=-6, max_exponent=-4),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits_file):
    """Directory and findings of a finished experiment."""
    directory = tmp_path_factory.mktemp("w8a")
    text = w8a.run(directory, CONFIG, digits_file, (2.0,))
    return directory, text


@pytest.mark.full
def test_experiment_writes_table_speedups_and_figures(finished):
    directory, text = finished
    rows = read_csv(directory / "w8a.csv")
    pairs = [(row["workers"], row["period"]) for row in rows]
    assert pairs == [("1", "1"), ("1", "3"), ("2", "3"), ("1", "5")]
    for row in rows:
        assert row["status"] == "reached"
        assert row["step_size"] in ("constant", "decaying")
        assert row["output"] in step_size_grid.OUTPUTS
        names = ("min_iterations", "iterations", "max_iterations")
        low, mean, high = (float(row[name]) for name in names)
        assert 1 < low <= mean <= high
        # Of two seeds.
        assert float(row["std"]) == pytest.approx((high - low) / 2**0.5, abs=0.1)
    assert rows[0]["iterations"] == rows[1]["iterations"]
    assert_figures(directory, "w8a")
    speedups = {
        (float(row["rho"]), row["workers"], row["period"]): float(row["speedup"])
        for row in read_csv(directory / "w8a_speedup.csv")
    }
    iterations = {(r["workers"], r["period"]): float(r["iterations"]) for r in rows}
    base = iterations["1", "1"] / iterations["2", "3"]
    assert speedups[0.0, "2", "3"] == pytest.approx(base, rel=1e-3)
    assert speedups[2.0, "2", "3"] == pytest.approx(base / (1 + 2 * 2 / 3), rel=1e-3)
    assert "w8a: expected: communication at ρ = 2" in text
    assert "w8a: observed: largest speedup" in text


@pytest.mark.full
def test_iterations_match_library(finished, digits_file):
    """The winner with two workers, run again with the library's gated step."""
    directory, _ = finished
    row = read_csv(directory / "w8a.csv")[2]
    dataset = datasets.load(digits_file)
    examples = step_size_grid.to_device(dataset)
    config = step_size_grid.GridConfig(2, 2, 2)
    size = step_sizes(range(int(row["exponent"]), int(row["exponent"]) + 1))
    index = int(row["step_size"] == "decaying")
    minimum, dimension = logistic.optimal_value(dataset), dataset.dimension
    power = step_size_grid.OUTPUTS.index(row["output"]) - 1
    count = dataset.examples
    algorithm = lsgd.local_sgd(
        logistic.loss_fn(dataset),
        optax.sgd(lambda t: learning_rate(size, t, count)[index]),
        rule=lsgd.average("worker"),
    )
    cluster = lsgd.simulate(algorithm, (2, 2), axis=("seed", "worker"))
    step = jax.jit(lsgd.gated(cluster, lsgd.every(3)))
    state, total = cluster.init(jnp.zeros(dimension)), 0.0
    weighted = np.zeros((2, dimension))
    hits = [math.inf, math.inf]
    evaluated = set(racing.evaluation_steps(CONFIG.options.max_steps))
    for t in itertools.count():
        params = np.asarray(state.workers.params)
        means = params.reshape(2, 2, dimension).mean(axis=1)
        for seed in range(2) if t in evaluated else ():
            x = means[seed] if power < 0 else weighted[seed] / total
            if logistic.objective(dataset, x) - minimum <= 0.05:
                hits[seed] = min(hits[seed], t)
        if max(hits) < math.inf:
            break
        total += (t + 1.0) ** power
        weighted += (t + 1.0) ** power * means
        batch = step_size_grid.sample_batch(examples, jnp.int32(t), config)
        state, _ = step(state, batch)
    assert sum(hits) / 2 >= float(row["iterations"])
    assert min(abs(hit - int(row["min_iterations"])) for hit in hits) <= 1


def test_interrupted_experiment_resumes(finished, digits_file, tmp_path, monkeypatch):
    complete, _ = finished
    solver, solved, stop_after = step_size_search.solver, [], 1

    def interrupted_solver(*arguments):
        solve = solver(*arguments)

        def solve_or_stop(cell):
            if len(solved) == stop_after:
                raise KeyboardInterrupt
            solved.append(cell)
            return solve(cell)

        return solve_or_stop

    monkeypatch.setattr(w8a, "solver", interrupted_solver)
    with pytest.raises(KeyboardInterrupt):
        w8a.run(tmp_path, CONFIG, digits_file, (2.0,))
    assert len(read_csv(tmp_path / "w8a.csv")) == 2
    assert not (tmp_path / "w8a.txt").exists()
    with open(tmp_path / "w8a.csv", "a") as file:
        file.write("0.05,2,2,3,rea")
    stop_after = None
    w8a.run(tmp_path, CONFIG, digits_file, (2.0,))
    assert solved == [Cell(0.05, 2, 1, 1), Cell(0.05, 2, 2, 3)]
    for name in ("w8a.csv", "w8a_speedup.csv", "w8a.txt", "w8a.json", "w8a.svg"):
        assert (tmp_path / name).read_bytes() == (complete / name).read_bytes(), name


def test_other_rho_repeats_no_run(finished, digits_file, tmp_path, monkeypatch):
    directory = shutil.copytree(finished[0], tmp_path / "copy")
    before = (directory / "w8a.csv").read_bytes()
    monkeypatch.setattr(w8a, "_prepare", None)
    text = w8a.run(directory, CONFIG, digits_file, (0.5, 8.0))
    assert "ρ = 0.5" in text and "ρ = 8" in text
    assert (directory / "w8a.csv").read_bytes() == before
    rhos = {row["rho"] for row in read_csv(directory / "w8a_speedup.csv")}
    assert rhos == {"0.0", "0.5", "8.0"}


def test_command_with_other_settings_raises(finished, digits_file, tmp_path):
    directory = shutil.copytree(finished[0], tmp_path / "copy")
    arguments = ["w8a", "--quick", "--data", digits_file, "--out", str(directory)]
    result = CliRunner().invoke(reproduce, arguments)
    assert result.exit_code == 1
    assert "other settings: grids must be " in result.output
    assert "seeds must be 2, got 3" in result.output


@pytest.mark.full
@pytest.mark.parametrize(
    ("overrides", "status", "finding"),
    [
        ({"max_steps": 3}, "not reached", "observed: not reached"),
        (
            {"exponents": (14, 15), "max_steps": 20},
            "diverged",
            "every step size of the grid",
        ),
    ],
)
def test_missing_results_are_reported(
    digits_file, tmp_path, overrides, status, finding
):
    grid = w8a.CellGrid(0.005, (2,), (1,), (1,))
    options = SearchOptions(seeds=1, min_exponent=-6, max_exponent=-5)
    config = w8a.with_overrides(w8a.W8aConfig((grid,), options), **overrides)
    text = w8a.run(tmp_path, config, digits_file, (25.0,))
    (row,) = read_csv(tmp_path / "w8a.csv")
    assert row["status"] == status
    empty = step_size_search.BestStepSize._fields[1:8]
    assert empty[0] == "iterations" and empty[-1] == "output"
    assert all(row[name] == "" for name in empty)
    assert finding in text
    assert not (tmp_path / "w8a_speedup.csv").exists()


def reached_row(batch, workers, period, first_grid):
    cell = {"epsilon": 0.005, "batch": batch, "workers": workers, "period": period}
    numbers = {"first_grid": first_grid, "iterations": first_grid / 2}
    numbers |= {"std": first_grid / 20}
    return cell | numbers | {"status": "reached"}


def test_reference_comparison_lists_cells_that_differ():
    rows = [reached_row(4, 1, 1, 18506 * 1.1), reached_row(4, 8, 64, 4017 * 0.8)]
    rows.append(reached_row(4, 128, 64, 1.0))  # Has no reference value.
    (finding,) = w8a_report._reference_findings(rows, seeds=6)
    assert "in each of 2 cells" in finding.expected
    # A relative standard deviation of 10 %, and √(1/3 + 1/6) = 0.707.
    assert finding.observed == (
        "in 1 of 2; largest deviation -20.0% (standard error 7.1%) at b = 4, K = 8, "
        "H = 64"
    )
    single_seed = [row | {"std": None} for row in rows]
    (finding,) = w8a_report._reference_findings(single_seed, seeds=1)
    assert "-20.0% at b = 4" in finding.observed
    assert w8a_report._reference_findings(rows[2:], seeds=6) == []


def test_configurations_have_the_cells_of_the_paper():
    cells = w8a.cells(w8a.FULL)
    coarse = itertools.product(
        [0.005], [4, 16], [2**i for i in range(8)], [2**i for i in range(7)]
    )
    fine = itertools.product([0.0005], [4, 16], [1, 16], [1, 8, 64])
    assert cells == [Cell(*cell) for cell in (*coarse, *fine)]
    assert w8a.FULL.options.seeds >= 3 and w8a.QUICK.options.seeds >= 3
    assert set(w8a.cells(w8a.QUICK)) < set(cells)
