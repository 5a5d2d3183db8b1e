"""A small GPT over bytes, in NNX: loss against rounds and bytes for four periods.

    python examples/text.py

trains 4 workers on the help texts that are inside every Python with periods of H = 1,
8, 32 and 128 local steps of AdamW, prints a row for each, draws text.png and writes a
few lines of its own: 3 minutes on two cores. Expected: 2.53, 2.59, 2.70 and 2.76 bits
per byte on windows kept apart, for 353, 44, 11 and 3 MB sent by each worker. `--data
FILE` takes another text, `--post-local 128` agrees at every step until step 128,
`--optimizer sgd` has momentum instead of AdamW. It needs the extra `examples`.
"""

import argparse
import functools
import math
import os
import pathlib
import time

os.environ.setdefault("NPROC", "16")  # JAX 0.10 and 0.11 starve with fewer threads.

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import localsgd_jax as lsgd
from localsgd_jax.flax import from_nnx, into_nnx

BYTES = 256


class Attention(nnx.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        """Makes the projections, without biases."""
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, time, width) to the same shape."""
        n, time, width = x.shape
        mixed = self.qkv(x).reshape(n, time, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(mixed, 2, 0)
        seen = jax.nn.dot_product_attention(
            rotate(query), rotate(key), value, is_causal=True
        )
        return self.out(seen.reshape(n, time, width))


class Block(nnx.Module):
    """Attention and a layer for each position, both over what is normed."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        """Makes the parts."""
        self.norm_in = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm_mid = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, time, width) to the same shape."""
        x = x + self.attention(self.norm_in(x))
        return x + self.down(nnx.gelu(self.up(self.norm_mid(x))))


class Gpt(nnx.Module):
    """Bytes to logits of the byte that follows; embeddings are tied."""

    def __init__(
        self, width: int = 64, heads: int = 4, depth: int = 2, *, rngs: nnx.Rngs
    ) -> None:
        """Makes the blocks."""
        start = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(BYTES, width, embedding_init=start, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps (n, time) to (n, time, 256)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def rotate(x: jax.Array) -> jax.Array:
    """Turns pairs of features by angles that grow with the position (RoPE)."""
    half = x.shape[-1] // 2
    pace = 10_000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None] * pace[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


def bits(model: Gpt, windows: jax.Array) -> jax.Array:
    """Returns the mean bits per byte over windows (n, time + 1)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(windows[:, :-1]), windows[:, 1:]
    )
    return losses.mean() / math.log(2)


def train_step(model: Gpt, optimizer: nnx.Optimizer, windows: jax.Array) -> dict:
    """One worker's step, as for one device."""
    loss, grads = nnx.value_and_grad(bits)(model, windows)
    optimizer.update(model, grads)
    return {"loss": loss}


def load(data: str | None, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a text into windows; the last tenth is for testing."""
    if data is None:
        from pydoc_data.topics import topics

        raw = "\n".join(topics.values()).encode()
    else:
        raw = pathlib.Path(data).read_bytes()
    count = len(raw) // (length + 1)
    windows = np.frombuffer(raw, np.uint8, count * (length + 1))
    windows = windows.reshape(count, length + 1).astype(np.int32)
    return windows[: -count // 10], windows[-count // 10 :]


def make_optimizer(name: str, steps: int) -> optax.GradientTransformation:
    """Makes the inner optimizer, with a warm-up and a cosine decay."""
    peak = {"adamw": 4e-3, "sgd": 0.3}[name]
    rate = optax.warmup_cosine_decay_schedule(peak / 10, peak, steps // 10, steps)
    inner = (
        optax.adamw(rate, b2=0.99, weight_decay=0.01)
        if name == "adamw"
        else optax.sgd(rate, momentum=0.9)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


def run(
    train: np.ndarray,
    test: np.ndarray,
    schedule: lsgd.Schedule,
    *,
    workers: int = 4,
    batch: int = 8,
    steps: int = 512,
    optimizer: str = "adamw",
    depth: int = 2,
    looks: int = 8,
) -> tuple[Gpt, dict]:
    """Trains once; returns the averaged model and the history."""
    model = Gpt(depth=depth, rngs=nnx.Rngs(0))
    inner = nnx.Optimizer(model, make_optimizer(optimizer, steps), wrt=nnx.Param)
    algorithm, start = from_nnx(train_step, model, inner, lsgd.average())
    cluster = lsgd.on_mesh(algorithm, lsgd.worker_mesh(workers), workers)
    graph, _ = nnx.split(model)

    @jax.jit
    def evaluate(params):
        return {"test": bits(nnx.merge(graph, params), test[:256])}

    rounds = len({*schedule.steps(steps), steps})
    state, history = lsgd.train(
        cluster,
        cluster.init(start),
        lsgd.deal(train, workers=workers, batch=batch),
        every=schedule,
        steps=steps,
        evaluate=evaluate,
        evaluate_every=max(rounds // looks, 1),
        progress=False,
    )
    into_nnx(lsgd.consensus(state, None), model)
    return model, history


def sample(model: Gpt, prompt: str, length: int, context: int, seed: int = 0) -> str:
    """Lets the model go on after a prompt, byte by byte."""

    @nnx.jit
    def following(model, window, last, key):
        logits = model(window[None])[0, last]
        return jax.random.categorical(key, logits / 0.8)

    raw = list(prompt.encode())
    for key in jax.random.split(jax.random.key(seed), length):
        window = raw[-context:]
        padded = jnp.array(window + [0] * (context - len(window)))
        raw.append(int(following(model, padded, len(window) - 1, key)))
    return bytes(raw).decode(errors="replace")


def draw(curves: dict[str, dict], path: str) -> None:
    """Draws the loss on test windows against rounds and against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for name, history in curves.items():
        known = ~np.isnan(history["test"])
        for axis, column, scale in zip(
            axes, ("round", "bytes"), (1, 1e-6), strict=True
        ):
            x = history[column][known] * scale
            axis.semilogx(x, history["test"][known], marker=".", label=name)
    for axis, label in zip(axes, ("rounds", "MB sent by a worker"), strict=True):
        axis.set_xlabel(label)
    axes[0].set_ylabel("bits per byte, test")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Trains with every period, prints the rows, draws, and writes a sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a file instead of Python's help texts")
    parser.add_argument("--periods", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--post-local", type=int, default=0, metavar="STEPS")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--figure", default="text.png")
    options = parser.parse_args(arguments)
    lsgd.initialize(config=vars(options))  # Processes of `localsgd launch`, if any.
    first = jax.process_index() == 0
    say = functools.partial(print, flush=True) if first else lambda line: None
    train, test = load(options.data, options.context)
    curves = {}
    say(f"{'schedule':>20}{'rounds':>8}{'MB':>9}{'bits/byte':>11}{'seconds':>9}")
    for period in options.periods:
        schedule = lsgd.every(period)
        if options.post_local:
            schedule = lsgd.post_local(options.post_local, period)
        began = time.perf_counter()
        model, history = run(
            train,
            test,
            schedule,
            workers=options.workers,
            batch=options.batch,
            steps=options.steps,
            optimizer=options.optimizer,
            depth=options.depth,
        )
        curves[schedule.name] = history
        say(
            f"{schedule.name:>20}{int(history['round'][-1]):>8}"
            f"{history['bytes'][-1] / 1e6:>9.1f}{history['test'][-1]:>11.3f}"
            f"{time.perf_counter() - began:>9.1f}"
        )
    if first:
        draw(curves, options.figure)
        say(sample(model, "The statement ", 300, options.context))
    return curves


if __name__ == "__main__":
    main()
