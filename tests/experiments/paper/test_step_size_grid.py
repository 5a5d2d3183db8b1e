"""Simulation of a grid of step sizes, against runs of the library."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.experiment_files import DIGITS

import localsgd_jax as lsgd
from localsgd_jax.experiments import logistic
from localsgd_jax.experiments.paper import step_size_grid, step_size_search
from localsgd_jax.experiments.paper.step_size_search import Cell
from localsgd_jax.experiments.paper.step_sizes import learning_rate, step_sizes

COUNT, DIMENSION = DIGITS.features.shape
CONFIG = step_size_grid.GridConfig(workers=3, batch=2, seeds=2)
EXPONENTS = range(-4, -2)


def library_iterates(examples, period, steps, index, seed):
    """Returns x̄₀, …, x̄_T of one step size and seed, from the library's gated step."""
    sizes = step_sizes(EXPONENTS)

    def rate(step):
        return learning_rate(sizes, step, COUNT)[index]

    algorithm = lsgd.local_sgd(
        logistic.loss_fn(DIGITS), optax.sgd(rate), rule=lsgd.average()
    )
    cluster = lsgd.simulate(algorithm, CONFIG.workers)
    step = jax.jit(lsgd.gated(cluster, lsgd.every(period)))
    state, means = cluster.init(jnp.zeros(DIMENSION)), []
    for t in range(steps):
        means.append(lsgd.consensus(state))
        batch = step_size_grid.sample_batch(examples, jnp.int32(t), CONFIG)
        of_seed = slice(seed * CONFIG.workers, (seed + 1) * CONFIG.workers)
        state, _ = step(state, jax.tree.map(lambda x, s=of_seed: x[s], batch))
    return np.array([*means, lsgd.consensus(state)])


@pytest.mark.full
def test_grid_simulation_matches_library(examples):
    period, steps = 4, 11
    simulation = step_size_grid.simulation(DIGITS, examples, CONFIG)
    sizes = step_sizes(EXPONENTS)
    state = simulation.start(sizes)
    for until in (3, steps):
        state = simulation.advance(state, sizes, period, until)
    outputs = np.asarray(simulation.outputs(state))
    assert outputs.shape == (4, CONFIG.seeds, 2 * len(EXPONENTS), DIMENSION)
    for seed, index in ((0, 0), (1, 1), (1, 3)):
        means = library_iterates(examples, period, steps, index, seed)
        weights = [(np.arange(steps) + 1.0) ** power for power in range(3)]
        averages = [np.average(means[:-1], axis=0, weights=w) for w in weights]
        np.testing.assert_allclose(
            outputs[:, seed, index], [means[-1], *averages], 1e-5, 1e-5
        )
    assert np.abs(outputs[:, 0] - outputs[:, 1]).max() > 1e-3


@pytest.mark.full
def test_period_one_matches_one_worker_with_all_examples(examples):
    sizes, results = step_sizes(EXPONENTS), []
    one_worker = step_size_grid.GridConfig(
        1, CONFIG.workers * CONFIG.batch, CONFIG.seeds
    )
    for config in (CONFIG, one_worker):
        simulation = step_size_grid.simulation(DIGITS, examples, config)
        state = simulation.advance(simulation.start(sizes), sizes, 1, 9)
        results.append(simulation.outputs(state))
    np.testing.assert_allclose(*results, 1e-4, 1e-5)


def test_canonical_cells():
    cell = Cell(0.1, CONFIG.batch, CONFIG.workers, 1)
    merged = Cell(0.1, CONFIG.batch * CONFIG.workers, 1, 1)
    assert step_size_search.canonical(cell) == merged
    longer = cell._replace(period=2)
    assert step_size_search.canonical(longer) == longer
    single = Cell(0.1, 4, 1, 64)
    assert step_size_search.canonical(single) == single._replace(period=1)


def test_batches_are_sampled_with_replacement_from_all_examples(examples):
    config = step_size_grid.GridConfig(workers=8, batch=1000, seeds=1)
    features, labels = step_size_grid.sample_batch(examples, jnp.int32(5), config)
    assert features.shape == (8, 1000, DIMENSION) and labels.shape == (8, 1000)
    rows = np.asarray(examples.features)
    sampled = {row.tobytes() for row in np.asarray(features).reshape(-1, DIMENSION)}
    distinct = {row.tobytes() for row in rows}
    assert sampled <= distinct
    # 8000 samples of 1797: all but a fraction of exp(−8000/1797) = 1.2 % occur.
    assert 0.97 * len(distinct) < len(sampled) < len(distinct)


@pytest.mark.full
def test_samples_differ_between_steps_workers_and_seeds(examples):
    config = step_size_grid.GridConfig(workers=2, batch=50, seeds=2)
    batches = [
        np.asarray(batch)
        for step in (0, 1)
        for batch in step_size_grid.sample_batch(examples, jnp.int32(step), config)[0]
    ]
    assert len({batch.tobytes() for batch in batches}) == len(batches) == 8


def test_only_exact_small_integers_are_stored_as_int8():
    integers = DIGITS._replace(features=DIGITS.features.rint())
    stored = step_size_grid.to_device(integers).features
    assert stored.dtype == jnp.int8
    np.testing.assert_array_equal(stored, integers.features.toarray())
    large = integers._replace(features=integers.features * 1000)
    for dataset in (DIGITS, large):
        stored = step_size_grid.to_device(dataset).features
        assert stored.dtype == jnp.float32
        np.testing.assert_allclose(stored, dataset.features.toarray(), rtol=1e-6)
