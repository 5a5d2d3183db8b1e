"""The examples, on little data and for a few steps."""

import importlib
import pathlib
import re
import sys

import numpy as np
import pytest

import localsgd_jax as lsgd

FOLDER = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    yield
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def load(name):
    return importlib.import_module(name)


def test_mnist_learns_two_patterns(monkeypatch, capsys):
    mnist = load("mnist")
    rng = np.random.default_rng(0)
    digits = rng.integers(2, size=640).astype(np.int32)
    pixels = rng.normal(size=(640, 28, 28, 1)).astype(np.float32)
    pixels[:, 5:9] += 3 * digits[:, None, None, None]
    images = mnist.Images(pixels, digits)
    monkeypatch.setattr(mnist, "load", lambda: (images, images))
    options = ["--periods", "2", "--epochs", "4", "--figure", "curve.png"]
    rows = mnist.main(["--workers", "4", *options])
    assert pathlib.Path("curve.png").read_bytes().startswith(b"\x89PNG")
    assert rows[0]["accuracy"] > 0.95 and rows[0]["round"] == 10
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == ["4", "2", "10"]


def test_a_convolution_is_a_product_of_patches():
    import jax
    from flax import linen as nn

    mnist = load("mnist")
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 3)).astype(np.float32)
    layer = mnist.Convolution(5)
    params = layer.init(jax.random.key(0), x)["params"]
    kernel = params["Dense_0"]["kernel"].reshape(3, 3, 3, 5)
    plain = nn.Conv(5, (3, 3), strides=2, padding=1, use_bias=False)
    expected = plain.apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(
        layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5
    )


def test_text_learns_and_writes(capsys):
    text = load("text")
    pathlib.Path("data.txt").write_text("abcdefgh" * 500)
    arguments = ["--data", "data.txt", "--context", "8", "--periods", "4", "--steps"]
    curves = text.main(
        [*arguments, "40", "--workers", "2", "--post-local", "4", "--depth", "1"]
    )
    (name,) = curves
    assert name == "post_local(4, 4)" and pathlib.Path("text.png").stat().st_size
    tested = curves[name]["test"]
    tested = tested[~np.isnan(tested)]
    assert tested[-1] < 2 < tested[0]
    assert len(capsys.readouterr().out.splitlines()[-1]) > 100


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_text_is_seen_from_the_left_only(optimizer):
    import jax.numpy as jnp
    from flax import nnx

    text = load("text")
    model = text.Gpt(width=16, heads=2, depth=1, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12)[None]
    changed = tokens.at[0, 8].set(99)
    forward = nnx.jit(lambda model, tokens: model(tokens))
    left, right = forward(model, tokens), forward(model, changed)
    np.testing.assert_allclose(left[0, :8], right[0, :8], rtol=1e-5, atol=1e-6)
    assert not np.allclose(left[0, 8:], right[0, 8:])
    inner = text.make_optimizer(optimizer, 10)
    trained = nnx.Optimizer(model, inner, wrt=nnx.Param)
    assert np.isfinite(nnx.jit(text.train_step)(model, trained, tokens)["loss"])


def test_positions_turn_by_their_distance():
    """A product of rotated vectors depends on how far apart they stand alone."""
    import jax.numpy as jnp

    text = load("text")
    row = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)
    turned = text.rotate(jnp.broadcast_to(row, (1, 6, 1, 8)))[0, :, 0]
    near = [float(turned[i] @ turned[i + 2]) for i in range(4)]
    np.testing.assert_allclose(near, near[0], rtol=1e-4)
    assert abs(near[0] - float(row @ row)) > 1e-2


def test_sharded_workers_learn_what_whole_ones_learn(capsys):
    sharded = load("sharded")
    pathlib.Path("data.txt").write_text("The quick brown fox. " * 400)
    half, whole = sharded.main(["--data", "data.txt", "--steps", "4", "--period", "2"])
    assert 0.5 < half.share < 0.6 and whole.share == 1
    np.testing.assert_allclose(half.losses, whole.losses, rtol=1e-4)
    assert "4 workers of 2: 0.57" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_every_example_says_how_long_and_how_well(path):
    text = " ".join(path.read_text().split('"""')[1].split())
    assert f"python examples/{path.name}" in text
    assert re.search(r"\d minutes? on two cores", text) and "Expected:" in text


def test_the_default_text_is_on_this_machine():
    train, test = load("text").load(None, 64)
    assert train.shape[1] == 65 and len(train) > 5000 and len(test) > 500
    assert lsgd.deal(train, workers=4, batch=8)
