"""Local SGD and its descendants in JAX: any optax optimizer, any pytree, any place."""

from localsgd_jax.algorithm import Worker, from_train_step, local_sgd
from localsgd_jax.base import (
    Algorithm,
    Cluster,
    Context,
    RuleState,
    State,
    SyncRule,
)
from localsgd_jax.deal import deal
from localsgd_jax.journal import NonFiniteLossError
from localsgd_jax.placement import consensus, on_mesh, simulate
from localsgd_jax.rounds import fused, gated
from localsgd_jax.rules import (
    average,
    batch_statistics,
    chain,
    floats,
    keep,
    reestimate,
    reset,
    when,
)
from localsgd_jax.schedules import (
    Schedule,
    at,
    every,
    growing,
    never,
    post_local,
    quadratic,
)
from localsgd_jax.shards import deal_shards, dirichlet
from localsgd_jax.train import train

__all__ = [
    "Algorithm",
    "Cluster",
    "Context",
    "NonFiniteLossError",
    "RuleState",
    "Schedule",
    "State",
    "SyncRule",
    "Worker",
    "at",
    "average",
    "batch_statistics",
    "chain",
    "consensus",
    "deal",
    "deal_shards",
    "dirichlet",
    "every",
    "floats",
    "from_train_step",
    "fused",
    "gated",
    "growing",
    "keep",
    "local_sgd",
    "never",
    "on_mesh",
    "post_local",
    "quadratic",
    "reestimate",
    "reset",
    "simulate",
    "train",
    "when",
]
