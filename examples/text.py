"""Loss of a small byte-level GPT (NNX) against rounds and bytes for four periods.

    python examples/text.py

trains 4 workers on the help texts of the Python distribution with periods of H = 1, 8,
32 and 128 local steps of AdamW, prints a row per period, plots text.png and samples a
few lines from the last model: 3 minutes on two cores. Expected: 2.53, 2.59, 2.70 and
2.76 bits per byte on held-out windows, with 353, 44, 11 and 3 MB sent by each worker.
`--data FILE` trains on another text, `--post-local 128` synchronises after every step
until step 128, `--optimizer sgd` uses SGD with momentum instead of AdamW. Requires the
extra `examples`.
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
from localsgd_jax.flax import from_nnx, update_nnx

VOCABULARY = 256  # Number of byte values.


class Attention(nnx.Module):
    """Causal self-attention with rotary position embeddings."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        """Creates the projections, without biases."""
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, length, width) to the same shape."""
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        attended = jax.nn.dot_product_attention(
            apply_rope(query), apply_rope(key), value, is_causal=True
        )
        return self.out(attended.reshape(n, length, width))


class Block(nnx.Module):
    """Pre-norm transformer block: attention and MLP with residual connections."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        """Creates the layers."""
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, length, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Gpt(nnx.Module):
    """Decoder-only transformer over bytes with tied embeddings."""

    def __init__(
        self, width: int = 64, heads: int = 4, depth: int = 2, *, rngs: nnx.Rngs
    ) -> None:
        """Creates the embedding, the blocks and the final norm."""
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(VOCABULARY, width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (n, length) to next-byte logits (n, length, 256)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def apply_rope(x: jax.Array) -> jax.Array:
    """Applies rotary position embeddings (RoPE) to (n, length, heads, features)."""
    half = x.shape[-1] // 2
    inv_freq = 10_000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None] * inv_freq[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def bits_per_byte(model: Gpt, windows: jax.Array) -> jax.Array:
    """Returns the mean cross entropy in bits per byte of windows (n, length + 1)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(windows[:, :-1]), windows[:, 1:]
    )
    return losses.mean() / math.log(2)


def train_step(model: Gpt, optimizer: nnx.Optimizer, windows: jax.Array) -> dict:
    """Updates the model of one worker, as on a single device."""
    loss, grads = nnx.value_and_grad(bits_per_byte)(model, windows)
    optimizer.update(model, grads)
    return {"loss": loss}


def load(data: str | None, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits a text into windows of bytes; the last tenth is the test set.

    Args:
      data: path of a text file; None for the help texts of the Python distribution.
      length: number of predicted bytes per window.

    Returns:
      Training and test windows, `(n, length + 1)`, int32.
    """
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
    """Returns the inner optimizer with warm-up, cosine decay and gradient clipping."""
    peak = {"adamw": 4e-3, "sgd": 0.3}[name]
    lr = optax.warmup_cosine_decay_schedule(peak / 10, peak, steps // 10, steps)
    inner = (
        optax.adamw(lr, b2=0.99, weight_decay=0.01)
        if name == "adamw"
        else optax.sgd(lr, momentum=0.9)
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
    num_evals: int = 8,
) -> tuple[Gpt, dict]:
    """Trains one schedule and returns the averaged model and the history."""
    model = Gpt(depth=depth, rngs=nnx.Rngs(0))
    inner = nnx.Optimizer(model, make_optimizer(optimizer, steps), wrt=nnx.Param)
    algorithm, initial = from_nnx(train_step, model, inner)
    cluster = lsgd.on_mesh(algorithm, lsgd.worker_mesh(workers), workers)
    graphdef, _ = nnx.split(model)

    @jax.jit
    def evaluate(params):
        return {"test": bits_per_byte(nnx.merge(graphdef, params), test[:256])}

    rounds = len({*schedule.steps(steps), steps})
    state, history = lsgd.train(
        cluster,
        cluster.init(initial),
        lsgd.shuffled_batches(train, workers=workers, batch=batch),
        schedule=schedule,
        steps=steps,
        evaluate=evaluate,
        evaluate_every=max(rounds // num_evals, 1),
        progress=False,
    )
    update_nnx(lsgd.consensus(state, None), model)
    return model, history


def sample(model: Gpt, prompt: str, length: int, context: int, seed: int = 0) -> str:
    """Samples a continuation of a prompt, byte by byte, at temperature 0.8."""

    @nnx.jit
    def sample_next(model, window, last, key):
        logits = model(window[None])[0, last]
        return jax.random.categorical(key, logits / 0.8)

    raw = list(prompt.encode())
    for key in jax.random.split(jax.random.key(seed), length):
        window = raw[-context:]
        padded = jnp.array(window + [0] * (context - len(window)))
        raw.append(int(sample_next(model, padded, len(window) - 1, key)))
    return bytes(raw).decode(errors="replace")


def plot(histories: dict[str, dict], path: str) -> None:
    """Plots the test loss against rounds and against bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for name, history in histories.items():
        evaluated = ~np.isnan(history["test"])
        for axis, column, scale in zip(
            axes, ("round", "bytes"), (1, 1e-6), strict=True
        ):
            x = history[column][evaluated] * scale
            axis.semilogx(x, history["test"][evaluated], marker=".", label=name)
    for axis, label in zip(axes, ("rounds", "MB sent by a worker"), strict=True):
        axis.set_xlabel(label)
    axes[0].set_ylabel("bits per byte, test")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="text file; the help texts of Python if None")
    add(
        "--periods",
        type=int,
        nargs="+",
        default=[1, 8, 32, 128],
        help="local steps per round, H",
    )
    add("--steps", type=int, default=512, help="local steps per worker")
    add("--workers", type=int, default=4, help="number of workers, K")
    add("--batch", type=int, default=8, help="windows per worker and step")
    add("--context", type=int, default=64, help="bytes per window")
    add("--depth", type=int, default=2, help="number of transformer blocks")
    add(
        "--post-local",
        type=int,
        default=0,
        metavar="STEPS",
        help="number of steps synchronised one by one before the period applies",
    )
    add(
        "--optimizer", choices=["adamw", "sgd"], default="adamw", help="inner optimizer"
    )
    add("--figure", default="text.png", help="PNG of loss against rounds and bytes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Trains with every period, prints a row for each, plots, and prints a sample."""
    options = parse_options(arguments)
    # Connects the processes if `localsgd launch` started this program.
    lsgd.initialize(config=vars(options))
    is_first = jax.process_index() == 0
    log = functools.partial(print, flush=True) if is_first else lambda line: None
    train, test = load(options.data, options.context)
    histories = {}
    log(f"{'schedule':>20}{'rounds':>8}{'MB':>9}{'bits/byte':>11}{'seconds':>9}")
    for period in options.periods:
        schedule = lsgd.every(period)
        if options.post_local:
            schedule = lsgd.post_local(options.post_local, period)
        start = time.perf_counter()
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
        histories[schedule.name] = history
        log(
            f"{schedule.name:>20}{int(history['round'][-1]):>8}"
            f"{history['bytes'][-1] / 1e6:>9.1f}{history['test'][-1]:>11.3f}"
            f"{time.perf_counter() - start:>9.1f}"
        )
    if is_first:
        plot(histories, options.figure)
        log(sample(model, "The statement ", 300, options.context))
    return histories


if __name__ == "__main__":
    main()
