"""The models that are measured: a loss, parameters and a batch for each worker."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Model(NamedTuple):
    name: str
    loss: Callable
    params: Any
    batch: Any  # of one worker

    @property
    def size(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def logistic(features: int = 300, batch: int = 16) -> Model:
    rng = np.random.default_rng(0)

    def loss(params, batch):
        x, y = batch
        return jnp.mean(jax.nn.softplus(-y * (x @ params)))

    x = rng.normal(size=(batch, features)).astype(np.float32)
    y = np.sign(rng.normal(size=batch)).astype(np.float32)
    return Model("logistic", loss, np.zeros(features, np.float32), (x, y))


def mlp(width: int = 672, layers: int = 2, batch: int = 16) -> Model:
    """784 inputs, 10 classes: with the width 672, a million parameters."""
    sizes = [784, *[width] * layers, 10]
    rng = np.random.default_rng(0)
    params = [
        (rng.normal(size=(a, b)).astype(np.float32) / a**0.5, np.zeros(b, np.float32))
        for a, b in zip(sizes[:-1], sizes[1:], strict=True)
    ]

    def loss(params, batch):
        x, y = batch
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b[None, :])
        w, b = params[-1]
        logits = jax.nn.log_softmax(x @ w + b[None, :])
        return -jnp.mean(jnp.sum(logits * y, axis=-1))

    x = rng.normal(size=(batch, 784)).astype(np.float32)
    y = np.eye(10, dtype=np.float32)[rng.integers(0, 10, batch)]
    return Model("mlp", loss, params, (x, y))


def gpt(
    width: int = 320,
    layers: int = 8,
    heads: int = 5,
    vocabulary: int = 512,
    length: int = 64,
    batch: int = 1,
    unroll: bool = False,
) -> Model:
    """A decoder with tied embeddings: as it stands, ten million parameters.

    It works in the type of its parameters, and takes means and softmax in float32.
    """
    rng = np.random.default_rng(0)

    def matrix(a, b):
        return rng.normal(size=(a, b)).astype(np.float32) / a**0.5

    block = {
        "qkv": np.stack([matrix(width, 3 * width) for _ in range(layers)]),
        "out": np.stack([matrix(width, width) for _ in range(layers)]),
        "up": np.stack([matrix(width, 4 * width) for _ in range(layers)]),
        "down": np.stack([matrix(4 * width, width) for _ in range(layers)]),
    }
    params = {
        "embedding": 0.02 * matrix(vocabulary, width),
        "position": 0.02 * matrix(length, width),
        "blocks": block,
    }

    def normal(x):
        wide = x.astype(jnp.float32)
        size = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(size + 1e-6)).astype(x.dtype)

    def attend(x, block):
        q, k, v = jnp.split(normal(x) @ block["qkv"], 3, axis=-1)
        split = (*x.shape[:-1], heads, width // heads)
        mixed = jax.nn.dot_product_attention(
            q.reshape(split), k.reshape(split), v.reshape(split), is_causal=True
        )
        x = x + mixed.reshape(x.shape) @ block["out"]
        return x + jax.nn.gelu(normal(x) @ block["up"]) @ block["down"], None

    def loss(params, tokens):
        x = params["embedding"][tokens[:, :-1]] + params["position"][None]
        x, _ = jax.lax.scan(attend, x, params["blocks"], unroll=unroll)
        logits = (normal(x) @ params["embedding"].T).astype(jnp.float32)
        logits = jax.nn.log_softmax(logits)
        found = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
        return -jnp.mean(found)

    tokens = rng.integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
    return Model("gpt", loss, params, tokens)


def wide(parameters: int, batch: int = 1) -> Model:
    """As many parameters as wanted, and as little else as possible."""

    def loss(params, batch):
        return 0.5 * jnp.sum((params - batch[0]) ** 2)

    ones = np.ones((batch, 1), np.float32)
    return Model("wide", loss, jax.ShapeDtypeStruct((parameters,), jnp.float32), ones)
