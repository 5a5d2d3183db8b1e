"""How long the library takes to import, over jax and optax alone, and to a first step.

Each import in a process of its own. Aim: at most 1.15.
"""

import statistics
import subprocess
import sys
import time

from benchmarks.record import Shown

DEVICES = (1,)
SHOWN = Shown("ratio", ("what",), "time / jax and optax alone", 1.15)

PLAIN = "import jax, optax"
LIBRARY = "import localsgd_jax"
STEP = """
import jax, jax.numpy as jnp, optax
import localsgd_jax as lsgd
made = lsgd.local_sgd(lambda w, x: jnp.mean((x @ w) ** 2), optax.sgd(0.1),
                      rule=lsgd.average())
cluster = lsgd.simulate(made, 8)
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


def seconds(program: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - began


def compare(name: str, program: str, plain: str, repeats: int) -> dict:
    pairs = [(seconds(program), seconds(plain)) for _ in range(repeats)]
    ours, theirs = zip(*pairs, strict=True)
    return {
        "what": name,
        "library s": statistics.median(ours),
        "plain s": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    repeats = 1 if tiny else 7
    return [
        compare("import", LIBRARY, PLAIN, repeats),
        compare("first step", STEP, STEP_PLAIN, repeats),
    ]
