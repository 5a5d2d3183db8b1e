"""Every rule with workers that are sharded over several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import RULES, WORKERS, assert_close, mesh
from harness.selection import keep
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd


def outer(rule):
    return lsgd.outer(optax.sgd(0.7, momentum=0.9, nesterov=True), rule)


MEAN = lsgd.average()
# Beyond the rules of the table: compositions, cut leaves, and an outer optimizer that
# needs the norm of the whole tree.
MORE_RULES = {
    "quantize_4": outer(lsgd.quantize(MEAN, 4, block=8)),
    "quantize_stochastic": outer(
        lsgd.quantize(MEAN, 4, block=8, rounding="stochastic")
    ),
    "cast_float8": outer(lsgd.cast(MEAN, jnp.float8_e4m3fn)),
    "flatten_diloco": lsgd.flatten(lsgd.diloco()),
    "overlap_flatten": lsgd.overlap(lsgd.flatten(lsgd.diloco())),
    "shard_state_flatten": lsgd.shard_state(lsgd.flatten(lsgd.diloco()), WORKERS),
    "with_diagnostics": lsgd.with_diagnostics(lsgd.diloco()),
    "fragment_axis_0": lsgd.fragment(lsgd.diloco(), 2, split_axis=0),
    "fragment_axis_1": lsgd.fragment(lsgd.diloco(), 2, split_axis=1),
    "fragment_quantize": lsgd.fragment(
        outer(lsgd.quantize(MEAN, 4, block=8)), 2, split_axis=1
    ),
    "sparseloco": lsgd.sparseloco(),
    "snoo": lsgd.snoo(),
    "desloc": lsgd.desloc(),
    "quantize_eager": lsgd.eager_outer(
        optax.sgd(0.7), lsgd.quantize(MEAN, 4, block=8, encoding="e3m0")
    ),
    "global_norm": lsgd.outer(
        optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.7))
    ),
}
ALL_RULES = {name: case.rule for name, case in RULES.items()} | MORE_RULES
# A piece is compressed, selected or cut by itself, which gives other numbers than the
# complete tree.
PER_PIECE = ("quantize", "top_k", "chunked_top_k", "sparseloco", "fragment_")
# By default: one rule for each way to work on pieces.
DEFAULT = ("quantize_4", "shard_state", "with_diagnostics")
SPECS = {
    "columns": P(None, "fsdp"),
    "replicated": P(),
    "rows": P("fsdp"),
    "twin": P("fsdp", None),
    "vector": P(),
}
TWO_AXES = SPECS | {"columns": P(None, ("fsdp", "model")), "twin": P("fsdp", "model")}
LAYOUTS = {
    "one axis": ({"worker": 2, "fsdp": 4}, SPECS, 2),
    "lanes": ({"worker": 2, "fsdp": 4}, SPECS, WORKERS),
    "two axes": ({"worker": 2, "fsdp": 2, "model": 2}, TWO_AXES, 2),
}
all_rules = pytest.mark.parametrize("name", keep(ALL_RULES, DEFAULT))
all_layouts = pytest.mark.parametrize("layout", keep(LAYOUTS, ["one axis"]))


def parameters():
    """Leaves that the axes divide and leaves that they do not divide."""
    rng = np.random.default_rng(0)
    shapes = {"columns": (3, 16), "replicated": (3, 5), "rows": (16, 12)}
    shapes |= {"twin": (16, 12), "vector": (7,)}
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def loss(params, target):
    leaves = jax.tree.leaves(params)
    return sum(jnp.mean((x - target * (i + 1)) ** 2) for i, x in enumerate(leaves))


def algorithm(rule):
    return lsgd.local_sgd(loss, optax.adam(0.05), rule=rule)


def rule_for(name, workers):
    """The rule of a name; `shard_state` depends on the number of workers."""
    if workers == WORKERS or "shard_state" not in name:
        return ALL_RULES[name]
    inner = lsgd.flatten(lsgd.diloco()) if "flatten" in name else lsgd.diloco()
    return lsgd.shard_state(inner, workers)


def shard_parameters(devices, specs):
    automatic = Mesh(
        devices.devices,
        devices.axis_names,
        axis_types=(AxisType.Auto,) * devices.devices.ndim,
    )
    return {
        name: jax.device_put(x, NamedSharding(automatic, specs[name]))
        for name, x in parameters().items()
    }


@functools.cache
def sharded_cluster(name, layout):
    axes, specs, workers = LAYOUTS[layout]
    devices = mesh(**axes)
    cluster = lsgd.on_mesh(algorithm(rule_for(name, workers)), devices, workers)
    return cluster, shard_parameters(devices, specs)


def train(cluster, params, rounds=3):
    """The state after each of some rounds of two steps, and the compiled round."""
    step = jax.jit(lsgd.fused(cluster))
    states = [cluster.init(params)]
    targets = np.random.default_rng(1).normal(size=(rounds, 2, WORKERS))
    for round_targets in targets[..., : cluster.num_workers].astype(np.float32):
        states.append(step(states[-1], round_targets)[0])
    return states, step


def shardings(state):
    return jax.tree.map(lambda x: x.sharding, state)


@all_layouts
@all_rules
def test_sharded_workers_match_simulation(name, layout):
    """Rules without blocks give the numbers of `simulate`.

    The shardings stay those of `init`, and one program serves all rounds.
    """
    cluster, params = sharded_cluster(name, layout)
    states, step = train(cluster, params)
    for state in states[1:]:
        same = jax.tree.map(
            lambda a, b, x: a.is_equivalent_to(b, x.ndim),
            *(shardings(states[0]), shardings(state), state),
        )
        assert all(jax.tree.leaves(same))
    assert step._cache_size() == 1
    if not name.startswith(PER_PIECE):
        workers = cluster.num_workers
        simulated = lsgd.simulate(algorithm(rule_for(name, workers)), workers)
        expected, _ = train(simulated, parameters())
        assert_close(states[-1].workers.params, expected[-1].workers.params, 1e-5)


@all_layouts
@all_rules
def test_only_scalars_are_sent_inside_a_worker(name, layout):
    cluster, params = sharded_cluster(name, layout)
    ops = lsgd.collective_ops(cluster.sync, cluster.init(params))
    scalars = 4 * len(params) * WORKERS**2
    for op in ops:
        assert op.axes is not None
        if set(op.axes) & {"fsdp", "model"}:
            assert op.name == "all-reduce" and op.bytes <= scalars, op


@all_layouts
@pytest.mark.parametrize("name", keep(ALL_RULES, ["quantize_4", "shard_state"]))
def test_state_is_sharded_like_the_parameters(name, layout):
    """Each device holds its share of the state of the rule."""
    cluster, params = sharded_cluster(name, layout)
    state = cluster.init(params)
    devices = len(jax.devices())
    least = sum(
        x.size if x.ndim > 1 and min(x.shape[-1], x.shape[-2]) > 5 else x.size * devices
        for x in jax.tree.leaves((state.workers, state.local))
    )
    held = sum(
        sum(shard.data.size for shard in x.addressable_shards)
        for x in jax.tree.leaves((state.workers, state.local))
    )
    assert held <= least


@pytest.mark.parametrize(
    "name", keep(["quantize_4", "top_k", "chunked_top_k"], ["quantize_4"])
)
@pytest.mark.parametrize(
    "leaves, index",
    [(("columns", "rows", "twin"), 1), (("replicated", "vector"), None)],
)
def test_each_piece_is_compressed_by_itself(name, leaves, index):
    """A group of leaves on one device equals a simulation of these pieces alone."""
    cluster, params = sharded_cluster(name, "one axis")
    trained = train(cluster, params)[0][-1].workers.params
    pieces = {leaf: piece(parameters()[leaf], leaf, index) for leaf in leaves}
    order = {leaf: i + 1 for i, leaf in enumerate(sorted(params))}
    expected = simulate_pieces(name, pieces, order)
    got = {leaf: piece(trained[leaf], leaf, index) for leaf in leaves}
    assert_close(got, expected, 1e-4)


def piece(x, leaf, index):
    """Piece of a leaf, with any leading axes, on the device of an index."""
    if index is None:
        return np.asarray(x)
    axis = {"columns": -1, "rows": -2, "twin": -2}[leaf]
    return np.split(np.asarray(x), 4, axis=axis)[index]


def simulate_pieces(name, pieces, order):
    """Parameters after the rounds of `train`, for pieces of some leaves."""

    def piece_loss(params, target):
        return sum(jnp.mean((x - target * order[k]) ** 2) for k, x in params.items())

    of_pieces = lsgd.local_sgd(piece_loss, optax.adam(0.05), rule_for(name, 2))
    return train(lsgd.simulate(of_pieces, 2), pieces)[0][-1].workers.params


def test_specs_of_equal_shapes_follow_the_path():
    """Moments of two matrices of one shape are sharded as their own parameters."""
    devices = mesh(worker=2, fsdp=4)
    params = {"a": np.ones((8, 8), np.float32), "b": np.ones((8, 8), np.float32)}
    specs = {"a": P("fsdp"), "b": P(None, "fsdp")}
    sharded = {
        name: jax.device_put(x, NamedSharding(devices, specs[name]))
        for name, x in params.items()
    }
    cluster = lsgd.on_mesh(algorithm(lsgd.fragment(lsgd.diloco(), 2)), devices)
    abstract = cluster.init(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            sharded,
        )
    )
    for state in (abstract, cluster.init(sharded)):
        adam = state.workers.opt_state[0]
        for moments in (adam.mu, adam.nu):
            assert moments["a"].sharding.spec == P(("worker",), "fsdp")
            assert moments["b"].sharding.spec == P(("worker",), None, "fsdp")
        anchors = [fragment.anchor[0] for fragment in state.shared["params"]]
        assert {x.sharding.spec for x in anchors} == set(specs.values())


@pytest.mark.parametrize("jitted", [False, True])
def test_init_makes_the_parameters_in_its_program(jitted):
    """A function of no arguments gives the state that its result gives."""
    devices = mesh(worker=2, fsdp=4)
    sharding = NamedSharding(devices, P("fsdp"))

    def make():
        return {"w": jax.random.normal(jax.random.key(0), (8, 4))}

    make = jax.jit(make, out_shardings=sharding) if jitted else make
    for cluster in (
        lsgd.on_mesh(algorithm(lsgd.diloco()), devices),
        lsgd.simulate(algorithm(lsgd.diloco()), 2),
    ):
        state, expected = cluster.init(make), cluster.init(make())
        assert_close(state, expected, 1e-6)
        assert shardings(state) == shardings(expected)


def test_init_holds_no_other_copy_of_the_state(monkeypatch):
    """The program needs its parameters, its result and no memory besides."""
    devices, programs = mesh(worker=2, fsdp=4), []

    def spy(function, *, jit=jax.jit, **options):
        jitted = jit(function, **options)

        def call(*args):
            if "out_shardings" in options:
                programs.append(jitted.lower(*args).compile().memory_analysis())
            return jitted(*args)

        return call

    sharding = NamedSharding(devices, P("fsdp"))
    params = {"w": jax.device_put(np.ones((512, 512), np.float32), sharding)}
    cluster = lsgd.on_mesh(algorithm(lsgd.diloco()), devices)
    monkeypatch.setattr(jax, "jit", spy)
    state = cluster.init(params)
    (memory,) = programs
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert memory.argument_size_in_bytes * 5 <= held * 1.01
    assert memory.output_size_in_bytes <= held * 1.01
    assert memory.temp_size_in_bytes <= held * 0.01
