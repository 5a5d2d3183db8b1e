"""Where workers live: meshes of all kinds, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PLACEMENTS, algorithm, batches, cluster, mesh, network, stack
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import localsgd_jax as lsgd

MADE = algorithm(lsgd.average())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_meshes_with_axes_of_either_type(kind):
    devices = jax.make_mesh((8,), ("worker",), axis_types=(kind,))
    verbs = lsgd.on_mesh(MADE, devices)
    state, metrics = verbs.step(verbs.init(network()), batches(1)[0])
    assert metrics["loss"].shape == (8,)
    assert verbs.sync(state).workers.params["out"].shape == (8, 4)


def shapes_of(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)
        ),
        tree,
    )


@pytest.mark.parametrize("place", PLACEMENTS)
def test_shapes_give_shapes(place):
    """An abstract state is the real one without its numbers."""
    verbs = cluster(place, "anchored")
    params, batch = network(), batches(1)[0]
    if place == "sharded":
        devices = mesh(worker=4, model=2)
        auto = Mesh(devices.devices, devices.axis_names)
        split = NamedSharding(auto, PartitionSpec(None, "model"))
        params["in"]["w"] = jax.device_put(params["in"]["w"], split)
    for real, shape in [
        (verbs.init(params), verbs.init(shapes_of(params))),
        (verbs.put(batch), verbs.put(shapes_of(batch))),
        (
            verbs.put(stack([batch] * 2), time=True),
            verbs.put(shapes_of(stack([batch] * 2)), time=True),
        ),
    ]:
        assert jax.tree.structure(real) == jax.tree.structure(shape)
        for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(shape), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            if not place.startswith("simulate"):
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_one_copy_per_worker_and_counters_outside():
    state = cluster("lanes", "anchored").init(network())
    leaf = state.workers.params["out"]
    assert leaf.shape == (8, 4) and leaf.sharding.shard_shape(leaf.shape) == (2, 4)
    own = state.own["params"]["out"]
    assert own.shape == (8, 4) and own.sharding.shard_shape(own.shape) == (2, 4)
    anchor = state.agreed["params"][0]["out"]
    assert anchor.shape == (4,) and anchor.sharding.is_fully_replicated
    for counter in (state.step, state.round):
        assert counter.shape == () and counter.dtype == jnp.int32


def test_what_is_agreed_cannot_be_a_workers_own():
    """A rule that keeps a worker's own value as agreed is found out when traced."""
    rule = lsgd.SyncRule(
        lambda tree: lsgd.RuleState(agreed=tree),
        lambda tree, state, context: (tree, lsgd.RuleState(agreed=tree)),
    )
    verbs = lsgd.simulate(algorithm(rule), 8)
    state, _ = verbs.step(verbs.init(network()), batches(1)[0])
    with pytest.raises(ValueError, match="agreed must be computed from reduced values"):
        verbs.sync(state)


def test_put_places_batches_where_the_workers_are():
    verbs = cluster("lanes", "average")
    inputs, _ = verbs.put(batches(1)[0])
    assert inputs.sharding.shard_shape(inputs.shape) == (2, 2, 3)
    stacked = verbs.put(np.zeros((5, 8, 2)), time=True)
    assert stacked.sharding.shard_shape(stacked.shape) == (5, 2, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lsgd.simulate(MADE, 0), r"simulate\(workers\): .*at least 1, got 0"),
        (lambda: lsgd.simulate(MADE, 2.0), r"simulate\(workers\): .*got 2.0"),
        (
            lambda: lsgd.simulate(MADE, (2, 4)),
            r"one size for each of different axes.*\(2, 4\)",
        ),
        (
            lambda: lsgd.simulate(MADE, 8, lanes="scan"),
            r'"vmap" or "map", got \'scan\'',
        ),
        (
            lambda: lsgd.on_mesh(MADE, mesh(worker=4), workers=6),
            r"multiple of the 4 places on the mesh axes \('worker',\), got 6",
        ),
        (lambda: lsgd.on_mesh(MADE, mesh(worker=4), workers=0), "at least 1, got 0"),
        (
            lambda: lsgd.simulate(MADE, (2, 4), axis=("a", "a")),
            r"different axes, got \(2, 4\) for \('a', 'a'\)",
        ),
        (
            lambda: lsgd.simulate(lsgd.average(), 8),
            r"local_sgd or from_train_step make",
        ),
        (lambda: lsgd.on_mesh(MADE, 8), r"a jax.sharding.Mesh is needed, got 8"),
        (
            lambda: lsgd.on_mesh(MADE, mesh(x=4)),
            r"axis='worker'\): the mesh has the axes \('x',\), and no 'worker'",
        ),
    ],
)
def test_bad_places(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("place", ["simulate", "mesh"])
@pytest.mark.parametrize(
    "leaf, message",
    [
        (np.zeros((4, 2, 3)), r"the 8 workers, got shape \(4, 2, 3\) at \[0\]"),
        (np.float32(1), r"the 8 workers, got shape \(\) at \[0\]"),
    ],
)
def test_batches_without_k_shares_are_refused(place, leaf, message):
    verbs = cluster(place, "average")
    with pytest.raises(ValueError, match=message):
        verbs.step(verbs.init(network()), (leaf, np.zeros((8, 2))))
    with pytest.raises(ValueError, match="workers, got shape"):
        verbs.put((np.zeros((8, 2)), leaf))
    with pytest.raises(ValueError, match="second axis"):
        verbs.put((np.zeros((8, 4)),), time=True)


@pytest.mark.parametrize("place", ["simulate", "mesh"])
@pytest.mark.parametrize(
    "weight, message",
    [
        (np.ones(4), r"must have shape \(8,\), one for each worker, got \(4,\)"),
        (1.0, r"got \(\)"),
        (np.array([1.0] * 5 + [-2, 1, 1]), "not negative, got -2.0 for worker 5"),
        (np.array([1.0, np.nan] * 4), "must be finite.*got nan for worker 1"),
        ([np.inf] * 8, "must be finite.*got inf for worker 0"),
    ],
)
def test_impossible_weights_are_refused(place, weight, message):
    verbs = cluster(place, "average")
    with pytest.raises(ValueError, match=message):
        verbs.sync(verbs.init(network()), weight)


@pytest.mark.parametrize("place", ["simulate", "mesh"])
def test_a_rule_on_an_axis_that_is_not_there_is_refused(place):
    verbs = {
        "simulate": lambda made: lsgd.simulate(made, 8),
        "mesh": lambda made: lsgd.on_mesh(made, mesh(worker=8)),
    }[place](algorithm(lsgd.average("pod")))
    with pytest.raises(ValueError, match=r"axes \('worker',\), which has no 'pod'"):
        verbs.sync(verbs.init(network()))


def test_no_mesh_leaks_into_the_callers_program():
    """A cluster on four of eight devices lives beside one on all of them."""
    some = lsgd.on_mesh(MADE, Mesh(np.array(jax.devices()[4:]), ("worker",)))
    every = cluster("mesh", "average")
    for verbs in (some, every):
        state, _ = verbs.step(
            verbs.init(network()), batches(1, workers=verbs.workers)[0]
        )
        assert verbs.sync(state).workers.params["out"].shape[0] == verbs.workers


@pytest.mark.parametrize(
    "entry, width", [("worker", 8), (("worker", "model"), 4), ("model", 4), (None, 8)]
)
def test_parameters_may_come_sharded_over_the_workers(entry, width):
    """What lay over the worker axis becomes whole: every worker has its own copy."""
    devices = mesh(worker=4, model=2)
    sharding = NamedSharding(devices, PartitionSpec(entry))
    params = jax.device_put(np.arange(8, dtype=np.float32), sharding)
    made = lsgd.local_sgd(lambda w, b: jnp.sum(w * b), optax.sgd(1.0), lsgd.average())
    state = lsgd.on_mesh(made, devices).init(params)
    np.testing.assert_array_equal(
        state.workers.params, np.broadcast_to(np.arange(8), (4, 8))
    )
    assert state.workers.params.sharding.shard_shape((4, 8)) == (1, width)


def _careful(worker, batch):
    """A step that is skipped where the batch says so, with a key and a plain metric."""
    key, noise = jax.random.split(worker["key"])
    moved = jax.lax.cond(
        batch.sum() > 0,
        lambda x: x - 0.1 * batch + 0.01 * jax.random.normal(noise, x.shape),
        lambda x: x,
        worker["x"],
    )
    return {"x": moved, "key": key}, {"loss": (moved**2).sum(), "one": 1.0}


def test_a_worker_alone_on_its_device_runs_as_it_is_written():
    """Its conditions stay conditions, and the numbers are those of lanes."""
    rules = {"x": lsgd.average(), "key": lsgd.keep()}
    made = lsgd.from_train_step(_careful, rules)
    places = {
        "alone": lsgd.on_mesh(made, mesh(worker=4)),
        "lanes": lsgd.on_mesh(made, mesh(worker=2), 4),
        "one device": lsgd.simulate(made, 4),
    }
    batch = np.array([[1.0, 2.0], [-1.0, -2.0], [3.0, 1.0], [-3.0, 1.0]], np.float32)
    found, kept = {}, {}
    for name, place in places.items():
        state = place.init({"x": jnp.ones(2), "key": jax.random.key(3)})
        program = str(jax.make_jaxpr(place.step)(state, batch))
        kept[name] = "cond[" in program
        state, metrics = place.step(state, batch)
        assert metrics["one"].shape == (4,)
        found[name] = np.asarray(place.sync(state).workers["x"]), metrics["loss"]
    assert kept == {"alone": True, "lanes": False, "one device": False}
    for other in ("lanes", "one device"):
        for a, b in zip(found["alone"], found[other], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
