"""Tests of the programs in examples/, on small data and for a few steps."""

import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.paths import ROOT

import localsgd_jax as lsgd

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch, tmp_path):
    """Makes the examples importable and runs them in an empty directory."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def labelled_images(monkeypatch):
    """Replaces MNIST by noise of two classes, one with a bright stripe."""
    mnist = importlib.import_module("mnist")
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=640).astype(np.int32)
    images = rng.normal(size=(640, 28, 28, 1)).astype(np.float32)
    images[:, 5:9] += 3 * labels[:, None, None, None]
    data = mnist.LabelledImages(images, labels)
    monkeypatch.setattr(mnist, "load", lambda: (data, data))


@pytest.mark.full
def test_mnist_learns_two_patterns(labelled_images, capsys):
    mnist = importlib.import_module("mnist")
    options = ["--periods", "2", "--epochs", "4", "--figure", "curve.png"]
    rows = mnist.main(["--workers", "4", *options])
    assert pathlib.Path("curve.png").read_bytes().startswith(b"\x89PNG")
    assert rows[0]["accuracy"] > 0.95 and rows[0]["round"] == 10
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == ["4", "2", "10"]


@pytest.mark.full
def test_mnist_trains_on_a_dirichlet_partition(labelled_images):
    mnist = importlib.import_module("mnist")
    options = ["--workers", "2", "--periods", "2", "--epochs", "1", "--alphas", "1"]
    (row,) = mnist.main(options)
    assert row["alpha"] == 1 and np.isfinite(row["loss"])


def test_conv_equals_a_convolution():
    from flax import linen as nn

    mnist = importlib.import_module("mnist")
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 3)).astype(np.float32)
    layer = mnist.Conv(5)
    params = layer.init(jax.random.key(0), x)["params"]
    kernel = params["Dense_0"]["kernel"].reshape(3, 3, 3, 5)
    reference = nn.Conv(5, (3, 3), strides=2, padding=1, use_bias=False)
    expected = reference.apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(
        layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.full
def test_text_learns_and_samples(capsys):
    text = importlib.import_module("text")
    pathlib.Path("data.txt").write_text("abcdefgh" * 500)
    arguments = ["--data", "data.txt", "--context", "8", "--periods", "4", "--steps"]
    histories = text.main(
        [*arguments, "40", "--workers", "2", "--post-local", "4", "--depth", "1"]
    )
    (name,) = histories
    assert name == "post_local(4, 4)" and pathlib.Path("text.png").stat().st_size
    test_loss = histories[name]["test"]
    test_loss = test_loss[~np.isnan(test_loss)]
    assert test_loss[-1] < 2 < test_loss[0]
    assert len(capsys.readouterr().out.splitlines()[-1]) > 100


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_attention_is_causal(optimizer):
    from flax import nnx

    text = importlib.import_module("text")
    model = text.Gpt(width=16, heads=2, depth=1, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12)[None]
    changed_tokens = tokens.at[0, 8].set(99)
    forward = nnx.jit(lambda model, tokens: model(tokens))
    logits, changed_logits = forward(model, tokens), forward(model, changed_tokens)
    np.testing.assert_allclose(
        logits[0, :8], changed_logits[0, :8], rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(logits[0, 8:], changed_logits[0, 8:])
    inner = nnx.Optimizer(model, text.make_optimizer(optimizer, 10), wrt=nnx.Param)
    assert np.isfinite(nnx.jit(text.train_step)(model, inner, tokens)["loss"])


def test_rope_depends_on_relative_position():
    """Dot products of rotated vectors depend only on the distance of positions."""
    text = importlib.import_module("text")
    vector = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)
    rotated = text.apply_rope(jnp.broadcast_to(vector, (1, 6, 1, 8)))[0, :, 0]
    products = [float(rotated[i] @ rotated[i + 2]) for i in range(4)]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)
    assert abs(products[0] - float(vector @ vector)) > 1e-2


@pytest.mark.full
def test_sharded_workers_match_unsharded_workers(capsys):
    sharded_workers = importlib.import_module("sharded_workers")
    pathlib.Path("data.txt").write_text("The quick brown fox. " * 400)
    sharded, unsharded = sharded_workers.main(
        ["--data", "data.txt", "--steps", "4", "--period", "2"]
    )
    assert 0.5 < sharded.device_fraction < 0.6 and unsharded.device_fraction == 1
    np.testing.assert_allclose(sharded.losses, unsharded.losses, rtol=1e-4)
    assert "4 workers of 2: 0.57" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_example_docstrings_state_runtime_and_result(path):
    text = " ".join(path.read_text().split('"""')[1].split())
    assert f"python examples/{path.name}" in text
    assert re.search(r"\d minutes? on two cores", text) and "Expected:" in text


def test_default_text_is_available_offline():
    train, test = importlib.import_module("text").load(None, 64)
    assert train.shape[1] == 65 and len(train) > 5000 and len(test) > 500
    assert lsgd.shuffled_batches(train, workers=4, batch=8)


def test_gpa_matches_hand_computation():
    """f = y²/2, base SGD 0.5, μ_y 0.7 and μ_x 0.9 for H = 1, from 1."""
    gpa = importlib.import_module("gpa")
    optimizer = gpa.gpa(optax.sgd(0.5), period=1)
    y, x, z = 1.0, 1.0, 1.0
    params = jnp.float32(1)
    state = optimizer.init(params)
    for _ in range(4):
        z = z - 0.5 * y
        x = 0.9 * x + 0.1 * z
        y = 0.7 * x + 0.3 * z
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose([params, state.x, state.z], [y, x, z], rtol=1e-5)
    published = [0.9, 0.974, 0.9869, 0.9934, 0.9967, 0.9984, 0.9992]
    periods = [1, 4, 8, 16, 32, 64, 128]
    np.testing.assert_allclose([0.9 ** (1 / h) for h in periods], published, atol=5e-5)


@pytest.mark.full
def test_records_writes_runs_and_a_page(monkeypatch, capsys):
    records = importlib.import_module("records")
    monkeypatch.setattr(records, "STEPS", 32)
    runs = records.main([])
    assert [run.name for run in runs] == ["H = 1", "H = 16"]
    assert [run.columns["round"][-1] for run in runs] == [32, 2]
    assert pathlib.Path("records.html").exists()
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.full
def test_gpa_prints_a_loss_for_each_method(capsys):
    gpa = importlib.import_module("gpa")
    losses = gpa.main(["--steps", "64", "--seeds", "1"])
    assert list(losses) == ["AdamW", "SNOO", "GPA"]
    assert all(np.isfinite(loss) for loss in losses.values())
    assert len(capsys.readouterr().out.splitlines()) == 3
