"""The experiments of the paper: engine, race, table, and each of them in miniature."""

import csv
import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from click.testing import CliRunner
from sklearn.datasets import dump_svmlight_file

import localsgd_jax as lsgd
from localsgd_jax.experiments import datasets, logistic
from localsgd_jax.reproduce import (
    grid,
    kinked,
    linear,
    objective,
    output,
    race,
    rounds,
    search,
    speedup_theory,
    stragglers,
    w8a,
    w8a_report,
)
from localsgd_jax.reproduce.command import reproduce
from localsgd_jax.reproduce.output import Table, Verdict
from localsgd_jax.reproduce.search import Best, Cell, Options
from localsgd_jax.reproduce.step_sizes import learning_rate, step_sizes

DATASET = datasets.digits()
COUNT, SIZE = DATASET.features.shape
SHAPE = grid.Shape(workers=3, batch=2, seeds=2)
EXPONENTS = range(-4, -2)


@pytest.fixture(scope="module")
def examples():
    return grid.load(DATASET)


# The engine.


@pytest.mark.parametrize("step", [0, 1, 99])
def test_learning_rates_are_the_papers(step):
    sizes = step_sizes(range(-9, 3))
    expected = [32 * 2.0**i for i in range(-9, 3)]
    expected += [min(32, 2.0**i * COUNT / (step + 1)) for i in range(-9, 3)]
    np.testing.assert_allclose(learning_rate(sizes, step, COUNT), expected, rtol=1e-6)


def one_run(examples, period, steps, lane, seed):
    """Iterates x̄₀, …, x̄_T of one step size and seed, by the library's plain path."""
    sizes = step_sizes(EXPONENTS)

    def rate(step):
        return learning_rate(sizes, step, COUNT)[lane]

    algorithm = lsgd.local_sgd(
        logistic.loss_fn(DATASET), optax.sgd(rate), rule=lsgd.average()
    )
    cluster = lsgd.simulate(algorithm, SHAPE.workers)
    step = jax.jit(lsgd.gated(cluster, lsgd.every(period)))
    state, means = cluster.init(jnp.zeros(SIZE)), []
    for t in range(steps):
        means.append(lsgd.consensus(state))
        batch = grid.draw(examples, jnp.int32(t), SHAPE)
        mine = slice(seed * SHAPE.workers, (seed + 1) * SHAPE.workers)
        state, _ = step(state, jax.tree.map(lambda x, mine=mine: x[mine], batch))
    return np.array([*means, lsgd.consensus(state)])


def test_the_grid_runs_what_the_library_runs(examples):
    period, steps = 4, 11
    simulation = grid.simulation(DATASET, examples, SHAPE)
    sizes = step_sizes(EXPONENTS)
    walk = simulation.start(sizes)
    for until in (3, steps):
        walk = simulation.advance(walk, sizes, period, until)
    found = np.asarray(simulation.outputs(walk))
    assert found.shape == (4, SHAPE.seeds, 2 * len(EXPONENTS), SIZE)
    for seed, lane in ((0, 0), (1, 1), (1, 3)):
        path = one_run(examples, period, steps, lane, seed)
        weights = [(np.arange(steps) + 1.0) ** power for power in range(3)]
        averages = [np.average(path[:-1], axis=0, weights=w) for w in weights]
        np.testing.assert_allclose(
            found[:, seed, lane], [path[-1], *averages], 1e-5, 1e-5
        )
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-3


def test_workers_that_always_agree_are_one_worker(examples):
    sizes, ends = step_sizes(EXPONENTS), []
    for shape in (SHAPE, grid.Shape(1, SHAPE.workers * SHAPE.batch, SHAPE.seeds)):
        simulation = grid.simulation(DATASET, examples, shape)
        walk = simulation.advance(simulation.start(sizes), sizes, 1, 9)
        ends.append(simulation.outputs(walk))
    np.testing.assert_allclose(*ends, 1e-4, 1e-5)
    cell = Cell(0.1, SHAPE.batch, SHAPE.workers, 1)
    assert search.canonical(cell) == Cell(0.1, SHAPE.batch * SHAPE.workers, 1, 1)
    assert search.canonical(cell._replace(period=2)) == cell._replace(period=2)
    alone = Cell(0.1, 4, 1, 64)
    assert search.canonical(alone) == alone._replace(period=1)


def test_batches_are_drawn_with_replacement_from_all_examples(examples):
    shape = grid.Shape(workers=8, batch=1000, seeds=1)
    features, labels = grid.draw(examples, jnp.int32(5), shape)
    assert features.shape == (8, 1000, SIZE) and labels.shape == (8, 1000)
    rows = np.asarray(examples.features)
    drawn = {row.tobytes() for row in np.asarray(features).reshape(-1, SIZE)}
    everything = {row.tobytes() for row in rows}
    assert drawn <= everything
    # 8000 draws of 1797: all but a share of exp(−8000/1797) = 1.2 % are met.
    assert 0.97 * len(everything) < len(drawn) < len(everything)


def test_draws_differ_between_steps_workers_and_seeds(examples):
    shape = grid.Shape(workers=2, batch=50, seeds=2)
    parts = [
        np.asarray(part)
        for step in (0, 1)
        for part in grid.draw(examples, jnp.int32(step), shape)[0]
    ]
    assert len({part.tobytes() for part in parts}) == len(parts) == 8


def test_small_integers_are_stored_as_such_and_others_are_not():
    whole = DATASET._replace(features=DATASET.features.rint())
    assert grid.load(whole).features.dtype == jnp.int8
    np.testing.assert_array_equal(grid.load(whole).features, whole.features.toarray())
    large = whole._replace(features=whole.features * 1000)
    for dataset in (DATASET, large):
        loaded = grid.load(dataset).features
        assert loaded.dtype == jnp.float32
        np.testing.assert_allclose(loaded, dataset.features.toarray(), rtol=1e-6)


# The objective.


def test_the_objective_counts_equal_examples():
    twice = np.r_[np.arange(COUNT), np.arange(700), 7, 7]
    dataset = DATASET._replace(
        features=DATASET.features[twice], labels=DATASET.labels[twice]
    )
    points = np.random.default_rng(0).normal(size=(131, SIZE)).astype(np.float32)
    points[0] = 0
    found = objective.suboptimality(dataset, 0.25)(points)
    expected = [logistic.value(dataset, x) - 0.25 for x in points]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_the_objective_is_infinite_where_it_is_no_number():
    points = np.zeros((3, SIZE), np.float32)
    points[1], points[2, 5] = np.nan, np.inf
    found = objective.suboptimality(DATASET, 0.0)(points)
    np.testing.assert_allclose(found, [math.log(2), np.inf, np.inf], rtol=1e-6)


# The race.


def curves(seed, shape=(4, 3, 6)):
    """Errors that fall as powers of t, some of them to a level above the target."""
    rng = np.random.default_rng(seed)
    power, scale = rng.uniform(0.5, 3, shape), rng.uniform(3, 30, shape)
    floor = np.where(rng.random(shape) < 0.3, 0.02, 0.0)
    return lambda t: 100 * (1 + t / scale) ** -power + floor


def run_race(errors, limit, best=np.inf, target=0.01):
    """Runs a race over errors known in advance; returns it and what it looked at."""
    shape, seen = errors(1).shape, []
    contest = race.Race(shape, target, start=100.0, best=best)

    def errors_of(points):
        seen.append(len(points))
        return points[:, 0].astype(float)

    for t in race.looks(limit):
        contest.look(t, errors(t)[..., None], errors_of, last=t == limit)
        if not contest.racing().any():
            break
    return contest, sum(seen)


def brute_force(errors, limit, target=0.01):
    """First look at which each run has an output on target, infinite if none."""
    first = np.full(errors(1).shape[1:], np.inf)
    for t in race.looks(limit):
        hit = (errors(t) <= target).any(axis=0)
        first[hit & np.isinf(first)] = t
    return first


@pytest.mark.parametrize("seed", range(8))
def test_the_race_finds_what_looking_everywhere_finds(seed):
    errors, limit = curves(seed), 20_000
    contest, looked = run_race(errors, limit)
    expected = brute_force(errors, limit)
    means = expected.mean(axis=0)
    winner = means.argmin()
    assert np.isfinite(means[winner])
    arrival = contest.arrival()
    assert arrival.step.mean(axis=0).argmin() == winner
    np.testing.assert_array_equal(arrival.step[:, winner], expected[:, winner])
    for r, step in enumerate(expected[:, winner]):
        best = errors(step)[:, r, winner].argmin()
        assert arrival.output[r, winner] == best
    everywhere = len(contest.times) * errors(1).size
    assert looked < everywhere / 3


def test_the_race_reports_no_step_where_the_target_is_not_reached():
    errors = curves(1)
    contest, _ = run_race(lambda t: errors(t) + 0.02, limit=50)
    arrival = contest.arrival()
    assert np.isinf(arrival.step).all()
    assert not arrival.hopeless.any()
    assert contest.times[-1] == 50 and (contest.looked == len(contest.times) - 1).all()


@pytest.mark.parametrize("level", [100.0, 1e9, np.inf])
def test_the_race_knows_when_all_diverge(level):
    contest, _ = run_race(lambda t: np.full((4, 2, 3), level), limit=40)
    assert contest.arrival().hopeless.all()


def test_the_race_ends_once_the_given_best_cannot_be_beaten():
    slow, _ = run_race(curves(2), 20_000, best=12.0)
    assert slow.times[-1] == 12
    assert np.isinf(slow.arrival().step.mean(axis=0)).all()


def test_a_race_goes_on_for_a_step_size_whose_mean_may_still_win():
    # The first arrives at 100 with all seeds; the second at 10 and, at last, at 150.
    arrive = np.array([[[100.0, 10.0], [100.0, 150.0]]])
    contest, _ = run_race(lambda t: np.where(t >= arrive, 0.001, 1.0), 10_000)
    step = contest.arrival().step
    assert step[:, 1].mean() < step[:, 0].mean() < 110
    assert contest.times[-1] < 200


# The search for the best step size.


def fake_race(table, start=100.0):
    """A race in which exponent i takes table[i] steps, constant or decaying alike."""

    def run(window, best):
        errors = np.array([[table.get(i, np.inf) for i in window] * 2])
        contest = race.Race((4, 1, 2 * len(window)), 0.01, start, best)
        contest.step = np.where(errors < best, errors, np.inf)
        contest.error[:] = 1.0 if table else start
        windows.append((window[0], window[-1]))
        return contest

    windows = []
    return run, windows


def test_the_grid_is_extended_while_the_best_lies_on_its_edge():
    table = {-1: 90.0, 0: 80.0, 1: 70.0, 2: 60.0, 3: 50.0, 4: 40.0, 5: 45.0}
    run, windows = fake_race(table)
    best = search._search(run, Options(lowest=-1, highest=1))
    assert windows == [(-1, 1), (2, 4), (5, 7)]
    assert best == Best("reached", 40.0, None, 40, 40, "constant", 4, "last", 70.0)
    run, windows = fake_race({-i: v for i, v in table.items()})
    best = search._search(run, Options(lowest=-1, highest=1))
    assert windows == [(-1, 1), (-4, -2), (-7, -5)]
    assert (best.exponent, best.iterations, best.first_grid) == (-4, 40.0, 70.0)


def test_the_grid_is_not_extended_without_need():
    run, windows = fake_race({-1: 90.0, 0: 60.0, 1: 70.0})
    best = search._search(run, Options(lowest=-1, highest=1))
    assert windows == [(-1, 1)]
    assert best.iterations == best.first_grid == 60.0
    run, windows = fake_race({1: 70.0, 2: 50.0, 3: 60.0})
    assert search._search(run, Options(lowest=-1, highest=1)).exponent == 2
    assert windows == [(-1, 1), (2, 4)]


def test_nothing_reached_has_no_number():
    run, windows = fake_race({})
    assert search._search(run, Options(lowest=-1, highest=1)) == Best("diverged")
    run, _ = fake_race({9: 5.0})
    assert search._search(run, Options(lowest=-1, highest=1)) == Best("not reached")
    assert windows == [(-1, 1)]


def test_the_winner_is_named_by_its_place_on_the_grid():
    window = range(-3, 0)
    for place, expected in enumerate(
        itertools.product(("constant", "decaying"), window)
    ):
        contest = race.Race((4, 2, 6), 0.01, 100.0, np.inf)
        contest.step[:, place] = [30, 20]
        contest.output[:, place] = 2
        best = search._winner(contest, window)
        assert (best.step_size, best.exponent) == expected
        assert best[:5] == ("reached", 25.0, 7.1, 20, 30) and best.output == "linear"


# The table.

COLUMNS = ("name", "count", "share", "note")


def test_a_table_gives_back_what_was_put_in(tmp_path):
    rows = [
        {"name": "a, b", "count": 3, "share": 0.1, "note": None},
        {"name": "c", "count": -4, "share": 1e-300, "note": "two\twords"},
    ]
    for row in rows:
        Table(tmp_path, "t", {"x": (1, 2)}, COLUMNS).append(row)
    assert Table(tmp_path, "t", {"x": [1, 2]}, COLUMNS).rows == rows


def test_a_row_that_was_cut_short_is_dropped(tmp_path):
    table = Table(tmp_path, "t", {}, COLUMNS)
    row = {"name": "a", "count": 1, "share": 0.5, "note": "b"}
    table.append(row)
    whole = table.path.read_text()
    for cut in (1, 5):
        table.path.write_text(whole + whole.splitlines()[1][:-cut])
        assert Table(tmp_path, "t", {}, COLUMNS).rows == [row]
        assert table.path.read_text() == whole


def test_other_settings_are_refused_with_what_differs(tmp_path):
    Table(tmp_path, "t", {"seeds": 3, "limit": 7}, COLUMNS)
    with pytest.raises(ValueError, match=r"other settings: seeds = 3 there, 4 here$"):
        Table(tmp_path, "t", {"seeds": 4, "limit": 7}, COLUMNS)
    with pytest.raises(ValueError, match="limit = 7 there, None here"):
        Table(tmp_path, "t", {"seeds": 3}, COLUMNS)
    with pytest.raises(ValueError, match="columns"):
        Table(tmp_path, "t", {"seeds": 3, "limit": 7}, ("name",))
    (tmp_path / "t.json").unlink()
    with pytest.raises(ValueError, match=r"t\.csv is there without its t\.json"):
        Table(tmp_path, "t", {"seeds": 3, "limit": 7}, COLUMNS)


def test_verdicts_are_written_line_by_line(tmp_path):
    text = output.write_verdicts(tmp_path, "n", [Verdict("a", "b"), Verdict("c", "d")])
    lines = ["n: expected: a", "n: seen: b", "n: expected: c", "n: seen: d"]
    assert text.splitlines() == lines
    assert (tmp_path / "n.txt").read_text(encoding="utf-8") == text


# w8a in miniature, on handwritten digits.

PLAN = w8a.Plan(
    (
        w8a.Block(0.05, (2,), (1,), (1, 3)),
        w8a.Block(0.05, (2,), (2,), (3,)),
        w8a.Block(0.05, (2,), (1,), (5,)),
    ),
    Options(seeds=2, lowest=-6, highest=-4),
)


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits"
    dump_svmlight_file(DATASET.features[:400], DATASET.labels[:400], str(path))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits_file):
    directory = tmp_path_factory.mktemp("w8a")
    text = w8a.run(directory, PLAN, digits_file, (2.0,))
    return directory, text


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_pictures(directory, name):
    assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (directory / f"{name}.svg").read_text(encoding="utf-8")


def test_w8a_writes_its_files(finished):
    directory, text = finished
    rows = read(directory / "w8a.csv")
    pairs = [(row["workers"], row["period"]) for row in rows]
    assert pairs == [("1", "1"), ("1", "3"), ("2", "3"), ("1", "5")]
    for row in rows:
        assert row["status"] == "reached"
        assert row["step_size"] in ("constant", "decaying")
        assert row["output"] in grid.OUTPUTS
        least, mean, most = (float(row[n]) for n in ("least", "iterations", "most"))
        assert 1 < least <= mean <= most
        # Of two seeds.
        assert float(row["deviation"]) == pytest.approx(
            (most - least) / 2**0.5, abs=0.1
        )
    assert rows[0]["iterations"] == rows[1]["iterations"]
    assert_pictures(directory, "w8a")
    speeds = {
        (float(row["rho"]), row["workers"], row["period"]): float(row["speedup"])
        for row in read(directory / "w8a_speedup.csv")
    }
    iterations = {(r["workers"], r["period"]): float(r["iterations"]) for r in rows}
    base = iterations["1", "1"] / iterations["2", "3"]
    assert speeds[0.0, "2", "3"] == pytest.approx(base, rel=1e-3)
    assert speeds[2.0, "2", "3"] == pytest.approx(base / (1 + 2 * 2 / 3), rel=1e-3)
    assert "w8a: expected: communication at ρ = 2" in text
    assert "w8a: seen: largest speedup" in text


def test_w8a_finds_what_a_plain_loop_finds(finished, digits_file):
    """The winner with two workers, run again by the library's plain path."""
    directory, _ = finished
    row = read(directory / "w8a.csv")[2]
    dataset = datasets.load(digits_file)
    examples, shape = grid.load(dataset), grid.Shape(2, 2, 2)
    size = step_sizes(range(int(row["exponent"]), int(row["exponent"]) + 1))
    lane = int(row["step_size"] == "decaying")
    minimum, width = logistic.minimum(dataset), dataset.features.shape[1]
    power = grid.OUTPUTS.index(row["output"]) - 1
    count = len(dataset.labels)
    algorithm = lsgd.local_sgd(
        logistic.loss_fn(dataset),
        optax.sgd(lambda t: learning_rate(size, t, count)[lane]),
        rule=lsgd.average("worker"),
    )
    cluster = lsgd.simulate(algorithm, (2, 2), axis=("seed", "worker"))
    step = jax.jit(lsgd.gated(cluster, lsgd.every(3)))
    state, total, weighted = cluster.init(jnp.zeros(width)), 0.0, np.zeros((2, width))
    arrived = [math.inf, math.inf]
    looks = set(race.looks(PLAN.options.limit))
    for t in itertools.count():
        means = np.asarray(state.workers.params).reshape(2, 2, width).mean(axis=1)
        for seed in range(2) if t in looks else ():
            x = means[seed] if power < 0 else weighted[seed] / total
            if logistic.value(dataset, x) - minimum <= 0.05:
                arrived[seed] = min(arrived[seed], t)
        if max(arrived) < math.inf:
            break
        total += (t + 1.0) ** power
        weighted += (t + 1.0) ** power * means
        state, _ = step(state, grid.draw(examples, jnp.int32(t), shape))
    assert sum(arrived) / 2 >= float(row["iterations"])
    assert min(abs(a - int(row["least"])) for a in arrived) <= 1


def test_w8a_goes_on_where_it_was_interrupted(
    finished, digits_file, tmp_path, monkeypatch
):
    whole, _ = finished
    solver, solved, stop_after = search.solver, [], 1

    def counting(*arguments):
        solve = solver(*arguments)

        def once(cell):
            if len(solved) == stop_after:
                raise KeyboardInterrupt
            solved.append(cell)
            return solve(cell)

        return once

    monkeypatch.setattr(w8a, "solver", counting)
    with pytest.raises(KeyboardInterrupt):
        w8a.run(tmp_path, PLAN, digits_file, (2.0,))
    assert len(read(tmp_path / "w8a.csv")) == 2
    assert not (tmp_path / "w8a.txt").exists()
    with open(tmp_path / "w8a.csv", "a") as file:
        file.write("0.05,2,2,3,rea")
    stop_after = None
    w8a.run(tmp_path, PLAN, digits_file, (2.0,))
    assert solved == [Cell(0.05, 2, 1, 1), Cell(0.05, 2, 2, 3)]
    for name in ("w8a.csv", "w8a_speedup.csv", "w8a.txt", "w8a.json", "w8a.svg"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_another_price_needs_no_new_run(finished, digits_file, tmp_path, monkeypatch):
    directory = shutil.copytree(finished[0], tmp_path / "copy")
    before = (directory / "w8a.csv").read_bytes()
    monkeypatch.setattr(w8a, "_fill", None)
    text = w8a.run(directory, PLAN, digits_file, (0.5, 8.0))
    assert "ρ = 0.5" in text and "ρ = 8" in text
    assert (directory / "w8a.csv").read_bytes() == before
    rhos = {row["rho"] for row in read(directory / "w8a_speedup.csv")}
    assert rhos == {"0.0", "0.5", "8.0"}


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"limit": 3}, "not reached", "seen: not reached"),
        (
            {"exponents": (14, 15), "limit": 20},
            "diverged",
            "every step size of the grid",
        ),
    ],
)
def test_w8a_says_so_when_there_is_no_result(
    digits_file, tmp_path, changes, status, said
):
    block = w8a.Block(0.005, (2,), (1,), (1,))
    plan = w8a.changed(
        w8a.Plan((block,), Options(seeds=1, lowest=-6, highest=-5)), **changes
    )
    text = w8a.run(tmp_path, plan, digits_file, (25.0,))
    (row,) = read(tmp_path / "w8a.csv")
    assert row["status"] == status
    blank = (
        "iterations",
        "deviation",
        "least",
        "most",
        "step_size",
        "exponent",
        "output",
    )
    assert all(row[name] == "" for name in blank)
    assert said in text
    assert not (tmp_path / "w8a_speedup.csv").exists()


def reached(batch, workers, period, first_grid):
    cell = {"epsilon": 0.005, "batch": batch, "workers": workers, "period": period}
    numbers = {"first_grid": first_grid, "iterations": first_grid / 2}
    numbers |= {"deviation": first_grid / 20}
    return cell | numbers | {"status": "reached"}


def test_the_comparison_names_the_cells_that_differ():
    rows = [reached(4, 1, 1, 18506 * 1.1), reached(4, 8, 64, 4017 * 0.8)]
    rows.append(reached(4, 128, 64, 1.0))  # Not among the independent numbers.
    (verdict,) = w8a_report._compare(rows, seeds=6)
    assert "in each of 2 cells" in verdict.expected
    # A spread of 10 %, and √(1/3 + 1/6) = 0.707.
    assert verdict.seen == (
        "in 1 of 2; largest difference -20.0% (standard error 7.1%) at b = 4, K = 8, "
        "H = 64"
    )
    alone = [row | {"deviation": None} for row in rows]
    assert "-20.0% at b = 4" in w8a_report._compare(alone, seeds=1)[0].seen
    assert w8a_report._compare(rows[2:], seeds=6) == []


def test_the_plans_have_the_cells_asked_for():
    cells = w8a.cells(w8a.full())
    coarse = itertools.product(
        [0.005], [4, 16], [2**i for i in range(8)], [2**i for i in range(7)]
    )
    fine = itertools.product([0.0005], [4, 16], [1, 16], [1, 8, 64])
    assert cells == [Cell(*cell) for cell in (*coarse, *fine)]
    assert w8a.full().options.seeds >= 3 and w8a.quick().options.seeds >= 3
    assert set(w8a.cells(w8a.quick())) < set(cells)


# The model of the speedup.


def test_the_models_table_holds_the_known_numbers(tmp_path):
    text = speedup_theory.run(tmp_path, rho=25.0, epsilon=1e-6)
    table = {
        (r["model"], float(r["epsilon"]), int(r["period"]), int(r["workers"])): float(
            r["speedup"]
        )
        for r in read(tmp_path / "speedup-theory.csv")
    }
    known = {(1, 2): 0.039, (1, 16): 0.021, (16, 2): 0.485, (16, 16): 0.334}
    known |= {(64, 16): 1.258, (256, 16): 4.07, (256, 128): 4.96}
    known |= {(1024, 16): 9.24, (1024, 128): 17.8, (1024, 1024): 20.1}
    for (period, workers), speed in known.items():
        for model in speedup_theory.MODELS:
            found = table[model, 0.0, period, workers]
            assert found == pytest.approx(speed, abs=0.6 * 10 ** -_digits(speed))
    # Growth 4Kε(1 + H + H²K) = 4 · 2 · 10⁻⁶ · (1 + 512 + 2 · 512²) for the variant.
    root = (1 + math.sqrt(1 + 8e-6 * (513 + 2 * 512**2))) / 2
    expected = 2 / root / (1 + 50 / 512)
    assert table["with 4K", 1e-6, 512, 2] == pytest.approx(expected, rel=1e-4)
    assert table["published", 1e-6, 512, 2] == pytest.approx(1.631, abs=6e-4)
    assert "11 of 11" in text and "S(1024) = 20.1" in text
    assert_pictures(tmp_path, "speedup-theory")


def _digits(number):
    """Decimals with which a known number is given."""
    return len(str(number).partition(".")[2])


def test_the_model_at_another_price_claims_nothing_known(tmp_path):
    text = speedup_theory.run(tmp_path, rho=1.0, epsilon=1e-5)
    assert "independently" not in text and "H/(2ρ) = 512" in text


# The problem with a kink.


@pytest.mark.parametrize("batch", [1, 3, 8, 16, 32])
def test_signs_have_mean_zero_and_variance_one_over_b(batch):
    x = np.asarray(kinked.signs(jax.random.key(0), (200, 1000), batch), float)
    assert abs(x.mean()) < 5 / math.sqrt(batch * x.size)
    assert x.var() == pytest.approx(1 / batch, rel=0.02)
    ones = (x + 1) * batch / 2
    np.testing.assert_allclose(ones, ones.round(), atol=1e-5)
    assert ones.min() >= 0 and ones.max() <= batch


def test_the_error_is_that_of_a_plain_loop():
    run = kinked.Run(workers=3, period=4, steps=30, batch=2, dimension=5)
    a, x = 49, np.zeros((3, 5))
    mean, total = np.zeros(5), 0.0
    for t in range(run.steps):
        weight = (a + t) ** 2
        total += weight
        mean += weight * x.mean(axis=0)
        key = jax.random.fold_in(jax.random.key(0), t)
        noise = np.asarray(kinked.signs(key, x.shape, 2))
        x = x - 4 / (a + t) * (np.where(x > 0, 1.0, 3.0) * x - noise)
        if (t + 1) % run.period == 0:
            x[:] = x.mean(axis=0)
    mean /= total
    gaps = np.where(mean > 0, 1.0, 3.0) / 2 * mean**2
    error = kinked.error(run)
    assert error.mean == pytest.approx(gaps.mean(), rel=1e-4)
    assert error.deviation == pytest.approx(gaps.std() / math.sqrt(5), rel=1e-4)


def test_rounds_in_miniature(tmp_path):
    plan = rounds.Plan((64, 400), workers=4, dimension=128)
    text = rounds.run(tmp_path, plan)
    rows = {(r["rule"], int(r["steps"])): r for r in read(tmp_path / "rounds.csv")}
    periods = {rule: int(rows[rule, 400]["period"]) for rule in rounds.RULES}
    assert list(periods.values()) == [1, 10, 44, 100]
    assert [int(rows[rule, 400]["rounds"]) for rule in periods] == [400, 40, 10, 4]
    for (rule, steps), row in rows.items():
        base = float(rows[rounds.MINI_BATCH, steps]["error"])
        assert float(row["ratio"]) == pytest.approx(float(row["error"]) / base)
        assert (float(row["ratio"]) == 1) == (rule == rounds.MINI_BATCH)
    assert float(rows["T/K", 400]["ratio"]) > float(rows["sqrt(T/K)", 400]["ratio"])
    assert "H = sqrt(T/K): error within 1.3 × of mini-batch SGD's at every T" in text
    assert_pictures(tmp_path, "rounds")
    again = rounds.run(tmp_path, plan)
    assert again == text
    with pytest.raises(ValueError, match="steps = "):
        rounds.run(tmp_path, plan._replace(steps=(64,)))


def test_rounds_count_the_T_within_the_factor():
    plan = rounds.Plan((100, 1000))
    rows = [
        {"rule": rule, "steps": steps, "rounds": steps // 10, "ratio": ratio}
        for rule, ratios in zip(
            list(rounds.RULES)[1:], [(1.2, 1.31), (1.3, 1.1), (2.0, 3.0)], strict=True
        )
        for steps, ratio in zip(plan.steps, ratios, strict=True)
    ]
    seen = [verdict.seen for verdict in rounds._verdicts(plan, rows)]
    starts = ["within at 1 of 2", "within at 2 of 2", "within at 0 of 2"]
    assert [text[:16] for text in seen] == starts
    assert "ratio 1.20 at T = 100 to 1.31 at T = 1000, 10 to 10 times" in seen[0]


def test_linear_in_miniature(tmp_path):
    plan = linear.Plan(64, steps=60, period=4, workers=(1, 4), batches=(2,))
    text = linear.run(tmp_path, plan)
    rows = read(tmp_path / "linear.csv")
    pairs = [(row["batch"], row["workers"]) for row in rows]
    assert pairs == [("2", "1"), ("2", "4")]
    for row in rows:
        scale = int(row["workers"]) * int(row["batch"]) * 60
        assert float(row["scaled"]) == pytest.approx(scale * float(row["error"]))
    assert "b = 2: error × K flat within 1.3 ×" in text
    assert "K = T/(bH²) = 1.88" in text
    assert_pictures(tmp_path, "linear")


def test_linear_says_where_flatness_ends():
    plan = linear.Plan(workers=(1, 2, 4, 8), batches=(1, 4))
    rows = [
        {"batch": batch, "workers": workers, "scaled": 0.5 * factor}
        for batch, factors in ((1, (1, 1.2, 1.4, 1.25)), (4, (1, 0.9, 1.29, 1.3)))
        for workers, factor in zip(plan.workers, factors, strict=True)
    ]
    seen = [verdict.seen for verdict in linear._verdicts(plan, rows)]
    assert seen == [
        "flat up to K = 2; 1.40 × at K = 4",
        "flat up to K = 8; no end seen",
    ]


# The command.


def test_all_runs_every_experiment_with_its_defaults(tmp_path, monkeypatch):
    called = {}

    def recorder(name):
        def run(*arguments):
            called[name] = arguments
            return f"{name}: seen\n"

        return run

    for module in (speedup_theory, w8a, rounds, linear, stragglers):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "run", recorder(name))
    result = CliRunner().invoke(reproduce, ["all", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert called == {
        "speedup_theory": (tmp_path, 25.0, 1e-6),
        "w8a": (tmp_path, w8a.quick(), "w8a", (1.0, 25.0)),
        "rounds": (tmp_path, rounds.quick()),
        "linear": (tmp_path, linear.quick()),
        "stragglers": (tmp_path, stragglers.quick(), "w8a"),
    }
    CliRunner().invoke(reproduce, ["rounds"])
    assert [str(called["rounds"][0]), called["rounds"][1]] == [
        "reproduce",
        rounds.full(),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["w8a", "--rho", "-1"], "--rho"),
        (["w8a", "--exponents", "3", "2"], "--exponents must be in order"),
        (["w8a", "--seeds", "0"], "--seeds"),
        (["w8a", "--data", "nowhere"], "no file 'nowhere'"),
        (["speedup-theory", "--epsilon", "0"], "--epsilon"),
        (["linear", "--out", __file__], "--out"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(reproduce, arguments)
    assert result.exit_code != 0
    (line,) = [line for line in result.output.splitlines() if "Error" in line]
    assert words in line


def test_the_command_refuses_other_settings(finished, digits_file, tmp_path):
    directory = shutil.copytree(finished[0], tmp_path / "copy")
    arguments = ["w8a", "--quick", "--data", digits_file, "--out", str(directory)]
    result = CliRunner().invoke(reproduce, arguments)
    assert result.exit_code == 1
    assert "other settings: blocks = " in result.output
    assert "seeds = 2 there, 3 here" in result.output
