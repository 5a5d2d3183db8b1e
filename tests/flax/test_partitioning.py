"""Partitioning metadata of linen and NNX: shardings from `init` to a restore."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from harness.cases import assert_close
from harness.selection import keep
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer
from localsgd_jax.flax import from_linen, from_nnx, update_nnx

WIDTH, K = 8, 2
MESH = lsgd.worker_mesh(K, inner_axes={"fsdp": 4})
RULES = (("embed", "fsdp"), ("mlp", None))
LECUN = nn.initializers.lecun_normal()
# Older names of `out_sharding`.
pytestmark = pytest.mark.filterwarnings("ignore:'sharding.*' is deprecated")


class LinenModel(nn.Module):
    """A dense layer with metadata of the kernel and none of the bias."""

    names: tuple = ("fsdp", None)
    is_logical: bool = False

    @nn.compact
    def __call__(self, x):
        box = nn.with_logical_partitioning if self.is_logical else nn.with_partitioning
        return nn.Dense(WIDTH, kernel_init=box(LECUN, self.names))(x)


class LinenScan(nn.Module):
    """Three layers stacked by `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return module(x), None

        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return layers(LinenModel(), x, None)[0]


def linen_step(state, batch):
    def loss_fn(params):
        return jnp.mean(state.apply_fn({"params": params}, batch) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def linen_variables(model, kind):
    """Returns the variables of a model: with or without boxes, on the mesh or not."""

    def init():
        return model.init(jax.random.key(0), jnp.ones((1, WIDTH)))

    if kind == "boxed":
        return init()
    shardings = nn.get_sharding(jax.eval_shape(init), MESH)
    placed = jax.jit(init, out_shardings=shardings)()
    return nn.unbox(placed) if kind == "unboxed" else placed


def linen_case(model, kind="boxed"):
    variables = linen_variables(model, kind)
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.adam(0.01)
    )
    return from_linen(linen_step, state, lsgd.average())


def logical_case():
    with nn.logical_axis_rules(RULES):
        return linen_case(LinenModel(("embed", "mlp"), is_logical=True))


class NnxModel(nnx.Module):
    """A layer and a bare parameter, each with metadata or without."""

    def __init__(self, rngs, names=None, **metadata):
        init = nnx.with_partitioning(LECUN, names) if names else LECUN
        self.layer = nnx.Linear(WIDTH, WIDTH, kernel_init=init, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((WIDTH, WIDTH)), **metadata)

    def __call__(self, x):
        return self.layer(x) @ self.scale[...]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(LECUN, (None, "fsdp"))
        self.layer = nnx.Linear(WIDTH, WIDTH, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.layer(x))


class NnxScan(nnx.Module):
    """Three layers stacked by `nnx.vmap`, with `nnx.scan` and `nnx.remat`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(
            in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None}
        )
        def stack(rngs):
            return NnxBlock(rngs)

        self.blocks = stack(rngs)

    def __call__(self, x):
        @nnx.scan(
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        @nnx.remat
        def forward(x, block):
            return block(x)

        return forward(x, self.blocks)


def nnx_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(batch) ** 2))(model)
    optimizer.update(model, grads)
    return {"loss": loss}


def nnx_case(build, mesh=MESH):
    """Without a mesh the variables have metadata, and their arrays no sharding."""
    context = nnx.use_eager_sharding(False) if mesh is None else jax.set_mesh(mesh)
    with context:
        model = build(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    return from_nnx(nnx_step, model, optimizer, rule=lsgd.average())


# Style: algorithm and initial train state, and the sharded leaf of the parameters.
CASES = {
    "linen_boxed": (lambda: linen_case(LinenModel()), ("fsdp",)),
    "linen_boxed_placed": (lambda: linen_case(LinenModel(), "placed"), ("fsdp",)),
    "linen_unboxed": (lambda: linen_case(LinenModel(), "unboxed"), ("fsdp",)),
    "linen_logical": (logical_case, ("fsdp",)),
    "linen_scan": (lambda: linen_case(LinenScan()), (None, "fsdp")),
    "nnx_with_partitioning": (
        lambda: nnx_case(lambda rngs: NnxModel(rngs, ("fsdp", None))),
        ("fsdp",),
    ),
    "nnx_with_partitioning_explicit": (
        lambda: nnx_case(
            lambda rngs: NnxModel(rngs, ("fsdp", None)),
            jax.make_mesh((K, 4), ("worker", "fsdp")),
        ),
        ("fsdp",),
    ),
    "nnx_param": (
        lambda: nnx_case(lambda rngs: NnxModel(rngs, out_sharding=(None, "fsdp"))),
        (None, "fsdp"),
    ),
    "nnx_sharding": (
        lambda: nnx_case(lambda rngs: NnxModel(rngs, sharding=("fsdp", None))),
        ("fsdp",),
    ),
    "nnx_sharding_names": (
        lambda: nnx_case(lambda rngs: NnxModel(rngs, sharding_names=("fsdp", None))),
        ("fsdp",),
    ),
    "nnx_not_placed": (
        lambda: nnx_case(lambda rngs: NnxModel(rngs, ("fsdp", None)), None),
        ("fsdp",),
    ),
    "nnx_logical_not_placed": (
        lambda: nnx_case(
            lambda rngs: NnxModel(
                rngs, out_sharding=("embed", None), sharding_rules=RULES
            ),
            None,
        ),
        ("fsdp",),
    ),
    "nnx_scan": (lambda: nnx_case(NnxScan), (None, None, "fsdp")),
}


def batches(count=4):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(K, 4, WIDTH)).astype(np.float32) for _ in range(count)]


def specs(tree):
    """Returns the partition of each leaf, without trailing None."""

    def spec(x):
        entries = list(x.sharding.spec)
        while entries and not entries[-1]:
            entries.pop()
        return tuple(entries)

    return {
        jax.tree_util.keystr(path): spec(x)
        for path, x in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("style", keep(CASES, ["linen_boxed"]))
def test_shardings_are_kept(style, tmp_path):
    """Of parameters and moments, through all functions of a cluster."""
    build, sharded = CASES[style]
    algorithm, start = build()
    cluster = lsgd.on_mesh(algorithm, MESH)
    state = cluster.init(start)
    expected, boxes = specs(state.workers), jax.tree.structure(state.workers)
    assert ("worker", *sharded) in specs(state.workers.params).values()
    # The parameter, and both moments of Adam.
    assert sum(len(spec) > 1 for spec in expected.values()) == 3
    after_step, _ = cluster.step(state, cluster.shard_batch(batches()[0]))
    after_sync = cluster.sync(after_step)
    trained, history = lsgd.train(
        cluster, cluster.init(start), batches(), schedule=2, progress=False
    )
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        checkpointer.save(trained)
        restored, _ = checkpointer.restore(cluster.init(start))
    for name, each in {
        "step": after_step,
        "sync": after_sync,
        "train": trained,
        "restore": restored,
    }.items():
        assert specs(each.workers) == expected, name
        assert jax.tree.structure(each.workers) == boxes
    mean = specs(lsgd.consensus(trained, None).params)
    assert sorted(mean.values(), key=str) == sorted(
        (spec[1:] for spec in specs(state.workers.params).values()), key=str
    )
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("style", keep(CASES, ["nnx_not_placed"]))
def test_results_do_not_depend_on_metadata(style):
    """The same run on one device per worker without shardings."""
    algorithm, start = CASES[style][0]()
    cluster = lsgd.on_mesh(algorithm, MESH)
    simulated = lsgd.simulate(algorithm, K)
    states = [
        lsgd.train(each, each.init(initial), batches(), schedule=2, progress=False)[
            0
        ].workers.params
        for each, initial in (
            (cluster, start),
            (simulated, jax.tree.map(on_one_device, start)),
        )
    ]
    assert_close(*states, rtol=1e-4, atol=1e-4)


def on_one_device(x):
    is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return x if is_key else jnp.asarray(np.asarray(x))


def test_boxes_without_an_adapter():
    """`local_sgd` takes boxed parameters, too; abstract ones give the same layout."""
    model = LinenModel()
    variables = linen_variables(model, "boxed")
    made = lsgd.local_sgd(
        lambda params, batch: jnp.mean(model.apply({"params": params}, batch) ** 2),
        optax.adam(0.01),
        rule=lsgd.average(),
    )
    cluster = lsgd.on_mesh(made, MESH)
    state = cluster.init(variables["params"])
    kernel = state.workers.params["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert specs(kernel) == {".value": ("worker", "fsdp")}
    shapes = jax.eval_shape(lambda: linen_variables(model, "boxed"))["params"]
    abstract = cluster.init(shapes).workers.params["Dense_0"]["kernel"]
    assert specs(abstract) == specs(kernel)
    state, _ = cluster.step(state, batches()[0])


def test_placed_leaves_do_not_follow_metadata():
    """A leaf that is split over axes inside a worker keeps its own sharding."""
    boxed = linen_variables(LinenModel(), "boxed")["params"]
    other = NamedSharding(MESH, P(None, "fsdp"))
    kernel = boxed["Dense_0"]["kernel"]
    boxed["Dense_0"]["kernel"] = kernel.replace(
        value=jax.device_put(kernel.value, other)
    )
    made = lsgd.local_sgd(lambda params, batch: 0.0, optax.sgd(0.1), lsgd.average())
    state = lsgd.on_mesh(made, MESH).init(boxed)
    kernel = state.workers.params["Dense_0"]["kernel"]
    assert specs(kernel) == {".value": ("worker", None, "fsdp")}


def test_update_nnx_keeps_shardings():
    with jax.set_mesh(MESH):
        model = NnxModel(nnx.Rngs(0), ("fsdp", None))
        optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    algorithm, start = from_nnx(nnx_step, model, optimizer, rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, MESH)
    state, _ = cluster.step(cluster.init(start), batches()[0])
    update_nnx(lsgd.consensus(cluster.sync(state), None), model, optimizer)
    assert specs(model.layer.kernel[...]) == {"": ("fsdp",)}
    # The model can be used to begin another run.
    _, again = from_nnx(nnx_step, model, optimizer, rule=lsgd.average())
    assert cluster.init(again).workers.params["layer"]["kernel"].shape[0] == K


def test_metadata_are_ignored_without_inner_axes():
    algorithm, start = CASES["nnx_not_placed"][0]()
    cluster = lsgd.on_mesh(algorithm, lsgd.worker_mesh(8))
    assert set(specs(cluster.init(start).workers).values()) == {("worker",)}


@pytest.mark.parametrize(
    "names, is_logical, message",
    [
        (("embed", "mlp"), True, r"\('fsdp',\), got 'embed' at .*kernel.*rules around"),
        (("model", None), False, "axes inside a worker, .*, got 'model' at .*kernel"),
        (("worker", None), False, "axes inside a worker, .*, got 'worker' at .*kernel"),
    ],
)
def test_metadata_of_unknown_axes_raise(names, is_logical, message):
    algorithm, start = linen_case(LinenModel(names, is_logical))
    with pytest.raises(ValueError, match=message) as caught:
        lsgd.on_mesh(algorithm, MESH).init(start)
    assert str(caught.value).startswith("init(params): partitioning metadata must name")
    assert "\n" not in str(caught.value)


def test_metadata_that_do_not_divide_raise():
    made = lsgd.local_sgd(lambda params, batch: 0.0, optax.sgd(0.1), lsgd.average())
    boxed = {"w": nn.Partitioned(jnp.ones((6, 4)), names=("fsdp", None))}
    message = r"must divide the leaf over the axes \{'fsdp': 4\}, got shape \(6, 4\) at"
    with pytest.raises(ValueError, match=message):
        lsgd.on_mesh(made, MESH).init(boxed)


def test_logical_rules_may_surround_init():
    """Rules are read when the adapter is called, and otherwise when `init` is."""
    algorithm, start = linen_case(LinenModel(("embed", "mlp"), is_logical=True))
    with nn.logical_axis_rules(RULES):
        state = lsgd.on_mesh(algorithm, MESH).init(start)
    assert ("worker", "fsdp") in specs(state.workers.params).values()
