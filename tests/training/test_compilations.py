"""Number of compilations of a run with sharded workers."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import mesh
from harness.selection import in_full
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd

WIDTH = 16
FINISHED = re.compile(r"Finished XLA compilation of (?:jit\()?(\w+)")
STREAMING = lsgd.fragment(
    lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5), 2, rounds_per_fragment=2
)


@pytest.fixture
def compiled():
    """Names of the programs that JAX compiles during a test."""
    names = []

    class Handler(logging.Handler):
        def emit(self, record):
            if match := re.match(
                r"Finished XLA compilation of (?:jit\()?(\w+)", record.getMessage()
            ):
                names.append(match[1])

    logger, handler = logging.getLogger("jax"), Handler()
    level = logger.level
    logger.addHandler(handler)
    with jax.log_compiles(True):
        yield names
    logger.removeHandler(handler)
    logger.setLevel(level)


def loss_fn(params, batch):
    return jnp.mean(
        ((batch @ params["a"] + params["bias"][None, :]) @ params["b"]) ** 2
    )


def sharded_cluster(rule):
    """Returns a cluster of two workers on four devices each, and its parameters."""
    devices = mesh(worker=2, fsdp=4)

    def put(shape, spec):
        return jax.device_put(jnp.ones(shape) / 8, NamedSharding(devices, spec))

    params = {
        "a": put((WIDTH, WIDTH), P()),
        "b": put((WIDTH, WIDTH), P("fsdp")),
        "bias": put((WIDTH,), P()),
    }
    return lsgd.on_mesh(
        lsgd.local_sgd(loss_fn, optax.adam(0.01), rule=rule), devices
    ), params


@pytest.mark.parametrize(
    "rule, rounds, programs",
    [
        (lsgd.average(), 6, 1),
        in_full(lsgd.diloco(), 6, 1),
        (STREAMING, 8, 4),
        in_full(lsgd.overlap(lsgd.diloco()), 6, 1),
        in_full(lsgd.median(), 6, 1),
        in_full(lsgd.when(lsgd.every(4), lsgd.average()), 8, 2),
    ],
    ids=["average", "diloco", "streaming", "overlap", "median", "when"],
)
def test_each_program_is_compiled_once(compiled, rule, rounds, programs):
    cluster, params = sharded_cluster(rule)
    state = cluster.init(params)
    before = jax.tree.map(lambda x: x.sharding, state)
    rng = np.random.default_rng(0)
    data = [
        rng.normal(size=(2, 8, WIDTH)).astype(np.float32) for _ in range(2 * rounds)
    ]
    compiled.clear()
    state, _ = lsgd.train(
        cluster, state, data, schedule=2, max_steps_per_dispatch=4, progress=False
    )
    assert compiled.count("_rounds") == programs
    assert compiled.count("_sync") == 0
    after = jax.tree.map(lambda x: x.sharding, state)
    for old, new, x in zip(*map(jax.tree.leaves, (before, after, state)), strict=True):
        assert new.is_equivalent_to(old, x.ndim)


def test_a_second_call_compiles_nothing(compiled):
    """A loop over epochs; other weights need other programs."""
    cluster, params = sharded_cluster(lsgd.average())
    state = cluster.init(params)
    data = [np.ones((2, 8, WIDTH), np.float32)] * 8

    def epoch(state, weights=None):
        compiled.clear()
        options = {"schedule": 2, "weights": weights, "progress": False}
        state, history = lsgd.train(cluster, state, data, **options)
        return state, history, compiled.count("_rounds") + compiled.count("_sync")

    state, first, programs = epoch(state)
    assert programs == 1
    state, second, programs = epoch(state)
    assert programs == 0
    np.testing.assert_array_equal(second["step"], first["step"] + 8)
    np.testing.assert_array_equal(second["device_bytes"], first["device_bytes"])
    state, _, programs = epoch(state, np.array([1.0, 3.0]))
    assert programs == 1
