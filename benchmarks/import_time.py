"""Time of the import and of the first step, over jax and optax alone.

Each import runs in its own process. Target: at most 1.15.
"""

import statistics
import subprocess
import sys
import time

from benchmarks.reporting import FigureSpec

DEVICES = (1,)
FIGURE = FigureSpec("ratio", ("what",), "time / jax and optax alone", 1.15)

IMPORT_PLAIN = "import jax, optax"
IMPORT_LIBRARY = "import localsgd_jax"
STEP_LIBRARY = """
import jax, jax.numpy as jnp, optax
import localsgd_jax as lsgd
algorithm = lsgd.local_sgd(lambda w, x: jnp.mean((x @ w) ** 2), optax.sgd(0.1),
                           rule=lsgd.average())
cluster = lsgd.simulate(algorithm, 8)
state, _ = cluster.step(cluster.init(jnp.zeros(300)), jnp.ones((8, 16, 300)))
jax.block_until_ready(state)
"""
STEP_PLAIN = """
import jax, jax.numpy as jnp, optax
optimizer = optax.sgd(0.1)
@jax.jit
@jax.vmap
def step(w, state, x):
    grad = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    updates, state = optimizer.update(grad, state, w)
    return optax.apply_updates(w, updates), state
w = jnp.zeros((8, 300))
jax.block_until_ready(step(w, jax.vmap(optimizer.init)(w), jnp.ones((8, 16, 300))))
"""


def run_seconds(program: str) -> float:
    """Returns the seconds of a Python process that runs a program."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def compare(name: str, program: str, plain: str, repeats: int) -> dict:
    pairs = [(run_seconds(program), run_seconds(plain)) for _ in range(repeats)]
    library, without = zip(*pairs, strict=True)
    return {
        "what": name,
        "library s": statistics.median(library),
        "plain s": statistics.median(without),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    repeats = 1 if tiny else 7
    return [
        compare("import", IMPORT_LIBRARY, IMPORT_PLAIN, repeats),
        compare("first step", STEP_LIBRARY, STEP_PLAIN, repeats),
    ]
