"""Placements: kinds of meshes, shardings of the state, and argument validation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import PLACEMENTS, algorithm, batches, cluster, mesh, network, stack
from harness.selection import in_full, keep
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import localsgd_jax as lsgd

AVERAGE = algorithm(lsgd.average())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_mesh_axis_types(kind):
    devices = jax.make_mesh((8,), ("worker",), axis_types=(kind,))
    placed = lsgd.on_mesh(AVERAGE, devices)
    state, metrics = placed.step(placed.init(network()), batches(1)[0])
    assert metrics["loss"].shape == (8,)
    assert placed.sync(state).workers.params["out"].shape == (8, 4)


def shapes_of(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)
        ),
        tree,
    )


@pytest.mark.parametrize(
    "placement", keep(PLACEMENTS, ["simulate", "lanes", "sharded"])
)
def test_abstract_arrays_match_concrete_arrays(placement):
    """An abstract state has the structure, shapes and shardings of a concrete one."""
    placed = cluster(placement, "momentum_rule")
    params, batch = network(), batches(1)[0]
    if placement == "sharded":
        devices = mesh(worker=4, model=2)
        auto = Mesh(devices.devices, devices.axis_names)
        split = NamedSharding(auto, PartitionSpec(None, "model"))
        params["in"]["w"] = jax.device_put(params["in"]["w"], split)
    for concrete, abstract in [
        (placed.init(params), placed.init(shapes_of(params))),
        (placed.shard_batch(batch), placed.shard_batch(shapes_of(batch))),
        (
            placed.shard_batch(stack([batch] * 2), time=True),
            placed.shard_batch(shapes_of(stack([batch] * 2)), time=True),
        ),
    ]:
        assert jax.tree.structure(concrete) == jax.tree.structure(abstract)
        for x, y in zip(*map(jax.tree.leaves, (concrete, abstract)), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            if not placement.startswith("simulate"):
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_state_shardings():
    state = cluster("lanes", "momentum_rule").init(network())
    leaf = state.workers.params["out"]
    assert leaf.shape == (8, 4) and leaf.sharding.shard_shape(leaf.shape) == (2, 4)
    local = state.local["params"]["out"]
    assert local.shape == (8, 4) and local.sharding.shard_shape(local.shape) == (2, 4)
    anchor = state.shared["params"][0]["out"]
    assert anchor.shape == (4,) and anchor.sharding.is_fully_replicated
    for counter in (state.step, state.round):
        assert counter.shape == () and counter.dtype == jnp.int32


def test_shared_state_must_be_replicated():
    """A rule that stores a per-worker value as shared state raises when traced."""
    rule = lsgd.SyncRule(
        lambda tree, specs: lsgd.RuleState(shared=tree),
        lambda tree, state, context: (tree, lsgd.RuleState(shared=tree)),
    )
    simulated = lsgd.simulate(algorithm(rule), 8)
    state, _ = simulated.step(simulated.init(network()), batches(1)[0])
    message = "RuleState.shared must not depend on per-worker values"
    with pytest.raises(ValueError, match=message):
        simulated.sync(state)


def test_shard_batch_shards_the_worker_axis():
    placed = cluster("lanes", "average")
    inputs, _ = placed.shard_batch(batches(1)[0])
    assert inputs.sharding.shard_shape(inputs.shape) == (2, 2, 3)
    stacked = placed.shard_batch(np.zeros((5, 8, 2)), time=True)
    assert stacked.sharding.shard_shape(stacked.shape) == (5, 2, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: lsgd.simulate(AVERAGE, 0),
            r"simulate\(workers\): .*at least 1, got 0",
        ),
        in_full(lambda: lsgd.simulate(AVERAGE, 2.0), r"simulate\(workers\): .*got 2.0"),
        (
            lambda: lsgd.simulate(AVERAGE, (2, 4)),
            r"distinct axis names with one size each .*\(2, 4\)",
        ),
        (
            lambda: lsgd.simulate(AVERAGE, 8, worker_map="scan"),
            r'"vmap" or "map", got \'scan\'',
        ),
        (
            lambda: lsgd.on_mesh(AVERAGE, mesh(worker=4), workers=6),
            r"multiple of the 4 positions on the mesh axes \('worker',\), got 6",
        ),
        in_full(
            lambda: lsgd.on_mesh(AVERAGE, mesh(worker=4), workers=0),
            "at least 1, got 0",
        ),
        in_full(
            lambda: lsgd.simulate(AVERAGE, (2, 4), axis=("a", "a")),
            r"distinct axis names .*, got \(2, 4\) for \('a', 'a'\)",
        ),
        (
            lambda: lsgd.simulate(lsgd.average(), 8),
            r"simulate\(algorithm\): algorithm must be an Algorithm",
        ),
        (
            lambda: lsgd.on_mesh(AVERAGE, 8),
            r"on_mesh\(mesh\): mesh must be a Mesh, got 8",
        ),
        (
            lambda: lsgd.on_mesh(AVERAGE, mesh(x=4)),
            r"axis\): it must be one of the axes \('x',\) of the mesh, got 'worker'",
        ),
    ],
)
def test_invalid_placement_arguments_raise(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("placement", keep(["simulate", "mesh"], ["mesh"]))
@pytest.mark.parametrize(
    "leaf, message",
    [
        (np.zeros((4, 2, 3)), r"the 8 workers, got shape \(4, 2, 3\) at \[0\]"),
        in_full(np.float32(1), r"the 8 workers, got shape \(\) at \[0\]"),
    ],
)
def test_batch_without_worker_axis_raises(placement, leaf, message):
    placed = cluster(placement, "average")
    with pytest.raises(ValueError, match=message):
        placed.step(placed.init(network()), (leaf, np.zeros((8, 2))))
    with pytest.raises(ValueError, match="workers, got shape"):
        placed.shard_batch((np.zeros((8, 2)), leaf))
    with pytest.raises(ValueError, match="second axis"):
        placed.shard_batch((np.zeros((8, 4)),), time=True)


@pytest.mark.parametrize("placement", keep(["simulate", "mesh"], ["simulate"]))
@pytest.mark.parametrize(
    "weight, message",
    [
        (np.ones(4), r"must have shape \(8,\), one for each worker, got \(4,\)"),
        in_full(1.0, r"got \(\)"),
        (np.array([1.0] * 5 + [-2, 1, 1]), "must be 0 or in .*got -2.0 for worker 5"),
        (np.array([1.0, np.nan] * 4), "must be 0 or in .*got nan for worker 1"),
        in_full([np.inf] * 8, "must be 0 or in .*got inf for worker 0"),
    ],
)
def test_invalid_weights_raise(placement, weight, message):
    placed = cluster(placement, "average")
    with pytest.raises(ValueError, match=message):
        placed.sync(placed.init(network()), weight)


@pytest.mark.parametrize("placement", keep(["simulate", "mesh"], ["mesh"]))
def test_rule_on_unknown_axis_raises(placement):
    placed = {
        "simulate": lambda made: lsgd.simulate(made, 8),
        "mesh": lambda made: lsgd.on_mesh(made, mesh(worker=8)),
    }[placement](algorithm(lsgd.average("pod")))
    with pytest.raises(ValueError, match=r"a worker axis of \('worker',\), got 'pod'"):
        placed.sync(placed.init(network()))


def test_clusters_on_different_meshes_coexist():
    """A cluster on four of eight devices can be used beside one on all of them."""
    some = lsgd.on_mesh(AVERAGE, Mesh(np.array(jax.devices()[4:]), ("worker",)))
    for placed in (some, cluster("mesh", "average")):
        workers = placed.num_workers
        batch = batches(1, workers=workers)[0]
        state, _ = placed.step(placed.init(network()), batch)
        assert placed.sync(state).workers.params["out"].shape[0] == workers


@pytest.mark.parametrize(
    "entry, width",
    [
        in_full("worker", 8),
        (("worker", "model"), 4),
        in_full("model", 4),
        in_full(None, 8),
    ],
)
def test_params_sharded_over_workers_are_replicated(entry, width):
    """A parameter sharded over the worker axis is gathered: every worker has a copy."""
    devices = mesh(worker=4, model=2)
    sharding = NamedSharding(devices, PartitionSpec(entry))
    params = jax.device_put(np.arange(8, dtype=np.float32), sharding)
    made = lsgd.local_sgd(lambda w, b: jnp.sum(w * b), optax.sgd(1.0), lsgd.average())
    state = lsgd.on_mesh(made, devices).init(params)
    np.testing.assert_array_equal(
        state.workers.params, np.broadcast_to(np.arange(8), (4, 8))
    )
    assert state.workers.params.sharding.shard_shape((4, 8)) == (1, width)


def conditional_step(worker, batch):
    """A step inside a conditional, with a PRNG key and a Python number as metric."""
    key, noise = jax.random.split(worker["key"])
    x = jax.lax.cond(
        batch.sum() > 0,
        lambda x: x - 0.1 * batch + 0.01 * jax.random.normal(noise, x.shape),
        lambda x: x,
        worker["x"],
    )
    return {"x": x, "key": key}, {"loss": (x**2).sum(), "one": 1.0}


def test_single_worker_per_device_runs_without_vmap():
    """Conditionals are kept instead of becoming selects; the values are equal."""
    rules = {"x": lsgd.average(), "key": lsgd.identity()}
    made = lsgd.from_train_step(conditional_step, rules)
    clusters = {
        "single": lsgd.on_mesh(made, mesh(worker=4)),
        "lanes": lsgd.on_mesh(made, mesh(worker=2), 4),
        "one device": lsgd.simulate(made, 4),
    }
    batch = np.array([[1.0, 2.0], [-1.0, -2.0], [3.0, 1.0], [-3.0, 1.0]], np.float32)
    results, has_cond = {}, {}
    for name, placed in clusters.items():
        state = placed.init({"x": jnp.ones(2), "key": jax.random.key(3)})
        program = str(jax.make_jaxpr(placed.step)(state, batch))
        has_cond[name] = "cond[" in program
        state, metrics = placed.step(state, batch)
        assert metrics["one"].shape == (4,)
        results[name] = np.asarray(placed.sync(state).workers["x"]), metrics["loss"]
    assert has_cond == {"single": True, "lanes": False, "one device": False}
    for other in ("lanes", "one device"):
        for a, b in zip(results["single"], results[other], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
