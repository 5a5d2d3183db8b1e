"""The tables that tests run over: rules, placements, problems.

A new rule joins `RULES` and inherits the laws; `Obeys` says which ones hold for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax import collectives

WORKERS = 8


class Case(NamedTuple):
    """A rule, and what the laws may expect of it."""

    rule: lsgd.SyncRule
    agrees: bool = True  # all workers are equal after every synchronisation
    collectives: int | tuple = (
        1  # in the compiled synchronisation: all-reduces, or kinds
    )
    conditional: bool = False  # whether they stand inside a conditional
    symmetric: bool = True  # whether the order of the workers does not matter
    places: tuple = ()  # where it is tried besides "simulate"; () for everywhere

    @property
    def kinds(self) -> list[str]:
        """The collectives of the compiled synchronisation, or only their kinds."""
        if isinstance(self.collectives, int):
            return ["all-reduce"] * self.collectives
        return sorted(self.collectives)

    def seen(self, names: list[str]) -> list[str]:
        """What a program holds, to compare with `kinds`."""
        return sorted(names if isinstance(self.collectives, int) else set(names))


def anchored(rate: float = 0.7, decay: float = 0.9) -> lsgd.SyncRule:
    """A rule that uses both parts of the state, and the round.

    v ← 0.9 v + (x̄ − mean xₖ);  x̄ ← x̄ − 0.7 v;  eₖ ← eₖ + 0.1 r (xₖ − x̄);  xₖ ← x̄
    """

    def init(tree):
        zeros = jax.tree.map(jnp.zeros_like, tree)
        return lsgd.RuleState(agreed=(tree, zeros), own=zeros)

    def apply(tree, state, context):
        (anchor, velocity), own = state
        mean, anyone = collectives.mean(tree, context)
        delta = jax.tree.map(
            lambda a, m: jnp.where(anyone, a - m, 0).astype(a.dtype), anchor, mean
        )
        velocity = jax.tree.map(
            lambda v, d: jnp.where(anyone, decay * v + d, v), velocity, delta
        )
        moved = jax.tree.map(
            lambda a, v: jnp.where(anyone, a - rate * v, a), anchor, velocity
        )
        own = jax.tree.map(
            lambda e, x, a: jnp.where(anyone, e + 0.1 * context.round * (x - a), e),
            own,
            tree,
            moved,
        )
        tree = jax.tree.map(lambda x, a: jnp.where(anyone, a, x), tree, moved)
        return tree, lsgd.RuleState((moved, velocity), own)

    return lsgd.SyncRule(init, apply)


FEW = ("mesh", "lanes")
EXCHANGE = ("all-gather", "all-to-all")
RULES = {
    "average": Case(lsgd.average()),
    "average_named": Case(lsgd.average("worker")),
    "keep": Case(lsgd.keep(), agrees=False, collectives=0),
    "chain_of_one": Case(lsgd.chain(lsgd.average())),
    "chain": Case(lsgd.chain(lsgd.keep(), lsgd.average(), lsgd.keep())),
    "when": Case(
        lsgd.when(lsgd.every(2), lsgd.average()), agrees=False, conditional=True
    ),
    "when_every_round": Case(
        lsgd.when(lsgd.every(1), lsgd.average()), conditional=True
    ),
    "anchored": Case(anchored()),
    "floats": Case(lsgd.floats(lsgd.average())),
    "reset": Case(lsgd.reset(), collectives=0),
    "anchored_now_and_then": Case(
        lsgd.chain(lsgd.when(lsgd.at([1, 3]), anchored()), lsgd.keep()),
        agrees=False,
        conditional=True,
    ),
    "outer": Case(lsgd.outer(optax.adam(0.1)), places=FEW),
    "diloco": Case(lsgd.diloco()),
    "shard": Case(
        lsgd.shard(lsgd.diloco(), WORKERS),
        symmetric=False,
        collectives=("reduce-scatter", "all-gather"),
        places=FEW,
    ),
    "elastic": Case(lsgd.elastic(), agrees=False, places=FEW),
    "mix": Case(lsgd.mix(lsgd.diloco(), 0.5), agrees=False, places=FEW),
    "overlap": Case(lsgd.overlap(lsgd.slowmo()), agrees=False, places=FEW),
    "delay": Case(
        lsgd.mix(lsgd.delay(lsgd.diloco()), 0.5),
        agrees=False,
        conditional=True,
        places=FEW,
    ),
    "fragment": Case(
        lsgd.fragment(lsgd.diloco(), 3),
        agrees=False,
        collectives=3,
        conditional=True,
        places=FEW,
    ),
    "flatten": Case(lsgd.flatten(lsgd.average()), places=FEW),
    "quantize_8": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.quantize(lsgd.average(), 8, block=8)),
        symmetric=False,
        collectives=EXCHANGE,
        places=FEW,
    ),
    "quantize_1": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.quantize(lsgd.average(), 1, block=8)),
        symmetric=False,
        collectives=EXCHANGE,
        places=FEW,
    ),
    "cast": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.cast(lsgd.average())),
        symmetric=False,
        collectives=EXCHANGE,
        places=FEW,
    ),
    "topk": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.topk(lsgd.average(), 0.3)),
        collectives=("all-gather",),
        places=FEW,
    ),
    "signs": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.signs(lsgd.average())),
        collectives=("all-gather",),
        places=FEW,
    ),
    "median": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.median()),
        collectives=EXCHANGE,
        places=FEW,
    ),
    "trimmed_mean": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.trimmed_mean(0.25)),
        collectives=EXCHANGE,
        places=FEW,
    ),
    "guard": Case(
        lsgd.guard(lsgd.diloco(), warm_up=1),
        collectives=("all-reduce", "all-gather"),
        places=FEW,
    ),
    "ema": Case(lsgd.ema(lsgd.diloco()), places=FEW),
    "measured": Case(
        lsgd.measured(lsgd.diloco()),
        collectives=("all-reduce", "all-gather", "all-to-all"),
        places=FEW,
    ),
    "gossip_ring": Case(
        lsgd.gossip("ring"),
        agrees=False,
        symmetric=False,
        collectives=("collective-permute",),
        places=FEW,
    ),
    "gossip_one_peer": Case(
        lsgd.gossip("one-peer"),
        agrees=False,
        symmetric=False,
        collectives=("collective-permute",),
        conditional=True,
        places=FEW,
    ),
}


def pairs(places, **wanted) -> list[tuple[str, str]]:
    """Rules of the table that are as wanted, with the places where each is tried."""
    return [
        (name, place)
        for name, case in RULES.items()
        for place in places
        if (not case.places or place in ("simulate", *case.places))
        and all(getattr(case, key) == value for key, value in wanted.items())
    ]


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first CPU devices, made as users make it."""
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count]
    )


# Every placement of eight workers; "simulate" is the one that others are held against.
PLACEMENTS = {
    "simulate": lambda algorithm: lsgd.simulate(algorithm, WORKERS),
    "simulate_map": lambda algorithm: lsgd.simulate(algorithm, WORKERS, lanes="map"),
    "mesh": lambda algorithm: lsgd.on_mesh(algorithm, mesh(worker=8)),
    "lanes": lambda algorithm: lsgd.on_mesh(algorithm, mesh(worker=4), workers=8),
    "lanes_map": lambda algorithm: lsgd.on_mesh(
        algorithm, mesh(worker=2), workers=8, lanes="map"
    ),
    "sharded": lambda algorithm: lsgd.on_mesh(
        algorithm, mesh(worker=4, model=2), workers=8
    ),
    "one_device": lambda algorithm: lsgd.on_mesh(algorithm, mesh(worker=1), workers=8),
}
ON_DEVICES = ("mesh", "lanes", "sharded")


def loss_fn(params, batch):
    """A small network with a two-level tree of parameters."""
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["in"]["w"] + params["in"]["b"][None, :])
    return jnp.mean((hidden @ params["out"] - targets) ** 2)


def network() -> dict:
    """Parameters of the network."""
    rng = np.random.default_rng(0)
    return {
        "in": {
            "w": rng.normal(size=(3, 4)).astype(np.float32),
            "b": rng.normal(size=4).astype(np.float32),
        },
        "out": rng.normal(size=4).astype(np.float32),
    }


def batches(steps: int, workers: int = WORKERS, batch: int = 2, seed: int = 1) -> list:
    """Batches whose workers all see something else."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(workers, batch, 3)).astype(np.float32),
            rng.normal(size=(workers, batch)).astype(np.float32),
        )
        for _ in range(steps)
    ]


def algorithm(rule, optimizer=None) -> lsgd.Algorithm:
    """The network under a rule, with momentum inside unless told otherwise."""
    optimizer = optimizer or optax.sgd(0.05, momentum=0.9)
    return lsgd.local_sgd(loss_fn, optimizer, rule=rule)


@functools.cache
def cluster(place: str, name: str) -> lsgd.Cluster:
    """A rule of the table at a place, compiled once for all tests."""
    return PLACEMENTS[place](algorithm(RULES[name].rule))


def run(cluster, batches, due, weight=None, state=None):
    """Drives the three verbs by hand: the plainest loop there is."""
    state = cluster.init(network()) if state is None else state
    losses = []
    for batch in batches:
        state, metrics = cluster.step(state, batch)
        losses.append(metrics["loss"])
        if due(int(state.step)):
            state = cluster.sync(state, weight)
    return state, np.stack(losses)


def stack(batches):
    """Stacks batches over time."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def assert_close(left, right, rtol=1e-5, atol=1e-6):
    """Compares two trees leaf by leaf in the structure of the first."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True
    ):
        np.testing.assert_allclose(
            raw(x),
            raw(y),
            rtol=rtol,
            atol=atol,
            err_msg=jax.tree_util.keystr(path),
        )


def assert_same(left, right):
    """Compares two trees bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(raw(x), raw(y))


def raw(x):
    """The numbers of a leaf, those of a typed key too."""
    typed = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if typed else x)
