"""Training steps with convolutions on CPUs: layouts, lanes and numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import mesh
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.execution.convolutions import transpose_convolutions

WORKERS, PERIOD = 4, 2
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(PERIOD, WORKERS, 2, 6, 5, 3)).astype(np.float32)
PARAMS = {
    "kernel": RNG.normal(size=(3, 2, 3, 4)).astype(np.float32),
    "grouped": RNG.normal(size=(2, 2, 2, 4)).astype(np.float32),
}
CANONICAL = "lhs_spec=(0, 3, 1, 2), rhs_spec=(3, 2, 0, 1), out_spec=(0, 3, 1, 2)"


def convolve(images, kernel, **options):
    layouts = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (2, 1), "padding": "SAME"} | options
    return jax.lax.conv_general_dilated(
        images, kernel, dimension_numbers=layouts, **options
    )


def loss_fn(params, images):
    hidden = jnp.tanh(convolve(images, params["kernel"]))
    options = {"feature_group_count": 2, "rhs_dilation": (1, 2)}
    return jnp.mean(convolve(hidden, params["grouped"], **options) ** 2)


def dense_loss(params, images):
    return jnp.mean((images.sum((1, 2)) @ params["kernel"].sum((0, 1))) ** 2)


def rematerialised_loss(params, images):
    return jax.checkpoint(loss_fn)(params, images)


def accumulated_loss(params, images):
    def add(total, image):
        return total + loss_fn(params, image[None]), None

    return jax.lax.scan(add, 0.0, images)[0] / len(images)


def make_cluster(loss, placement="lanes", **options):
    algorithm = lsgd.local_sgd(loss, optax.sgd(0.1))
    if placement == "simulate":
        return lsgd.simulate(algorithm, WORKERS, **options)
    devices = {"lanes": 2, "one worker": WORKERS}[placement]
    return lsgd.on_mesh(algorithm, mesh(worker=devices), WORKERS, **options)


def traced(cluster):
    """Returns the text of the traced step."""
    state = jax.eval_shape(cluster.init, PARAMS)
    return str(jax.make_jaxpr(cluster.step)(state, IMAGES[0]))


@pytest.mark.parametrize("placement", ["lanes", in_full("simulate")])
def test_the_placement_of_lanes_is_chosen_by_the_traced_step(placement):
    assert "scan[" in traced(make_cluster(loss_fn, placement))
    assert "scan[" in traced(make_cluster(dense_loss, placement, worker_map="map"))
    assert "scan[" not in traced(make_cluster(dense_loss, placement))
    assert "scan[" not in traced(make_cluster(loss_fn, placement, worker_map="vmap"))


def test_lanes_on_accelerators_are_batched(monkeypatch):
    from localsgd_jax.execution import placement

    monkeypatch.setattr(placement, "is_cpu", lambda mesh: False)
    text = traced(make_cluster(loss_fn))
    assert "scan[" not in text and "transpose" not in text.split("conv_general")[0]


LOSSES = [loss_fn, in_full(rematerialised_loss), in_full(accumulated_loss)]


@pytest.mark.parametrize("loss", LOSSES)
def test_all_convolutions_have_the_layout_of_the_library(loss):
    text = traced(make_cluster(loss, "one worker"))
    specs = [line for line in text.splitlines() if "lhs_spec" in line]
    assert len(specs) > 3
    assert all(CANONICAL in " ".join(line.split()) for line in specs)


@pytest.mark.parametrize("placement", ["lanes", in_full("simulate")])
@pytest.mark.parametrize("loss", LOSSES)
def test_rounds_equal_plain_steps(placement, loss):
    cluster = make_cluster(loss, placement)
    state, metrics = jax.jit(lsgd.fused(cluster))(cluster.init(PARAMS), IMAGES)
    models = [PARAMS] * WORKERS
    for images in IMAGES:
        grads = [
            jax.grad(loss)(model, x) for model, x in zip(models, images, strict=True)
        ]
        models = [
            jax.tree.map(lambda w, g: w - 0.1 * g, model, grad)
            for model, grad in zip(models, grads, strict=True)
        ]
    mean = jax.tree.map(lambda *x: np.mean(x, 0), *models)
    result = lsgd.consensus(state)
    for name in PARAMS:
        np.testing.assert_allclose(result[name], mean[name], rtol=1e-5, atol=1e-6)
    assert metrics["loss"].shape == (PERIOD, WORKERS)


@pytest.mark.parametrize(
    "layouts",
    [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "HWNC")],
)
def test_transposed_convolutions_are_the_same_function(layouts):
    sizes = {"N": 2, "H": 5, "W": 4, "C": 3, "I": 3, "O": 6}
    image = RNG.normal(size=[sizes[x] for x in layouts[0]]).astype(np.float32)
    kernel = RNG.normal(size=[{**sizes, "H": 2, "W": 3}[x] for x in layouts[1]])
    function = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 2),
        padding=((1, 0), (2, 1)),
        lhs_dilation=(2, 1),
        dimension_numbers=layouts,
    )
    arguments = image, kernel.astype(np.float32)
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr = transpose_convolutions(closed.jaxpr)
    (result,) = jax.extend.core.jaxpr_as_fun(closed.replace(jaxpr=jaxpr))(*arguments)
    np.testing.assert_allclose(result, function(*arguments), rtol=1e-5, atol=1e-5)
