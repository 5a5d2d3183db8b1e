"""Tasks and methods of the convergence measurements."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

import localsgd_jax as lsgd
from benchmarks.datasets import HelpTopics, Shakespeare, load_mnist
from benchmarks.models import decoder_loss

HELD_OUT = 512
CORRECTED_RATE = 0.5


class Task(NamedTuple):
    """A model and its data.

    Attributes:
      init: `init(key) -> params`.
      loss: `loss(params, batch)`.
      sample: `sample(rng, count)`, a batch of training examples.
      held_out: a batch.
      batch: examples per step of all workers together.
      steps: T.
      rate: largest learning rate of AdamW.
    """

    init: Callable
    loss: Callable
    sample: Callable
    held_out: object
    batch: int
    steps: int
    rate: float


def adamw(task: Task) -> optax.GradientTransformation:
    """Returns AdamW with warm-up, cosine decay and clipping."""
    schedule = _warm_up(task, task.rate)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1)
    )


def muon_inner(task: Task, rate: float = 0.02) -> optax.GradientTransformation:
    """Returns Muon for the matrices of the layers and AdamW for the embedding."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            _warm_up(task, rate),
            adam_learning_rate=_warm_up(task, task.rate),
            weight_decay=0.1,
            adam_weight_decay=0.1,
            muon_weight_dimension_numbers=_matrices,
        ),
    )


def sgd(task: Task) -> optax.GradientTransformation:
    """Returns SGD with a constant step size, which control variates assume."""
    del task
    return optax.sgd(CORRECTED_RATE)


def _matrices(params: dict) -> dict:
    """Returns the axes of the matrices that Muon updates; None for the embedding."""
    stacked = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    blocks = jax.tree.map(lambda x: stacked, params["blocks"])
    return {"embedding": None, "blocks": blocks}


def _warm_up(task: Task, rate: float) -> optax.Schedule:
    warm_up = min(100, task.steps // 8)
    return optax.warmup_cosine_decay_schedule(0, rate, warm_up, task.steps, 0.1 * rate)


class Method(NamedTuple):
    """Factories of a rule, a schedule and an inner optimizer.

    Attributes:
      rule: None for data-parallel training.
      schedule: None for training without synchronisation.
      workers: K.
      inner: from a task to its inner optimizer.
    """

    rule: Callable | None
    schedule: Callable | None = None
    workers: int = 4
    inner: Callable = adamw


class Study(NamedTuple):
    """A task and the methods by name."""

    task: Callable
    methods: dict[str, Method]


def _every(h: int) -> Callable:
    return lambda: lsgd.every(h)


def _four_bits() -> lsgd.SyncRule:
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    return lsgd.outer(nesterov, lsgd.quantize(lsgd.average(), 4))


def _snoo() -> lsgd.SyncRule:
    return lsgd.outer(optax.sgd(0.7, momentum=0.5, nesterov=True))


VARIANTS = {
    "data-parallel": Method(None),
    "DiLoCo, H = 8": Method(lsgd.diloco, _every(8)),
    "DiLoCo, H = 32": Method(lsgd.diloco, _every(32)),
    "DiLoCo, H = 128": Method(lsgd.diloco, _every(128)),
    "4 bits, H = 32": Method(_four_bits, _every(32)),
    "4 fragments, H = 32": Method(
        lambda: lsgd.fragment(lsgd.diloco(), 4, split_axis=0),
        lambda: lsgd.evenly_spaced(32, 4),
    ),
    "delayed by 4 steps, H = 32": Method(
        lambda: lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5),
        lambda: lsgd.with_lead(lsgd.every(32), 4),
    ),
    "overlap, H = 32": Method(lambda: lsgd.overlap(lsgd.diloco()), _every(32)),
    "average, H = 32": Method(lsgd.average, _every(32)),
    "overlap of average, H = 32": Method(
        lambda: lsgd.overlap(lsgd.average()), _every(32)
    ),
}
INNERS = {"AdamW": adamw, "Muon": muon_inner}
MUON = {
    f"{name}, K = {k}, H = {h}": Method(lsgd.diloco, _every(h), k, inner)
    for k in (1, 4, 8)
    for h in (8, 32)
    for name, inner in INNERS.items()
}
SNOO = {
    f"{name} alone": Method(None, inner=inner) for name, inner in INNERS.items()
} | {
    f"SNOO of {name}, H = {h}": Method(_snoo, _every(h), 1, inner)
    for name, inner in INNERS.items()
    for h in (8, 32)
}
SPARSE, SPARSE_30 = (
    {
        f"DiLoCo, H = {h}": Method(lsgd.diloco, _every(h)),
        f"SparseLoCo, H = {h}": Method(lsgd.sparseloco, _every(h)),
        f"SparseLoCo without decay, H = {h}": Method(
            partial(lsgd.sparseloco, decay=1.0), _every(h)
        ),
    }
    for h in (8, 30)
)
CORRECTED = {
    f"{name}, H = {h}": Method(rule, _every(h), 4, sgd)
    for h in (8, 32)
    for name, rule in {
        "average": lsgd.average,
        "control variates": partial(lsgd.control_variates, CORRECTED_RATE, h),
    }.items()
}


def transformer(
    data: Callable,
    width: int = 64,
    layers: int = 2,
    context: int = 64,
    steps: int = 1024,
    rate: float = 4e-3,
    in_parts: bool = False,
) -> Task:
    """Builds a byte-level transformer with rotary positions and tied embeddings.

    Args:
      data: `data(context)`, byte windows.
      width: number of features.
      layers: number of blocks.
      context: length of a window in bytes.
      steps: T.
      rate: largest learning rate of AdamW.
      in_parts: whether example i of a batch of n is from part i of n of the text, so
        that each worker has its own part.
    """
    windows = data(context)

    def init(key: jax.Array) -> dict:
        keys = iter(jax.random.split(key, 1 + 4 * layers))

        def matrix(rows: int, columns: int) -> jax.Array:
            return jax.random.normal(next(keys), (rows, columns)) / rows**0.5

        blocks = [
            {
                "qkv": matrix(width, 3 * width),
                "out": matrix(width, width),
                "up": matrix(width, 4 * width),
                "down": matrix(4 * width, width),
            }
            for _ in range(layers)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        return {"embedding": 0.1 * matrix(256, width) * 16, "blocks": stacked}

    spacing = windows.num_held_out // HELD_OUT - 1
    return Task(
        init,
        decoder_loss(heads=4),
        windows.sample_in_parts if in_parts else windows.sample,
        windows.held_out(HELD_OUT, spacing),
        batch=16,
        steps=steps,
        rate=rate,
    )


def mnist(width: int = 128) -> Task:
    """Builds a perceptron with one hidden layer."""
    train, test = load_mnist()

    def init(key: jax.Array) -> dict:
        key_in, key_out = jax.random.split(key)
        return {
            "in": jax.random.normal(key_in, (784, width)) / 28,
            "bias": jnp.zeros(width),
            "out": jax.random.normal(key_out, (width, 10)) / width**0.5,
        }

    def loss(params: dict, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, targets = batch
        bias = jnp.broadcast_to(params["bias"], (images.shape[0], width))
        logits = jax.nn.relu(images @ params["in"] + bias) @ params["out"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    def sample(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        indices = rng.integers(0, len(train.labels), count)
        return train.images[indices], train.labels[indices]

    return Task(init, loss, sample, tuple(test), batch=64, steps=1024, rate=2e-3)


small_text = partial(transformer, Shakespeare, width=48, steps=512, rate=8e-3)
long_text = partial(small_text, width=32, context=32, steps=1920)
STUDIES = {
    "text": Study(partial(transformer, HelpTopics), VARIANTS),
    "mnist": Study(mnist, VARIANTS),
    "muon": Study(small_text, MUON),
    "snoo": Study(small_text, SNOO),
    "sparse": Study(small_text, SPARSE),
    "sparse_30": Study(long_text, SPARSE_30),
    "corrected": Study(partial(small_text, in_parts=True), CORRECTED),
}
