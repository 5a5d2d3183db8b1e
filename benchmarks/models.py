"""Models of the measurements: loss, parameters and a batch of one worker."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Model(NamedTuple):
    """A model with initial parameters and a batch of one worker."""

    name: str
    loss: Callable
    params: Any
    batch: Any

    @property
    def size(self) -> int:
        """Returns the number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def logistic(features: int = 300, batch: int = 16) -> Model:
    """Builds logistic regression."""
    rng = np.random.default_rng(0)

    def loss(params, batch):
        x, y = batch
        return jnp.mean(jax.nn.softplus(-y * (x @ params)))

    x = rng.normal(size=(batch, features)).astype(np.float32)
    y = np.sign(rng.normal(size=batch)).astype(np.float32)
    return Model("logistic", loss, np.zeros(features, np.float32), (x, y))


def mlp(width: int = 672, layers: int = 2, batch: int = 16) -> Model:
    """Builds a perceptron with 784 inputs and 10 classes, by default 10⁶ parameters."""
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
    """Builds a decoder with learned positions, by default 10⁷ parameters."""
    rng = np.random.default_rng(0)

    def matrix(a, b):
        return rng.normal(size=(a, b)).astype(np.float32) / a**0.5

    shapes = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    blocks = {
        name: np.stack([matrix(*shape) for _ in range(layers)])
        for name, shape in shapes.items()
    }
    params = {
        "embedding": 0.02 * matrix(vocabulary, width),
        "position": 0.02 * matrix(length, width),
        "blocks": blocks,
    }
    tokens = rng.integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
    return Model("gpt", decoder_loss(heads, unroll), params, tokens)


def decoder_loss(heads: int, unroll: bool = False) -> Callable:
    """Returns the loss of a pre-norm decoder with tied embeddings.

    It computes in the dtype of its parameters, norms and softmax in float32.

    Args:
      heads: number of attention heads.
      unroll: whether to unroll the loop over the layers.

    Returns:
      `loss(params, tokens)` with tokens `(B, T + 1)`. The parameters are "embedding",
      "blocks" with leaves stacked over the layers, and optionally "position"; without
      it, attention has rotary positions.
    """

    def loss(params, tokens):
        x, rotary = params["embedding"][tokens[:, :-1]], "position" not in params
        if not rotary:
            x = x + params["position"][None]

        def layer(x, block):
            return decoder_block(x, block, heads, rotary), None

        x, _ = jax.lax.scan(layer, x, params["blocks"], unroll=unroll)
        logits = (rms_norm(x) @ params["embedding"].T).astype(jnp.float32)
        logits = jax.nn.log_softmax(logits)
        targets = tokens[:, 1:, None]
        return -jnp.mean(jnp.take_along_axis(logits, targets, axis=-1))

    return loss


def decoder_block(x: jax.Array, block: dict, heads: int, rotary: bool) -> jax.Array:
    """Applies pre-norm attention and MLP with residuals to `(B, T, width)`."""
    q, k, v = (
        part.reshape(*x.shape[:-1], heads, -1)
        for part in jnp.split(rms_norm(x) @ block["qkv"], 3, axis=-1)
    )
    if rotary:
        q, k = apply_rope(q), apply_rope(k)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(x.shape) @ block["out"]
    return x + jax.nn.gelu(rms_norm(x) @ block["up"]) @ block["down"]


def rms_norm(x: jax.Array) -> jax.Array:
    """Divides by the root mean square over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype)


def apply_rope(x: jax.Array) -> jax.Array:
    """Rotates pairs of features by angles proportional to the position."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), 10_000.0 ** -np.linspace(0, 1, half))
    rotation = jnp.asarray(np.exp(1j * angles)[None, :, None, :], jnp.complex64)
    real, imaginary = jnp.split(x, 2, axis=-1)
    rotated = jax.lax.complex(real, imaginary) * rotation
    return jnp.concatenate([rotated.real, rotated.imag], axis=-1)


def parameter_heavy(parameters: int, batch: int = 1) -> Model:
    """Builds a model with any number of parameters and almost no computation."""

    def loss(params, batch):
        return 0.5 * jnp.sum((params - batch[0]) ** 2)

    ones = np.ones((batch, 1), np.float32)
    return Model("wide", loss, jax.ShapeDtypeStruct((parameters,), jnp.float32), ones)
