import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """A working directory; JAX is initialised, so no command sets its devices."""
    jax.devices()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(workdir):
    """Name of a file with 80 examples of three features and the labels 3 and 7."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 3))
    labels = np.where(features @ [1, -2, 0.5] + rng.normal(size=80) > 0, 7, 3)
    lines = [
        f"{label} " + " ".join(f"{i + 1}:{x:.6f}" for i, x in enumerate(row))
        for label, row in zip(labels, features, strict=True)
    ]
    (workdir / "toy.txt").write_text("\n".join(lines))
    return "toy.txt"
