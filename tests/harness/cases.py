"""Tables that tests are parametrised over: rules, placements and a test problem.

A rule added to `RULES` is tested for all invariants; `Case` declares which of them
apply.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.core import collectives

WORKERS = 8


class Case(NamedTuple):
    """A rule and its expected properties.

    Attributes:
      rule: the rule.
      reaches_consensus: whether all workers are equal after every synchronisation.
      collectives: collectives of the compiled synchronisation: the number of
        all-reduces, or the set of kinds.
      conditional: whether the collectives are inside a conditional.
      symmetric: whether the result does not depend on the order of the workers.
      placements: placements to test besides "simulate"; () for all of them.
    """

    rule: lsgd.SyncRule
    reaches_consensus: bool = True
    collectives: int | tuple = 1
    conditional: bool = False
    symmetric: bool = True
    placements: tuple = ()

    @property
    def kinds(self) -> list[str]:
        """The expected collectives, each as often as it occurs, or only their kinds."""
        if isinstance(self.collectives, int):
            return ["all-reduce"] * self.collectives
        return sorted(self.collectives)

    def observed(self, names: list[str]) -> list[str]:
        """The collectives of a program in the form of `kinds`."""
        return sorted(names if isinstance(self.collectives, int) else set(names))


def momentum_rule(rate: float = 0.7, decay: float = 0.9) -> lsgd.SyncRule:
    """Returns a rule with shared state, local state and dependence on the round.

    v ← 0.9 v + (x̄ − mean xₖ);  x̄ ← x̄ − 0.7 v;  eₖ ← eₖ + 0.1 r (xₖ − x̄);  xₖ ← x̄
    """

    def init(tree, specs=None):
        zeros = jax.tree.map(jnp.zeros_like, tree)
        return lsgd.RuleState(shared=(tree, zeros), local=zeros)

    def apply(tree, state, context):
        (anchor, velocity), local = state
        mean, any_active = collectives.mean(tree, context)
        delta = jax.tree.map(
            lambda a, m: jnp.where(any_active, a - m, 0).astype(a.dtype), anchor, mean
        )
        velocity = jax.tree.map(
            lambda v, d: jnp.where(any_active, decay * v + d, v), velocity, delta
        )
        moved = jax.tree.map(
            lambda a, v: jnp.where(any_active, a - rate * v, a), anchor, velocity
        )
        local = jax.tree.map(
            lambda e, x, a: jnp.where(any_active, e + 0.1 * context.round * (x - a), e),
            local,
            tree,
            moved,
        )
        tree = jax.tree.map(lambda x, a: jnp.where(any_active, a, x), tree, moved)
        return tree, lsgd.RuleState((moved, velocity), local)

    name = f"momentum_rule(rate={rate}, decay={decay})"
    return lsgd.SyncRule(init, apply, name=name)


# Placements of rules that are expensive to compile.
FEW_PLACEMENTS = ("mesh", "lanes")
# Rules that the default selection tests in every placement, and the placement in which
# it tests every rule; the other pairs are marked `full`.
FEW_RULES = ("momentum_rule",)
MAIN_PLACEMENT = "lanes"
# One rule for each kind of program: of the tests that compile a program of their own,
# the default selection runs these in the main placement.
REPRESENTATIVE_RULES = (
    *("average", "momentum_rule", "when", "shard_state", "fragment", "quantize_8"),
    *("median", "control_variates"),
)
GATHER_AND_ALL_TO_ALL = ("all-gather", "all-to-all")
RULES = {
    "average": Case(lsgd.average()),
    "average_named": Case(lsgd.average("worker")),
    "identity": Case(lsgd.identity(), reaches_consensus=False, collectives=0),
    "chain_of_one": Case(lsgd.chain(lsgd.average())),
    "chain": Case(lsgd.chain(lsgd.identity(), lsgd.average(), lsgd.identity())),
    "when": Case(
        lsgd.when(lsgd.every(2), lsgd.average()),
        reaches_consensus=False,
        conditional=True,
    ),
    "when_every_round": Case(
        lsgd.when(lsgd.every(1), lsgd.average()), conditional=True
    ),
    "momentum_rule": Case(momentum_rule()),
    "floating_only": Case(lsgd.floating_only(lsgd.average())),
    "reset_to_init": Case(lsgd.reset_to_init(), collectives=0),
    "conditional_momentum_rule": Case(
        lsgd.chain(lsgd.when(lsgd.at_steps([1, 3]), momentum_rule()), lsgd.identity()),
        reaches_consensus=False,
        conditional=True,
    ),
    "outer": Case(lsgd.outer(optax.adam(0.1)), placements=FEW_PLACEMENTS),
    "diloco": Case(lsgd.diloco()),
    "shard_state": Case(
        lsgd.shard_state(lsgd.diloco(), WORKERS),
        symmetric=False,
        collectives=("reduce-scatter", "all-gather"),
        placements=FEW_PLACEMENTS,
    ),
    "elastic_average": Case(
        lsgd.elastic_average(), reaches_consensus=False, placements=FEW_PLACEMENTS
    ),
    "interpolate": Case(
        lsgd.interpolate(lsgd.diloco(), 0.5),
        reaches_consensus=False,
        placements=FEW_PLACEMENTS,
    ),
    "overlap": Case(
        lsgd.overlap(lsgd.slowmo()), reaches_consensus=False, placements=FEW_PLACEMENTS
    ),
    "delay": Case(
        lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5),
        reaches_consensus=False,
        conditional=True,
        placements=FEW_PLACEMENTS,
    ),
    "fragment": Case(
        lsgd.fragment(lsgd.diloco(), 3),
        reaches_consensus=False,
        collectives=3,
        conditional=True,
        placements=FEW_PLACEMENTS,
    ),
    "flatten": Case(lsgd.flatten(lsgd.average()), placements=FEW_PLACEMENTS),
    "quantize_8": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.quantize(lsgd.average(), 8, block=8)),
        symmetric=False,
        collectives=GATHER_AND_ALL_TO_ALL,
        placements=FEW_PLACEMENTS,
    ),
    "quantize_1": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.quantize(lsgd.average(), 1, block=8)),
        symmetric=False,
        collectives=GATHER_AND_ALL_TO_ALL,
        placements=FEW_PLACEMENTS,
    ),
    "cast": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.cast(lsgd.average())),
        symmetric=False,
        collectives=GATHER_AND_ALL_TO_ALL,
        placements=FEW_PLACEMENTS,
    ),
    "top_k": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.top_k(lsgd.average(), 0.3)),
        collectives=("all-gather",),
        placements=FEW_PLACEMENTS,
    ),
    "scaled_sign": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.scaled_sign(lsgd.average())),
        collectives=("all-gather",),
        placements=FEW_PLACEMENTS,
    ),
    "median": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.median()),
        collectives=GATHER_AND_ALL_TO_ALL,
        placements=FEW_PLACEMENTS,
    ),
    "trimmed_mean": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.trimmed_mean(0.25)),
        collectives=GATHER_AND_ALL_TO_ALL,
        placements=FEW_PLACEMENTS,
    ),
    "drop_outliers": Case(
        lsgd.drop_outliers(lsgd.diloco(), warm_up=1),
        collectives=("all-reduce", "all-gather"),
        placements=FEW_PLACEMENTS,
    ),
    "ema": Case(lsgd.ema(lsgd.diloco()), placements=FEW_PLACEMENTS),
    "with_diagnostics": Case(
        lsgd.with_diagnostics(lsgd.diloco()),
        collectives=("all-reduce", "all-gather", "all-to-all"),
        placements=FEW_PLACEMENTS,
    ),
    "partition": Case(
        lsgd.partition(
            {"outer": lsgd.diloco(), "mean": lsgd.average()},
            lambda path: "mean" if path in ("out", "rows", "vector") else "outer",
        ),
        placements=FEW_PLACEMENTS,
    ),
    "chunked_top_k": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.chunked_top_k(lsgd.average(), 2, chunk=5)),
        collectives=("all-gather",),
        placements=FEW_PLACEMENTS,
    ),
    "clip_to_median_norm": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.clip_to_median_norm(lsgd.average())),
        collectives=("all-gather", "all-reduce"),
        placements=FEW_PLACEMENTS,
    ),
    "quantize_e3m0": Case(
        lsgd.outer(
            optax.sgd(0.7),
            lsgd.quantize(lsgd.average(), 4, block=8, encoding="e3m0"),
        ),
        symmetric=False,
        collectives=GATHER_AND_ALL_TO_ALL,
        placements=FEW_PLACEMENTS,
    ),
    "radial_directional_average": Case(
        lsgd.outer(optax.sgd(0.7), lsgd.radial_directional_average()),
        placements=FEW_PLACEMENTS,
    ),
    "eager_outer": Case(
        lsgd.eager_outer(optax.sgd(0.7, momentum=0.9)),
        reaches_consensus=False,
        placements=FEW_PLACEMENTS,
    ),
    # The step size includes the momentum of the inner optimizer, 0.05 / (1 − 0.9).
    "control_variates": Case(lsgd.control_variates(0.5, 3), placements=FEW_PLACEMENTS),
    "gossip_ring": Case(
        lsgd.gossip("ring"),
        reaches_consensus=False,
        symmetric=False,
        collectives=("collective-permute",),
        placements=FEW_PLACEMENTS,
    ),
    "gossip_one_peer": Case(
        lsgd.gossip("one-peer"),
        reaches_consensus=False,
        symmetric=False,
        collectives=("collective-permute",),
        conditional=True,
        placements=FEW_PLACEMENTS,
    ),
}


def rule_placement_pairs(placements, main_rules=(), **properties) -> list:
    """Returns (rule, placement) pairs for `parametrize`, by names.

    Args:
      placements: names of placements.
      main_rules: rules of the default selection in the main placement; () for all.
      **properties: required values of attributes of `Case`.

    Returns:
      Pairs of all rules with these properties and the placements in which each is
      tested. Those outside the default selection are marked `full`.
    """
    placements = list(placements)
    main = MAIN_PLACEMENT if MAIN_PLACEMENT in placements else placements[0]
    pairs = [
        (name, placement)
        for name, case in RULES.items()
        for placement in placements
        if (not case.placements or placement in ("simulate", *case.placements))
        and all(getattr(case, key) == value for key, value in properties.items())
    ]

    def is_fast(name: str, placement: str) -> bool:
        is_main = placement == main and name in (main_rules or RULES)
        return is_main or name in FEW_RULES

    return [pair if is_fast(*pair) else in_full(*pair) for pair in pairs]


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """Returns a mesh of the first CPU devices."""
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count]
    )


# Every placement of eight workers; the others are compared with "simulate".
PLACEMENTS = {
    "simulate": lambda algorithm: lsgd.simulate(algorithm, WORKERS),
    "simulate_map": lambda algorithm: lsgd.simulate(
        algorithm, WORKERS, worker_map="map"
    ),
    "mesh": lambda algorithm: lsgd.on_mesh(algorithm, mesh(worker=8)),
    "lanes": lambda algorithm: lsgd.on_mesh(algorithm, mesh(worker=4), workers=8),
    "lanes_map": lambda algorithm: lsgd.on_mesh(
        algorithm, mesh(worker=2), workers=8, worker_map="map"
    ),
    "sharded": lambda algorithm: lsgd.on_mesh(
        algorithm, mesh(worker=4, model=2), workers=8
    ),
    "one_device": lambda algorithm: lsgd.on_mesh(algorithm, mesh(worker=1), workers=8),
}
ON_DEVICES = ("mesh", "lanes", "sharded")


def loss_fn(params, batch):
    """Loss of a small network with a two-level tree of parameters."""
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["in"]["w"] + params["in"]["b"][None, :])
    return jnp.mean((hidden @ params["out"] - targets) ** 2)


def network() -> dict:
    """Returns the initial parameters of the network."""
    rng = np.random.default_rng(0)
    return {
        "in": {
            "w": rng.normal(size=(3, 4)).astype(np.float32),
            "b": rng.normal(size=4).astype(np.float32),
        },
        "out": rng.normal(size=4).astype(np.float32),
    }


def batches(steps: int, workers: int = WORKERS, batch: int = 2, seed: int = 1) -> list:
    """Returns batches with different data for each worker."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(workers, batch, 3)).astype(np.float32),
            rng.normal(size=(workers, batch)).astype(np.float32),
        )
        for _ in range(steps)
    ]


def random_weights(seed=3):
    """Returns a weight for each worker, 0 for worker 2."""
    weight = np.random.default_rng(seed).uniform(0.5, 2, WORKERS).astype(np.float32)
    weight[2] = 0
    return weight


def algorithm(rule, optimizer=None) -> lsgd.Algorithm:
    """Returns local SGD of the network; the default optimizer has momentum."""
    optimizer = optimizer or optax.sgd(0.05, momentum=0.9)
    return lsgd.local_sgd(loss_fn, optimizer, rule=rule)


@functools.cache
def cluster(placement: str, name: str) -> lsgd.Cluster:
    """Returns a rule of the table in a placement, compiled once for all tests."""
    return PLACEMENTS[placement](algorithm(RULES[name].rule))


def drifting_cluster(rule, workers=4):
    """Returns workers that move 1 per step in orthogonal directions, and batches."""
    made = lsgd.local_sgd(lambda x, b: jnp.vdot(x, b), optax.sgd(1.0), rule=rule)
    cluster = lsgd.simulate(made, workers)
    state = cluster.init(jnp.zeros(workers))
    return cluster, state, [-np.eye(workers, dtype="f4")] * 60


def run_manually(cluster, batches, due, weight=None, state=None):
    """Runs a plain loop of `step` and `sync`."""
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


def without_specs(tree):
    """Returns a state without its partition inside a worker, and other trees as is."""
    return tree._replace(specs=None) if isinstance(tree, lsgd.State) else tree


def assert_close(left, right, rtol=1e-5, atol=1e-6):
    """Asserts that two trees have equal structure and close leaves.

    The partition inside a worker, static data of a state, may differ.
    """
    left, right = without_specs(left), without_specs(right)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True
    ):
        np.testing.assert_allclose(
            key_data(x),
            key_data(y),
            rtol=rtol,
            atol=atol,
            err_msg=jax.tree_util.keystr(path),
        )


def assert_same(left, right):
    """Asserts that two trees are bitwise equal, but for the specs of states."""
    left, right = without_specs(left), without_specs(right)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(key_data(x), key_data(y))


def key_data(x):
    """Returns the numbers of a leaf, also of a typed key."""
    typed = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if typed else x)
