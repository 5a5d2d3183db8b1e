"""A GPT with fully sharded parameters: scanned layers, remat, bfloat16 products."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import models
from benchmarks.accelerator_lanes import analytic_flops


class Shape(NamedTuple):
    """Shape of a GPT and of its batches.

    Attributes:
      layers: number of layers, L.
      width: d.
      heads: attention heads.
      vocabulary: V, with tied embeddings.
      length: tokens per sequence, T, with learned positions.
      sequences: sequences per device and step.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    sequences: int

    @property
    def parameters(self) -> int:
        """Number of parameters, 12 L d² + (V + T) d."""
        rows = self.vocabulary + self.length
        return 12 * self.layers * self.width**2 + rows * self.width

    @property
    def flops_per_device(self) -> float:
        """Operations of a device in a step, forward and backward, without remat."""
        tokens = self.sequences * self.length
        return tokens * analytic_flops(self._asdict())


LARGE = Shape(24, 2048, 16, 32000, 2048, 4)
SMALL = Shape(2, 256, 4, 512, 128, 1)


def parameter_shapes(shape: Shape, mesh: Mesh) -> dict:
    """Returns the parameters without values, each sharded over the axis "fsdp"."""
    layers, width = shape.layers, shape.width

    def leaf(*sizes: int) -> jax.ShapeDtypeStruct:
        spec = P(*[None] * (len(sizes) - 2), "fsdp", None)
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)

    return {
        "embedding": leaf(shape.vocabulary, width),
        "position": leaf(shape.length, width),
        "blocks": {
            "qkv": leaf(layers, width, 3 * width),
            "out": leaf(layers, width, width),
            "up": leaf(layers, width, 4 * width),
            "down": leaf(layers, 4 * width, width),
        },
    }


def make_loss(shape: Shape, mesh: Mesh, batch_axes: Sequence[str]) -> Callable:
    """Returns `loss(params, tokens)` with tokens `(B, T + 1)`.

    Args:
      shape: shape of the model.
      mesh: the mesh.
      batch_axes: mesh axes over which activations are split along B.
    """
    activations = NamedSharding(mesh, P(tuple(batch_axes)))

    def pin(x: jax.Array) -> jax.Array:
        # Without it the partitioner splits activations along their features.
        return jax.lax.with_sharding_constraint(x, activations)

    @jax.checkpoint
    def layer(x: jax.Array, block: dict) -> tuple[jax.Array, None]:
        block = jax.tree.map(lambda w: w.astype(jnp.bfloat16), block)
        return pin(models.decoder_block(x, block, shape.heads, rotary=False)), None

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        embedding = params["embedding"].astype(jnp.bfloat16)
        position = params["position"].astype(jnp.bfloat16)
        x = pin(embedding[tokens[:, :-1]] + position[None])
        x, _ = jax.lax.scan(layer, x, params["blocks"])
        logits = pin((models.rms_norm(x) @ embedding.T).astype(jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    return loss


def optimizer() -> optax.GradientTransformation:
    """Returns the optimizer of the local steps."""
    return optax.adamw(3e-4, weight_decay=0.1)
