"""Records of two runs, and a page that compares them.

    python examples/records.py

Takes less than 1 minute on two cores. Trains a small network on handwritten digits of
scikit-learn with H = 1 and H = 16, and writes `runs/h1`, `runs/h16` and `records.html`.
Expected: a test accuracy of 0.886 with 32.4 MB sent by each worker for H = 1, and of
0.886 with 2.0 MB for H = 16.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import localsgd_jax as lsgd
from localsgd_jax import reporting

WORKERS, BATCH, STEPS = 8, 8, 640


def network(params: dict, images: jax.Array) -> jax.Array:
    """Returns logits of a network with one hidden layer, `(n, 10)`."""
    return jax.nn.relu(images @ params["hidden"]) @ params["output"]


def loss_fn(params: dict, batch: tuple) -> jax.Array:
    """Returns the mean cross-entropy of a batch."""
    images, labels = batch
    logits = network(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def run(period: int, directory: pathlib.Path) -> None:
    """Trains with a period and records the rounds in a directory."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train, test = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    rng = np.random.default_rng(0)
    params = {
        "hidden": rng.normal(0, 0.1, (64, 64)).astype(np.float32),
        "output": rng.normal(0, 0.1, (64, 10)).astype(np.float32),
    }
    rule = lsgd.with_diagnostics(lsgd.average())
    cluster = lsgd.simulate(lsgd.local_sgd(loss_fn, optax.adam(2e-3), rule), WORKERS)

    def evaluate(params):
        return {"accuracy": jnp.mean(network(params, test[0]).argmax(-1) == test[1])}

    config = {"period": period, "workers": WORKERS, "batch": BATCH, "adam": 2e-3}
    lsgd.train(
        cluster,
        cluster.init(params),
        lsgd.shuffled_batches(train, WORKERS, BATCH),
        schedule=period,
        steps=STEPS,
        evaluate=evaluate,
        evaluate_every=max(1, 32 // period),
        on_round_end=reporting.to_run_directory(directory, config),
        progress=False,
    )


def main(arguments: list[str] | None = None) -> list[reporting.Run]:
    """Trains with two periods and writes the page; returns the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=".", help="directory of runs and page")
    out = pathlib.Path(parser.parse_args(arguments).out)
    runs = []
    for period in (1, 16):
        directory = out / "runs" / f"h{period}"
        run(period, directory)
        runs.append(reporting.read_run(directory)._replace(name=f"H = {period}"))
    reporting.write_report(runs, out / "records.html")
    for name, _, columns in runs:
        sent, accuracy = columns["bytes"][-1], columns["accuracy"][-1]
        print(f"{name}: accuracy {accuracy:.3f}, {sent / 1e6:.2f} MB sent per worker")
    return runs


if __name__ == "__main__":
    main()
