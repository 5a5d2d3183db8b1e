"""Training steps and rounds as pure functions for jit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from localsgd_jax.core.predicates import check_bool, probe_predicate
from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.core.validation import check_type
from localsgd_jax.execution.ambient_mesh import in_mesh_of_state
from localsgd_jax.execution.cyclic_round import RoundClass


def gated(cluster: Cluster, schedule: Callable) -> Callable:
    """Builds a training step with a conditional synchronisation.

        s ← step(s, ξ);   s ← sync(s) if schedule(s.step)

    The predicate depends only on the step counter, which is replicated over workers.
    Its evaluation needs no communication, and collectives occur only inside the
    conditional.

    Args:
      cluster: from `simulate` or `on_mesh`.
      schedule: predicate on the number of local steps, such as `every(16)`.

    Returns:
      `step(state, batch, weight=None) -> (state, metrics)`, batch leaves `(K, B, ...)`,
      for `jax.jit` with `donate_argnums=0`.

    Raises:
      TypeError: if the cluster is no `Cluster`, or the schedule is not callable or does
        not return a bool.
      ValueError: if the schedule is not deterministic.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> step = jax.jit(gated(cluster, lsgd.every(2)))
      >>> state = cluster.init(jnp.zeros(()))
      >>> for _ in range(2):
      ...     state, metrics = step(state, jnp.array([1.0, 3.0]))
      >>> state.workers.params, int(state.round)
      (Array([2., 2.], dtype=float32), 1)
    """
    check_type("gated(cluster)", "cluster", cluster, Cluster)
    check_type("gated(schedule)", "schedule", schedule, Callable)

    probe_predicate("gated(schedule)", schedule)

    @in_mesh_of_state
    def step(
        state: State, batch: PyTree, weight: jax.Array | None = None
    ) -> tuple[State, PyTree]:
        state, metrics = cluster.step(state, batch)
        due = check_bool("gated(schedule)", schedule(state.step))
        return cluster.sync_if(due, state, weight), metrics

    return step


def fused(cluster: Cluster) -> Callable:
    """Builds a round: H local steps and a synchronisation in one dispatch.

        s ← step(s, ξ₁); … s ← step(s, ξ_H);   s ← sync(s)

    Args:
      cluster: from `simulate` or `on_mesh`.

    Returns:
      `one_round(state, batches, weight=None) -> (state, metrics)`; batch leaves `(H,
      K, B, ...)`, metrics `(H, K, ...)`; for `jax.jit` with `donate_argnums=0`.

    Raises:
      TypeError: if the cluster is no `Cluster`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> one_round = jax.jit(fused(cluster))
      >>> batches = jnp.array([[1.0, 3.0], [1.0, 3.0]])           # H = 2, K = 2
      >>> state, metrics = one_round(cluster.init(jnp.zeros(())), batches)
      >>> state.workers.params, metrics["loss"].shape
      (Array([2., 2.], dtype=float32), (2, 2))
    """
    check_type("fused(cluster)", "cluster", cluster, Cluster)

    @in_mesh_of_state
    def one_round(
        state: State, batches: PyTree, weight: jax.Array | None = None
    ) -> tuple[State, PyTree]:
        state, metrics = jax.lax.scan(cluster.step, state, batches)
        return cluster.sync(state, weight), metrics

    return one_round


def sync_in_class(
    cluster: Cluster,
    round_class: RoundClass | None,
    state: State,
    weight: jax.Array | None = None,
) -> State:
    """Synchronises with the choices of the rule made for a class of rounds.

    The result equals that of `cluster.sync`. Fragments, neighbours and snapshots that
    the rule chooses by the round number are chosen while it is traced, so that their
    collectives stand in no conditional.

    Args:
      cluster: from `simulate` or `on_mesh`.
      round_class: class of the round `state.round + 1`; None for a traced number.
      state: state of the cluster.
      weight: `(K,)`, or None for equal weights.

    Returns:
      The synchronised state.

    Raises:
      PeriodTooShort: if the rule depends on more than the residue.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.when(lsgd.every(2), lsgd.average())
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5), rule)
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
      >>> odd_round = RoundClass(period=2, residue=1)
      >>> sync_in_class(cluster, odd_round, state).workers.params     # not due
      Array([1., 3.], dtype=float32)
    """
    if round_class is None:
        return cluster.sync(state, weight)
    # `sync` adds 1 to the number, which keeps the class of the sum.
    previous: Any = round_class.number(state.round + 1) - 1
    state = cluster.sync(state._replace(round=previous), weight)
    return state._replace(round=jnp.asarray(state.round))
